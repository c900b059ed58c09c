"""Several stages of a pipeline on one accelerator, as `trainer.parallel.pipeline.Stages` has them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from estimator.models.decoder import Transformer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.block import Block
    from estimator.models.layers import Recipe


class Stages:
    """A decoder's stages on one accelerator; the first may have the embedding, the last the head.

    Attributes:
        parts: the stages, in order.
        recipes: of each.
        blocks: of all of them.
    """

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        self.machine = machine
        self.unit: Any = None
        last = recipe.local_stages - 1
        self.parts: list[Transformer] = []
        self.recipes: list[Recipe] = []
        for number in range(recipe.local_stages):
            first_of_all, last_of_all = recipe.enters and number == 0, recipe.leaves and number == last
            self.recipes.append(replace(recipe, stage=(0, 2) if first_of_all else (1, 2) if last_of_all else (1, 3)))
            like = self.parts[-1] if self.parts else None
            self.parts.append(Transformer(machine, self.recipes[-1], like))
        self.blocks: list[Block] = [block for part in self.parts for block in part.blocks]

    @property
    def buffers(self) -> list[Tensor]:
        """The tables, which all parts share."""
        return self.parts[0].buffers

    def parameters(self) -> Iterator[Tensor]:
        """In PyTorch's order."""
        for part in self.parts:
            yield from part.parameters()
