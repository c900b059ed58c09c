"""How attention gets the keys and values of the tokens that other processes have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as functional

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Its name from torch 2.13 on, and the one before.
ALL_GATHER = getattr(functional, "all_gather_single_autograd", None) or functional.all_gather_tensor_autograd


class Gather:
    """An all-gather over the tokens; its backward adds up the gradients of all processes and scatters them."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: (B, T, k, e) of this process's tokens -> (B, ranks x T, k, e)."""
        ranks = ALL_GATHER(x.contiguous(), 0, self.group)
        if isinstance(ranks, functional.AsyncCollectiveTensor):
            ranks = ranks.wait()
        if len(x) == 1:
            found: Tensor = ranks.view(1, -1, *x.shape[2:])
            return found
        return torch.cat(ranks.chunk(self.group.size()), 1)
