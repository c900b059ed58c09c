"""`PhiForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.models.hugging_face.block import HFBlock
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt_neox import build_feed_forward
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Locals, Tensor


class PhiBlock(HFBlock):
    """`PhiDecoderLayer`."""

    build_feed_forward = staticmethod(build_feed_forward)

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.residual = x
        v.x = self.attention_norm(x)
        v.y, v.weights = self.attention(v.x, *where[:-1])
        v.y = dropout(v.y, self.recipe)
        v.ffn = dropout(self.ffn(v.x), self.recipe)
        v.x = ops.add(ops.add(v.y, v.ffn), v.residual)
        return v.take("x")


class Phi(HFDecoder):
    """`PhiForCausalLM`."""

    build_block = PhiBlock

    def enter(self, v: Locals) -> None:
        """What is dropped of the embedding is gone."""
        v.embeds = dropout(v.embeds, self.recipe)
        v.x = v.embeds
