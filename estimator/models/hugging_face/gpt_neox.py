"""`GPTNeoXForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.views import split, transpose, view
from estimator.models.block import Block
from estimator.models.feed_forward import PlainFeedForward
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.layers import dropout
from estimator.models.norms import ScaleAndShift

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import BlockKind, Recipe


class GPTNeoXAttention(HFAttention):
    """`GPTNeoXAttention`: queries, keys and values of one head lie side by side."""

    def project(self, v: Locals, x: Tensor) -> None:
        """All three at once, head by head."""
        v.qkv = transpose(view(self.qkv(x), (*x.shape[:2], self.h, 3 * self.e)), 1, 2)
        v.q, v.k, v.v = split(v.qkv, (self.e, self.e, self.e))


class MLPWithoutDropout(PlainFeedForward):
    """`GPTNeoXMLP`: dropout is the block's."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.x = self.up(x)
        v.x = self.activation(v.x)
        v.x = self.down(v.x)
        return v.take("x")


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> MLPWithoutDropout:
    """Its `mlp`."""
    return MLPWithoutDropout(machine, "ffn", part, d, f, recipe)


class GPTNeoXBlock(Block):
    """`GPTNeoXLayer`."""

    build_attention = staticmethod(GPTNeoXAttention)
    build_feed_forward = staticmethod(build_feed_forward)
    positional = 1

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, index, recipe, kind)
        self.owned.sort(key=lambda x: not isinstance(x, ScaleAndShift))  # norms, attention, feed-forward

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.y, v.weights = self.attention(self.attention_norm(x), *where[:-1])
        v.y = dropout(v.y, self.recipe)
        if self.recipe.parts.order == "pre":
            v.y = ops.add(v.y, x)
        v.ffn = self.ffn(self.ffn_norm(v.y if self.recipe.parts.order == "pre" else x))
        v.ffn = dropout(v.ffn, self.recipe)
        v.x = ops.add(v.ffn, v.y)
        return v.take("x") if self.recipe.parts.order == "pre" else ops.add(v.take("x"), x)


class GPTNeoX(HFDecoder):
    """`GPTNeoXForCausalLM`."""

    build_block = GPTNeoXBlock
    drops_embedding = True
