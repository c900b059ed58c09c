"""A block; `trainer.model.block`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.eager import ops
from estimator.models.attention import Attention
from estimator.models.expert_attention import ExpertAttention
from estimator.models.experts import SparseFeedForward
from estimator.models.feed_forward import build_feed_forward
from estimator.models.latent import LatentAttention
from estimator.models.layers import Module
from estimator.models.norms import build_norm
from estimator.parallel.sequence import of_whole, over_part

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import BlockKind, Recipe

# Of each order in `estimator.describe.parts.ORDERS`, the norms that a block has.
NORMS = {
    "pre": ("attention_norm", "ffn_norm"),
    "post": ("attention_post_norm", "ffn_post_norm"),
    "sandwich": ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"),
    "post-sum": ("attention_post_norm", "ffn_post_norm"),
    "parallel": ("attention_norm",),
    "parallel-two": ("attention_norm", "ffn_norm"),
}


def build_attention(machine: Machine, recipe: Recipe) -> Attention | LatentAttention | ExpertAttention:
    """The module of the declared attention."""
    part = recipe.parts.attention
    if part.experts:
        return ExpertAttention(machine, recipe)
    return (Attention if part.latent == "none" else LatentAttention)(machine, recipe)


class Block(Module):
    """One layer."""

    build_attention: Callable[[Machine, Recipe], Any] = staticmethod(build_attention)
    build_experts: type[SparseFeedForward] = SparseFeedForward
    build_feed_forward: Callable[[Machine, MLP, Size, Size, Recipe], Any] = staticmethod(build_feed_forward)

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind) -> None:
        super().__init__(machine, f"blocks.{index}", index)
        self.recipe, parts, size = recipe, recipe.parts, machine.shapes.letters
        with self.inside():
            self.attention_norm = self.norm("attention_norm")
            self.attention = self.child(self.build_attention(machine, recipe))
            self.attention_post_norm = self.norm("attention_post_norm")
            self.ffn_norm = self.norm("ffn_norm")
            self.ffn = self.child(
                self.build_experts(machine, recipe)
                if kind.layer.sparse
                else self.build_feed_forward(machine, parts.mlp, size["d"], size["f"], recipe)
            )
            self.ffn_post_norm = self.norm("ffn_post_norm")
        if recipe.sequence_parallel:
            of_whole(self.attention, size["T"])
            of_whole(self.ffn, size["T"])
        if kind.checkpointed:
            part = self.attention if recipe.checkpointing == "attention" else self
            part.checkpointed = True
            part.selective = recipe.checkpointing == "selective"

    def norm(self, name: str) -> Any:
        """The norm of this name, if blocks of this order have one."""
        if name not in NORMS[self.recipe.parts.order]:
            return None
        norm = build_norm(self.machine, self.recipe, name, self.recipe.parts.norm, self.machine.shapes.letters["d"])
        if self.recipe.sequence_parallel:
            over_part(norm, local="post" in name)
        return self.child(norm)

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor | tuple[Tensor, Tensor | None]:
        v.x = x
        match self.recipe.parts.order:
            case "pre":
                v.x = ops.add(v.x, self.scaled(self.attention(self.attention_norm(v.x), *where)))
                return ops.add(v.x, self.scaled(self.ffn(self.ffn_norm(v.x))))
            case "post":
                v.x = ops.add(v.x, self.scaled(self.attention_post_norm(self.attention(v.x, *where))))
                return ops.add(v.x, self.scaled(self.ffn_post_norm(self.ffn(v.x))))
            case "sandwich":
                v.x = ops.add(
                    v.x, self.scaled(self.attention_post_norm(self.attention(self.attention_norm(v.x), *where)))
                )
                return ops.add(v.x, self.scaled(self.ffn_post_norm(self.ffn(self.ffn_norm(v.x)))))
            case "post-sum":
                v.x = self.attention_post_norm(ops.add(v.x, self.scaled(self.attention(v.x, *where))))
                found: Tensor = self.ffn_post_norm(ops.add(v.x, self.scaled(self.ffn(v.x))))
                return found
            case "parallel":
                v.y = self.attention_norm(v.x)
                v.sum = ops.add(v.x, self.scaled(self.attention(v.y, *where)))
                return ops.add(v.sum, self.scaled(self.ffn(v.y)))
            case _:  # "parallel-two"
                v.y = ops.add(v.x, self.scaled(self.attention(self.attention_norm(v.x), *where)))
                return ops.add(v.y, self.scaled(self.ffn(self.ffn_norm(v.x))))

    def scaled(self, x: Tensor) -> Tensor:
        """What is added to the stream."""
        return x if self.recipe.parts.residual_scale is None else ops.mul_number(x)
