"""`CTRLLMHeadModel`: without checkpoints, and no dropout of attention's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.tensor import INT64, Locals
from estimator.eager.views import unsqueeze
from estimator.models.hugging_face.biogpt import OwnScores
from estimator.models.hugging_face.block import HFBlock
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt_neox import build_feed_forward
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Tensor


class CTRLBlock(HFBlock):
    """`EncoderLayer`."""

    build_attention = staticmethod(OwnScores)
    build_feed_forward = staticmethod(build_feed_forward)

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.normed = self.attention_norm(x)
        v.y, v.weights = self.attention(v.normed, *where[:-1])
        v.y = dropout(v.y, self.recipe)
        v.out1 = ops.add(x, v.y)
        v.out2 = self.ffn_norm(v.out1)
        v.ffn = self.ffn(v.out2)
        v.ffn = dropout(v.ffn, self.recipe)
        v.out2 = ops.add(v.out1, v.ffn)
        return v.take("out2")


class CTRL(HFDecoder):
    """`CTRLLMHeadModel`."""

    build_block = CTRLBlock

    def decoded(self, ids: Tensor) -> Tensor:
        """`CTRLModel`."""
        machine, (B, T), table = self.machine, ids.shape, self.buffers[0]
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.positions = machine.empty((T,), INT64)
            masks = self.attention_masks(v, B)
            ops.scale_in_place(v.embeds, "mul")
            v.position_embeds = machine.empty((T, table.shape[1]), table.dtype)
            machine.kernel("index", (v.positions, v.position_embeds), (v.position_embeds,))
            v.x = ops.add_number(ops.add(v.embeds, unsqueeze(v.position_embeds, 0)))
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.x = block(v.x, masks["full"], None, None, None, None, None)
            v.x = self.final_norm(v.x)
            return v.take("x")
