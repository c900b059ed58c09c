"""Decoders as transformers' classes run them, statement by statement: its Llama, and those written like it.

What a class does otherwise is in its `Written` and in the parts. Names of a frame are its locals there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.linalg import matmul, scaled_dot_product_attention
from estimator.eager.losses import torch_cross_entropy
from estimator.eager.pointwise import neg
from estimator.eager.tensor import BOOL, FLOAT32, INT64, Locals, arguments
from estimator.eager.views import cast, concatenate, contiguous, reshape, slice_last, split, transpose, unsqueeze, view
from estimator.models.attention import Attention
from estimator.models.block import Block
from estimator.models.decoder import Transformer
from estimator.models.layers import dropout
from estimator.models.norms import ScaleAndShift

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Shape, Tensor
    from estimator.models.layers import BlockKind, Recipe


# ---- positions


def integers(machine: Machine, name: str, shape: Shape, *reads: Tensor, dtype: Dtype = INT64) -> Tensor:
    """What an operator makes of integers and of a Python number, which autocast leaves alone."""
    number = ops.wrapped_number(machine)
    out = machine.empty(shape, dtype)
    machine.kernel(name, reads, (out,))
    if number is not None:
        number.drop()
    return out


def position_ids(machine: Machine, length: Size) -> Tensor:
    """torch.arange(T) + 0."""
    with Locals() as v:
        v.range = machine.empty((length,), INT64)
        machine.kernel("arange", (), (v.range,))
        return integers(machine, "add", (length,), v.range)


def look_for_packed_sequences(positions: Tensor, sequences: Size) -> None:
    """`find_packed_sequence_indices`, which finds none: sequences are not packed into one."""
    machine, (length,) = positions.machine, positions.shape
    with Locals() as v:
        v.first = integers(machine, "sub", (sequences, ONE), positions)
        with Locals() as inner:
            inner.both = machine.empty((sequences, length + 1), INT64)
            machine.kernel("cat", (v.first, positions), (inner.both,))
            v.diff = machine.empty((sequences, length), INT64)
            machine.kernel("sub", (inner.both,), (v.diff,))
        with Locals() as inner:
            inner.apart = integers(machine, "ne", (sequences, length), v.diff, dtype=BOOL)
            v.packed = machine.empty((sequences, length), INT64)
            if machine.device == "cpu":  # a copy of the bools in the dtype of the sums
                machine.empty((sequences, length), INT64).discard()
            machine.kernel("cumsum", (inner.apart,), (v.packed,))
        with Locals() as inner:
            inner.none = integers(machine, "eq", (sequences,), v.packed, dtype=BOOL)
            machine.empty((), BOOL).discard()


def rotary_embedding(v: Locals, positions: Tensor, frequencies: Tensor, dtype: Dtype) -> None:
    """`LlamaRotaryEmbedding`: `v.cos` and `v.sin`, (1, T, e) of `dtype`."""
    machine, (length,), (half,) = positions.machine, positions.shape, frequencies.shape
    with Locals() as w:
        w.positions = machine.empty((ONE, length, ONE))
        machine.kernel("_to_copy", (positions,), (w.positions,))
        w.freqs = ops.elementwise("mul", w.positions, frequencies)
        del w.positions
        w.emb = concatenate((w.freqs, w.freqs), 2 * half)
        w.cos = ops.with_number("mul", ops.elementwise("cos", w.emb))
        w.sin = ops.with_number("mul", ops.elementwise("sin", w.emb))
        v.cos, v.sin = cast(w.cos, dtype), cast(w.sin, dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(-x2, x1) of the halves of the last dimension."""
    with arguments((x,)) as results, Locals() as v:
        half = x.shape[-1] / 2
        v.x1, v.x2 = slice_last(x, half), slice_last(x, half)
        results.append(concatenate((neg(v.x2), v.x1)))
    return results[0]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin."""
    return ops.add(ops.mul(x, cos), ops.mul(rotate_half(x), sin))


# ---- a block


class HFAttention(Attention):
    """`LlamaAttention`; queries, keys and values are names of its frame to the end."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.owned.sort(key=lambda x: isinstance(x, ScaleAndShift))  # projections, norms

    def forward(self, v: Locals, x: Tensor, mask: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        v.q = transpose(view(self.q(x), (B, T, self.h, self.e)), 1, 2)
        v.k = transpose(view(self.k(x), (B, T, self.k_heads, self.e)), 1, 2)
        v.v = transpose(view(self.v(x), (B, T, self.k_heads, self.e)), 1, 2)
        if cos is not None and sin is not None:
            with Locals() as inner:
                inner.cos, inner.sin = unsqueeze(cos, 1), unsqueeze(sin, 1)
                inner.q, inner.k = rotated(v.q, inner.cos, inner.sin), rotated(v.k, inner.cos, inner.sin)
                v.q, v.k = inner.q, inner.k
        v.y = scaled_dot_product_attention(v.q, v.k, v.v, mask, drops=self.recipe.dropout)
        v.y = contiguous(transpose(v.y, 1, 2))
        v.y = reshape(v.y, (B, T, self.widths[0]))
        return self.out(v.y)


class HFBlock(Block):
    """`LlamaDecoderLayer`."""

    build_attention = staticmethod(HFAttention)
    positional = 1

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, index, recipe, kind)
        self.owned.sort(key=lambda x: isinstance(x, ScaleAndShift))  # attention, feed-forward, norms

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        _: Tensor,  # the positions, which attention takes and leaves
    ) -> Tensor:
        v.residual = x
        v.x = self.attention_norm(x)
        v.x = self.attention(v.x, mask, cos, sin)
        v.x = ops.add(v.residual, v.x)
        v.residual = v.x
        v.x = self.ffn_norm(v.x)
        v.x = self.ffn(v.x)
        v.x = ops.add(v.residual, v.x)
        return v.take("x")


class HFDecoder(Transformer):
    """`LlamaForCausalLM`: ids (B, T), labels (B, T) -> their loss."""

    build_block = HFBlock

    def rotary_tables(self) -> list[Tensor]:
        """The inverse frequencies, and their original."""
        half = self.machine.shapes.letters[self.recipe.rotated] / 2
        return [self.buffer(half) for _ in ("inv_freq", "original_inv_freq")]

    def forward(self, v: Locals, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        v.x = self.decoded(ids)
        v.logits = self.head(v.x)
        with self.machine.ledger.inside("loss"):
            return causal_lm_loss(v.logits, targets)

    def decoded(self, ids: Tensor) -> Tensor:
        """`LlamaModel`."""
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.positions = position_ids(self.machine, ids.shape[1])
            look_for_packed_sequences(v.positions, ids.shape[0])
            v.x = v.embeds
            v.cos = v.sin = None
            if self.recipe.rotates:
                rotary_embedding(v, v.positions, self.tables[0], v.x.dtype)
            for block in self.blocks:
                v.x = block(v.x, None, v.cos, v.sin, v.positions)
            v.x = self.final_norm(v.x)
            return v.take("x")


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`ForCausalLMLoss`: the cross entropy of logits in fp32 and of labels moved by one."""
    machine, (B, T) = logits.machine, labels.shape
    with arguments((logits, labels)) as results, Locals() as v:
        v.logits = cast(logits, FLOAT32)
        v.labels = machine.empty((B, T + 1), INT64)
        machine.kernel("constant_pad_nd", (labels,), (v.labels,))
        v.shifted = machine.empty((B, T), INT64)
        machine.kernel("clone", (v.labels,), (v.shifted,))
        results.append(torch_cross_entropy(v.logits, v.shifted))
    return results[0]
