"""`BioGptForCausalLM` and `XGLMForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import autocast, ops
from estimator.eager.autocast import lower
from estimator.eager.linalg import bmm
from estimator.eager.pointwise import maximum
from estimator.eager.tensor import FLOAT32, INT64, Locals
from estimator.eager.views import reshape, transpose, unsqueeze, view
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.learned import embedded_positions
from estimator.models.hugging_face.masks import attention_mask, no_padding, padded_mask
from estimator.models.hugging_face.opt import InlineBlock
from estimator.models.hugging_face.positions import integers, position_ids
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.block import Block
    from estimator.models.layers import Recipe


class OwnScores(HFAttention):
    """Eager attention whose weights have the dtype of the scores."""

    def softmax(self, w: Locals, q: Tensor) -> None:
        """Of `w.weights`."""
        w.weights = ops.softmax(w.weights, autocast.fp32(q.machine, "cuda"))


class BioGptAttention(OwnScores):
    """`BioGptAttention`."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.owned = [self.k, self.v, self.q, self.out]

    def project(self, v: Locals, x: Tensor) -> None:
        """Queries are heads before keys and values are made."""
        v.q = transpose(self.heads(self.q(x), self.h), 1, 2)
        v.k = self.k(x)
        v.v = self.v(x)
        v.k = transpose(self.heads(v.k, self.k_heads), 1, 2)
        v.v = transpose(self.heads(v.v, self.k_heads), 1, 2)


class BioGptBlock(InlineBlock):
    """`BioGptDecoderLayer`."""

    build_attention = staticmethod(BioGptAttention)


class BioGpt(HFDecoder):
    """`BioGptForCausalLM`: the embedding is scaled, by 1 if by nothing else."""

    build_block: type[Block] = BioGptBlock

    def decoded(self, ids: Tensor) -> Tensor:
        """`BioGptModel`."""
        machine, (B, T) = self.machine, ids.shape
        with Locals() as v:
            v.embeds = self.scaled_embedding(ids)
            v.ones = machine.empty((B, T), FLOAT32)
            v.mask = None
            if self.recipe.attention.startswith("naive"):
                v.mask = padded_mask(machine, B, T, v.embeds.dtype)
            else:
                no_padding(machine, B, T)
            v.positions = position_ids(machine, T)
            v.position_embeds = embedded_positions(
                self.positions, unsqueeze(integers(machine, "add", (T,), v.positions), 0)
            )
            v.x = ops.add(v.embeds, v.position_embeds)
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.x = block(v.x, v.mask, None, None, None, None, v.positions)
            v.x = self.final_norm(v.x)
            return v.take("x")

    def scaled_embedding(self, ids: Tensor) -> Tensor:
        """Rows times a number."""
        return ops.mul_number(self.embedding(ids))


class XGLMAttention(BioGptAttention):
    """`XGLMAttention`: eager in any case, in products of three dimensions."""

    def forward(self, v: Locals, x: Tensor, mask: Tensor | None, *_: Tensor | None) -> tuple[Tensor, Tensor]:
        machine, (B, T) = self.machine, x.shape[:2]
        rows = (machine.product((B, self.h)), T, self.e)
        square = (*rows[:2], T)
        v.q = ops.mul_number(self.q(x))
        v.k = self.k(x)
        v.v = self.v(x)
        v.k = transpose(self.heads(v.k, self.h), 1, 2)
        v.v = transpose(self.heads(v.v, self.h), 1, 2)
        v.q = transpose(self.heads(v.q, self.h), 1, 2)
        v.q = reshape(v.q, rows)
        v.k = reshape(v.k, rows)
        v.v = reshape(v.v, rows)
        v.weights = bmm(*lower(v.q, transpose(v.k, 1, 2)))
        if mask is not None:
            v.weights = ops.add(view(v.weights, (B, self.h, T, T)), mask)
            v.weights = maximum(v.weights, machine.empty((), FLOAT32))
            v.weights = view(v.weights, square)
        v.weights = ops.softmax(v.weights, autocast.fp32(machine, "cuda"))
        v.reshaped = view(v.weights, (B, self.h, T, T))
        v.weights = view(v.reshaped, square)
        v.probs = dropout(v.weights, self.recipe)
        v.y = bmm(*lower(v.probs, v.v))
        v.y = view(v.y, (B, self.h, T, self.e))
        v.y = transpose(v.y, 1, 2)
        v.y = reshape(v.y, (B, T, self.widths[0]))
        v.y = self.out(v.y)
        return v.take("y"), v.take("reshaped")


class XGLMBlock(InlineBlock):
    """`XGLMDecoderLayer`."""

    build_attention = staticmethod(XGLMAttention)
    positional = 2

    def widened(self, v: Locals) -> None:
        """In one expression."""
        v.x = self.ffn.activation(self.ffn.up(v.x))


class XGLM(BioGpt):
    """`XGLMForCausalLM`."""

    build_block = XGLMBlock
    extra_sinusoids = 2

    def decoded(self, ids: Tensor) -> Tensor:
        """`XGLMModel`."""
        machine, (B, T) = self.machine, ids.shape
        with Locals() as v:
            v.embeds = self.scaled_embedding(ids)
            v.mask = attention_mask(machine, T, B, "full", v.embeds.dtype, eager=True)
            v.positions = machine.empty((T,), INT64)
            v.x = ops.add(v.embeds, self.sinusoids(v.positions))
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.x = block(v.x, v.mask, None, None, None, None, None)
            v.x = self.final_norm(v.x)
            return v.take("x")

    def sinusoids(self, positions: Tensor) -> Tensor:
        """Rows of the table, (1, T, d)."""
        machine, table = self.machine, self.buffers[0]
        with Locals() as v:
            v.moved = integers(machine, "add", positions.shape, positions)
            out = machine.empty((*positions.shape, table.shape[1]), table.dtype)
            machine.kernel("index_select", (v.moved, out), (out,))
            return unsqueeze(out, 0)
