"""`LlamaDecoderLayer`, and blocks that are written like it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.eager import ops
from estimator.models.block import Block
from estimator.models.feed_forward import GatedFeedForward, PlainFeedForward
from estimator.models.hugging_face.attention import HFAttention, SinkAttention
from estimator.models.hugging_face.experts import HFSparseFeedForward
from estimator.models.hugging_face.latent import HFLatentAttention
from estimator.models.layers import dropout_at

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import BlockKind, Module, Recipe


def build_attention(machine: Machine, recipe: Recipe) -> HFAttention | HFLatentAttention:
    """The module of the declared attention."""
    part = recipe.parts.attention
    if part.sinks:
        return SinkAttention(machine, recipe)
    return (HFAttention if part.latent == "none" else HFLatentAttention)(machine, recipe)


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> Module:
    """The module of a declared feed-forward, in most classes without dropout."""
    kind = GatedFeedForward if part.gated else PlainFeedForward
    return kind(machine, "ffn", part, d, f, recipe, drops="ffn" in recipe.of_class.drops)


class HFBlock(Block):
    """`LlamaDecoderLayer`."""

    build_attention = staticmethod(build_attention)
    build_feed_forward = staticmethod(build_feed_forward)
    build_experts = HFSparseFeedForward
    positional = 1

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, index, recipe, kind)
        order, places = recipe.of_class.layer, {id(self.attention): "attention", id(self.ffn): "ffn"}
        self.owned.sort(key=lambda x: order.index(places.get(id(x), "norms")))

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        where = where[:-1]  # without the positions, which attention takes and leaves
        v.residual = x
        if self.recipe.parts.order == "parallel":
            v.x = self.attention_norm(x)
            v.attention, v.weights = self.attention(v.x, *where)
            v.ffn = self.ffn(v.x)
            v.ffn = self.dropped(v.ffn)
            return ops.add(ops.add(v.residual, v.attention), v.ffn)
        if self.recipe.of_class.names_all:
            v.x = self.attention_norm(x)
            v.attention, v.weights = self.attention(v.x, *where)
            v.residual = ops.add(v.residual, v.attention)
            v.ffn = self.ffn(self.ffn_norm(v.residual))
            v.ffn = self.dropped(v.ffn)
            v.x = ops.add(v.residual, v.ffn)
            return v.take("x")
        v.x, v.weights = self.attention(self.before(v, x, self.attention_norm), *where)
        self.after(v, self.attention_post_norm)
        v.residual = v.x
        v.x = self.fed_forward(v, self.before(v, v.x, self.ffn_norm))
        self.after(v, self.ffn_post_norm)
        return v.take("x")

    def fed_forward(self, v: Locals, x: Tensor) -> Tensor:
        """By the feed-forward, with a shared expert that is beside it."""
        found: Tensor
        if isinstance(self.ffn, HFSparseFeedForward) and self.ffn.beside is not None:
            v.routed = self.ffn(x)
            return ops.add(v.routed, self.ffn.beside(x))
        if isinstance(self.ffn, HFSparseFeedForward) and self.ffn.routed_as.returns_weights:
            found, v.weights = self.ffn(x)
        else:
            found = self.ffn(x)
        return found

    def before(self, v: Locals, x: Tensor, norm: Any) -> Tensor:
        """What goes into attention or the feed-forward, a name of the frame."""
        v.x = x if norm is None else norm(x)
        found: Tensor = v.x
        return found

    def after(self, v: Locals, norm: Any) -> None:
        """What comes out of it is normed, where there is a norm, and added to the stream."""
        if norm is not None:
            v.x = norm(v.x)
        v.x = ops.add(v.residual, self.dropped(self.scaled(v.x)))

    def dropped(self, x: Tensor) -> Tensor:
        """What is added to the stream, where the block drops it."""
        return dropout_at(x, drops=self.recipe.dropout and "added" in self.recipe.of_class.drops)
