"""`FalconForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.autocast import lower
from estimator.eager.indexing import pick
from estimator.eager.letters import ONE
from estimator.eager.linalg import matmul, mm
from estimator.eager.ops import additive_mask
from estimator.eager.pointwise import compared
from estimator.eager.tensor import BFLOAT16, BOOL, FLOAT32, INT64, Locals, op
from estimator.eager.views import cast, expand, narrow, reshape, select, transpose, unsafe_view, view
from estimator.models.attention import attend
from estimator.models.block import Block
from estimator.models.hugging_face.alibi import alibi_slopes
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.bloom import dropout_add
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt_neox import MLPWithoutDropout
from estimator.models.hugging_face.masks import attention_mask, seen
from estimator.models.hugging_face.positions import integers, look_for_packed_sequences, position_ids
from estimator.models.layers import Linear, dropout

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Tensor
    from estimator.models.layers import BlockKind, Recipe


class FalconLinear(Linear):
    """`FalconLinear`: x @ W.T, and then the bias."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.x = matmul_of_matrix(x, transpose(self.weight, 0, 1))
        return v.take("x") if self.bias is None else ops.add(v.x, self.bias)


@op
def matmul_of_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, T, m) @ (m, n): one product of rows."""
    return _matmul_of_matrix(*lower(x, matrix))


@op
def _matmul_of_matrix(x: Tensor, matrix: Tensor) -> Tensor:
    rows = reshape(x, (x.machine.product(x.shape[:-1]), x.shape[-1]))
    return unsafe_view(mm(rows, matrix), (*x.shape[:-1], matrix.shape[1]))


class FalconAttention(HFAttention):
    """`FalconAttention`."""

    linear = FalconLinear

    def project(self, v: Locals, x: Tensor) -> None:
        """All three at once, of which those of a group of heads are together."""
        v.qkv = self.qkv(x)
        self.split(v, x)
        v.q = transpose(v.q, 1, 2)
        v.k = transpose(v.k, 1, 2)
        v.v = transpose(v.v, 1, 2)

    def split(self, v: Locals, x: Tensor) -> None:
        """`_split_heads`."""
        shape = x.shape[:2]
        with Locals() as w:
            if self.k_heads is ONE:
                w.qkv = view(v.qkv, (*shape, self.h + 2, self.e))
                v.q = narrow(w.qkv, self.h, 2)
                v.k, v.v = pick(w.qkv, 2), pick(w.qkv, 2)
            elif self.g is ONE:
                w.qkv = view(v.qkv, (*shape, self.h, 3 * ONE, self.e))
                v.q, v.k, v.v = (select(w.qkv, 3) for _ in range(3))
            else:
                grouped = (*shape, self.k_heads, self.g, self.e)
                w.qkv = view(v.qkv, (*shape, self.k_heads, self.g + 2, self.e))
                w.q = narrow(w.qkv, self.g, 3)
                w.k, w.v = pick(w.qkv, 3), pick(w.qkv, 3)
                w.k = expand(w.k, grouped)
                w.v = expand(w.v, grouped)
                v.q, v.k, v.v = (reshape(x, (*shape, self.h, self.e)) for x in (w.q, w.k, w.v))

    def rotate(self, v: Locals, cos: Tensor, sin: Tensor) -> None:
        """If there is no bias, which comes with cosines and sines all the same."""
        if self.recipe.rotates:
            super().rotate(v, cos, sin)

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        query_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Eager attention's statements are in here, and its names alive to the end."""
        if not self.recipe.attention.startswith("naive"):
            return super().forward(v, x, mask, bias, cos, sin, query_scale)
        assert mask is not None
        self.project(v, x)
        if bias is None:
            if cos is not None and sin is not None:
                self.rotate(v, cos, sin)
            v.weights = matmul(v.q, transpose(v.k, 2, 3))
            ops.scale_in_place(v.weights, "div")
            v.weights = ops.softmax(ops.add(v.weights, mask), self.machine.dtype)
        else:
            v.product = matmul(v.q, transpose(v.k, 2, 3))
            v.scores = view(v.product, v.product.shape)
            v.scores = cast(v.scores, FLOAT32)
            v.logits = ops.add(v.scores, bias)
            ops.scale_in_place(v.logits, "mul")
            v.weights = ops.softmax(ops.add(v.logits, mask), self.machine.dtype)
            v.weights = dropout(v.weights, self.recipe)
        v.y = matmul(v.weights, v.v)
        v.y = transpose(v.y, 1, 2)
        v.y = reshape(v.y, (*x.shape[:2], self.widths[0]))
        v.y = self.out(v.y)
        return v.take("y"), v.take("weights")

    def fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Without `enable_gqa`: one head of keys is for SDPA to expand."""
        return transpose(attend(q, k, v, mask, self.scores, repeats=False), 1, 2)


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> FalconMLP:
    """Its `mlp`."""
    return FalconMLP(machine, "ffn", part, d, f, recipe)


class FalconMLP(MLPWithoutDropout):
    """`FalconMLP`."""

    linear = FalconLinear

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.x = self.activation(self.up(x))
        v.x = self.down(v.x)
        return v.take("x")


class FalconBlock(Block):
    """`FalconDecoderLayer`."""

    build_attention = staticmethod(FalconAttention)
    build_feed_forward = staticmethod(build_feed_forward)
    positional = 1

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, index, recipe, kind)
        norms = [self.attention_norm, self.ffn_norm]
        if recipe.parts.order == "pre":
            norms.reverse()
        self.owned = [self.attention, self.ffn, *(norm for norm in norms if norm is not None)]

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> tuple[Tensor, Tensor | None]:
        order = self.recipe.parts.order
        v.residual = x
        v.normed = self.attention_norm(x)
        if order == "parallel-two":
            v.normed_too = self.ffn_norm(x)
        v.y, v.weights = self.attention(v.normed, *where[:-1])
        if order == "parallel":
            v.normed_too = v.normed
        elif order == "pre":
            v.residual = dropout_add(v.y, v.residual, self.recipe)
            v.normed_too = self.ffn_norm(v.residual)
        v.ffn = self.ffn(v.normed_too)
        if order != "pre":
            ops.add_in_place(v.ffn, v.y)
        v.x = dropout_add(v.ffn, v.residual, self.recipe)
        return v.take("x"), None if v.weights is None else v.take("weights")


class Falcon(HFDecoder):
    """`FalconForCausalLM`."""

    build_block = FalconBlock

    def alibi_tables(self) -> list[Tensor]:
        """Frequencies are there all the same."""
        return self.rotary_tables()

    def decoded(self, ids: Tensor) -> Tensor:
        """`FalconModel`."""
        B, T = ids.shape
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.alibi = None
            if not self.recipe.rotates:
                v.ones = self.machine.empty((B, T), INT64)
                v.alibi = falcon_bias(v.ones, self.machine.shapes.letters["h"], v.embeds.dtype)
            v.positions = position_ids(self.machine, T)
            look_for_packed_sequences(v.positions, B)
            if self.recipe.attention.startswith("naive"):
                v.mask = attention_mask(self.machine, T, B, "full", v.embeds.dtype, eager=True)
            else:
                v.mask = seen(self.machine, T, B, "full")
            if v.alibi is not None:
                masked_bias(v)
            v.x = v.embeds
            turn = self.rotary(v, "full", self.tables[0])
            for block in self.blocks:
                v.out, v.weights = block(v.x, v.mask, v.alibi, *turn, None, v.positions)
                v.x = v.out
            v.x = self.final_norm(v.x)
            return v.take("x")


def falcon_bias(ones: Tensor, heads: Size, dtype: Dtype) -> Tensor:
    """`build_alibi_tensor`: slopes times positions in bfloat16, (B, h, 1, T) of `dtype`."""
    machine, (B, T) = ones.machine, ones.shape
    with Locals() as v:
        alibi_slopes(v, machine, heads)
        v.sums = machine.empty((B, T), INT64)
        machine.kernel("cumsum", (ones,), (v.sums,))
        v.sums = integers(machine, "sub", (B, T), v.sums)
        v.sums = ops.elementwise("mul", v.sums, ones)
        with Locals() as w:
            w.slopes = cast(v.slopes, BFLOAT16)
            v.alibi = ops.elementwise("mul", view(w.slopes, (heads, ONE, ONE)), view(v.sums, (B, ONE, ONE, T)))
        return cast(v.take("alibi"), dtype)


def masked_bias(v: Locals) -> None:
    """`v.mask` becomes `v.alibi` over the root of the head's width where a token is seen, a least number elsewhere."""
    machine, dtype, shape = v.mask.machine, v.alibi.dtype, v.mask.shape
    if v.mask.dtype == BOOL:
        v.mask = additive_mask(v.mask, dtype)
    with Locals() as w:
        w.scaled = ops.with_number("div", v.alibi)
        w.hidden = compared("lt", v.mask)
        w.mask = machine.empty((shape[0], v.alibi.shape[1], *shape[2:]), dtype)
        machine.kernel("masked_fill", (w.scaled, w.hidden), (w.mask,))
        del w.scaled, w.hidden
        v.mask = w.mask
