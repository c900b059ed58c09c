"""`OPTForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.tensor import Locals
from estimator.eager.views import reshape, transpose, view
from estimator.models.block import Block
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.learned import embedded_positions, positions_of_ones
from estimator.models.hugging_face.masks import attention_mask
from estimator.models.hugging_face.positions import integers
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import BlockKind, Recipe


class OPTAttention(HFAttention):
    """`OPTAttention`: queries are scaled, and scores with 1."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.owned = [self.k, self.v, self.q, self.out]

    def project(self, v: Locals, x: Tensor) -> None:
        """Queries are scaled before they become heads."""
        v.q = ops.mul_number(self.q(x))
        v.q = transpose(self.heads(v.q, self.h), 1, 2)
        v.k = self.k(x)
        v.v = self.v(x)
        v.k = transpose(self.heads(v.k, self.k_heads), 1, 2)
        v.v = transpose(self.heads(v.v, self.k_heads), 1, 2)


class InlineBlock(Block):
    """A block that has its feed-forward's statements in its own forward, and each norm after what it is for."""

    positional = 1

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, index, recipe, kind)
        norms = {self.attention: self.attention_norm, self.ffn: self.ffn_norm}
        if recipe.parts.order == "pre":
            self.owned = [module for pair in norms.items() for module in pair]

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.residual = v.x = x
        if self.attention_norm is not None:
            v.x = self.attention_norm(v.x)
        v.x, v.weights = self.attention(v.x, *where[:-1])
        v.x = dropout(v.x, self.recipe)
        v.x = ops.add(v.residual, v.x)
        if self.attention_post_norm is not None:
            v.x = self.attention_post_norm(v.x)
        self.feed_forward(v)
        return v.take("x")

    def feed_forward(self, v: Locals) -> None:
        """Of `v.x`, to `v.x`."""
        v.residual = v.x
        if self.ffn_norm is not None:
            v.x = self.ffn_norm(v.x)
        with self.ffn.inside():
            self.widened(v)
            v.x = self.ffn.down(v.x)
            v.x = dropout(v.x, self.recipe)
        v.x = ops.add(v.residual, v.x)

    def widened(self, v: Locals) -> None:
        """`v.x` is what goes down."""
        v.x = self.ffn.up(v.x)
        v.x = self.ffn.activation(v.x)


class OPTBlock(InlineBlock):
    """`OPTDecoderLayer`: the feed-forward is of rows."""

    build_attention = staticmethod(OPTAttention)

    def feed_forward(self, v: Locals) -> None:
        """Of `v.x` in rows, to `v.x`, and its norm where that comes last."""
        shape = v.x.shape
        v.x = reshape(v.x, (self.machine.product(shape[:2]), shape[2]))
        super().feed_forward(v)
        v.x = view(v.x, shape)
        if self.ffn_post_norm is not None:
            v.x = self.ffn_post_norm(v.x)


class OPT(HFDecoder):
    """`OPTForCausalLM`."""

    build_block = OPTBlock

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        ends = [self.embedding, self.positions, self.project_out, self.project_in, self.final_norm]
        rest = [x for x in self.owned if not any(x is end for end in ends)]
        self.owned = [x for x in ends if x is not None] + rest

    def decoded(self, ids: Tensor) -> Tensor:
        """`OPTDecoder`."""
        B, T = ids.shape
        with Locals() as v:
            v.embeds = self.embedding(ids)
            positions_of_ones(v, self.machine, ids.shape)
            eager = self.recipe.attention.startswith("naive")
            v.mask = attention_mask(self.machine, T, B, "full", v.embeds.dtype, eager=eager)
            v.position_embeds = embedded_positions(
                self.positions, integers(self.machine, "add", v.positions.shape, v.positions)
            )
            if self.project_in is not None:
                v.embeds = self.project_in(v.embeds)
            v.x = ops.add(v.embeds, v.position_embeds)
            for block in self.blocks:
                v.x = block(v.x, v.mask, None, None, None, None, v.positions)
            if self.final_norm is not None:
                v.x = self.final_norm(v.x)
            if self.project_out is not None:
                v.x = self.project_out(v.x)
            return v.take("x")
