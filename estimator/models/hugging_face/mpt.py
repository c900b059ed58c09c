"""`MptForCausalLM`: eager in any case."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager import ops
from estimator.eager.letters import ONE, Function
from estimator.eager.linalg import matmul
from estimator.eager.pointwise import clamp
from estimator.eager.tensor import BOOL, FLOAT32, INT32, INT64, Locals
from estimator.eager.views import cast, contiguous_of, reshape, split, transpose, view
from estimator.models.block import Block
from estimator.models.feed_forward import PlainFeedForward
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.masks import attention_mask
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


def _next_power_of_two(n: Any) -> Any:
    return 2 ** np.ceil(np.log2(n)).astype(int)


next_power_of_two = Function(
    _next_power_of_two,
    "next_power_of_two({0})",
    "the least power of two that is at least {0}",
    symbol="h_up",
    usual=("h",),
)


class MptAttention(HFAttention):
    """`MptAttention`."""

    def forward(
        self, v: Locals, x: Tensor, mask: Tensor | None, bias: Tensor | None, *_: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert mask is not None
        assert bias is not None
        B, T = x.shape[:2]
        v.qkv = self.qkv(x)
        if self.part.clip is not None:
            v.qkv = clamp(v.qkv, both=True)
        v.q, v.k, v.v = split(v.qkv, self.widths)
        v.q = transpose(reshape(v.q, (B, T, self.h, self.e)), 1, 2)
        v.k = transpose(reshape(v.k, (B, T, self.h, self.e)), 1, 2)
        v.v = transpose(reshape(v.v, (B, T, self.h, self.e)), 1, 2)
        v.scores = ops.mul_number(matmul(v.q, transpose(v.k, 2, 3)))
        v.bias = bias.view((self.h, ONE, T), bias.stride)
        v.scores = ops.add(v.scores, v.bias)
        v.scores = ops.masked_fill(v.scores, mask)
        v.weights = cast(ops.softmax(cast(v.scores, FLOAT32)), v.v.dtype)
        v.weights = dropout(v.weights, self.recipe)
        v.y = matmul(v.weights, v.v)
        v.y = view(contiguous_of(transpose(v.y, 1, 2)), (B, T, self.widths[0]))
        v.out = self.out(v.y)
        return v.take("out"), v.take("weights")


class MptMLP(PlainFeedForward):
    """`MptMLP`, with the residual."""

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        (residual,) = where
        assert residual is not None
        v.x = self.activation(self.up(x))
        v.between = self.down(v.x)
        v.out = dropout(v.between, self.recipe)
        v.out = ops.add(v.out, residual)
        return v.take("out")


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> MptMLP:
    """Its `ffn`."""
    return MptMLP(machine, "ffn", part, d, f, recipe)


class MptBlock(Block):
    """`MptBlock`."""

    build_attention = staticmethod(MptAttention)
    build_feed_forward = staticmethod(build_feed_forward)
    positional = 1

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v.normed = self.attention_norm(x)
        v.residual = x
        v.y, v.weights = self.attention(v.normed, *where)
        v.x = ops.add(dropout(v.y, self.recipe), v.residual)
        v.normed = self.ffn_norm(v.x)
        v.residual = v.x
        v.out = self.ffn(v.normed, v.residual)
        return v.take("out"), v.take("weights")


class Mpt(HFDecoder):
    """`MptForCausalLM`."""

    build_block = MptBlock

    def decoded(self, ids: Tensor) -> Tensor:
        """`MptModel`."""
        machine, (B, T) = self.machine, ids.shape
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.x = v.embeds
            v.alibi = mpt_bias(machine, machine.shapes.letters["h"], machine.shapes.letters["C"])
            with Locals() as w:
                w.mask = attention_mask(machine, T, B, "full", v.embeds.dtype, eager=True)
                v.mask = machine.empty(w.mask.shape, BOOL)
                machine.kernel("_to_copy", (w.mask,), (v.mask,))
            for block in self.blocks:
                v.out, v.weights = block(v.x, v.mask, v.alibi)
                v.x = v.out
            v.x = self.final_norm(v.x)
            return v.take("x")


def mpt_bias(machine: Machine, heads: Size, length: Size) -> Tensor:
    """`build_mpt_alibi_tensor`, (h, 1, C) in fp32, for the whole context."""
    most = next_power_of_two(heads)
    with Locals() as v:
        v.alibi = machine.empty((length,), INT32)
        v.base = cast(machine.empty((most,), INT64), FLOAT32)
        v.base = ops.with_number("mul", v.base)
        v.power = ops.with_number("pow", v.base)
        v.slopes = ops.with_number("mul", ops.elementwise("reciprocal", v.power))
        del v.power
        if not machine.divides(heads, most):
            v.both = machine.empty((most,), FLOAT32)
            machine.kernel("cat", (v.slopes,), (v.both,))
            v.slopes = v.take("both")
        v.alibi = ops.elementwise("mul", v.alibi, v.slopes.view((heads, ONE, ONE), (ONE, ONE, ONE)))
        return v.take("alibi")
