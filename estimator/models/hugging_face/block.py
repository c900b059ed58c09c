"""`LlamaDecoderLayer`, and blocks that are written like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.models.block import Block
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.norms import ScaleAndShift

if TYPE_CHECKING:
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import BlockKind, Recipe


class HFBlock(Block):
    """`LlamaDecoderLayer`."""

    build_attention = staticmethod(HFAttention)
    positional = 1

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, index, recipe, kind)
        self.owned.sort(key=lambda x: isinstance(x, ScaleAndShift))  # attention, feed-forward, norms

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        where = where[:-1]  # without the positions, which attention takes and leaves
        v.residual = x
        v.x = self.attention_norm(x)
        v.x = self.attention(v.x, *where)
        v.x = ops.add(v.residual, v.x)
        v.residual = v.x
        v.x = self.ffn_norm(v.x)
        v.x = self.ffn(v.x)
        v.x = ops.add(v.residual, v.x)
        return v.take("x")
