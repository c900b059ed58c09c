"""`GPTBigCodeForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE
from estimator.eager.tensor import BOOL, Locals
from estimator.eager.views import split, transpose, unsqueeze, view
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt2 import NamedBlock
from estimator.models.hugging_face.learned import embedded_positions
from estimator.models.hugging_face.positions import position_ids
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class GPTBigCodeAttention(HFAttention):
    """`GPTBigCodeAttention`."""

    drops = True

    def project(self, v: Locals, x: Tensor) -> None:
        """All three at once, of which keys and values are one head, or head by head."""
        if self.k_heads is ONE:
            v.q, v.k, v.v = split(unsqueeze(self.qkv(x), 1), self.widths)
            v.q = transpose(view(v.q, (*x.shape[:2], self.h, self.e)), 1, 2)
        else:
            by_head = transpose(view(self.qkv(x), (*x.shape[:2], self.h, 3 * self.e)), 1, 2)
            v.q, v.k, v.v = split(by_head, (self.e, self.e, self.e))


class GPTBigCodeBlock(NamedBlock):
    """`GPTBigCodeBlock`."""

    build_attention = staticmethod(GPTBigCodeAttention)
    positional = 1


class GPTBigCode(HFDecoder):
    """`GPTBigCodeForCausalLM`."""

    build_block = GPTBigCodeBlock

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        length = machine.shapes.letters["C"]
        self.tables.append(machine.empty((length, length), BOOL, category=Category.BUFFER).hold())

    def decoded(self, ids: Tensor) -> Tensor:
        """`GPTBigCodeModel`."""
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.positions = position_ids(self.machine, ids.shape[1])
            masks = self.attention_masks(v, ids.shape[0])
            v.position_embeds = embedded_positions(self.positions, unsqueeze(v.positions, 0))
            v.x = ops.add(v.embeds, v.position_embeds)
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.x = block(v.x, masks["full"], None, None, None, None, None)
            v.x = self.final_norm(v.x)
            v.x = view(v.x, v.x.shape)
            return v.take("x")
