"""How rows get to experts that other processes have, and back.

A process sends each of its rows to the one that has its expert, and gets what that makes of it back: two all-to-alls in
forward, two in backward (Lepikhin et al. 2020, "GShard", section 3.2), and a small one that says how many rows come.
The order of statements is that of Megatron-LM's MoEAlltoAllTokenDispatcher: rows are sorted by expert before they go,
and by expert again where they arrive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Exchanges:
    """What experts call in each forward, with how many rows this process has for each expert of the layer."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __call__(self, count_E: Tensor, *, biases: bool) -> Exchange:
        """What is sent in this forward; `biases`: whether it is asked of which expert a row is."""
        return Exchange(count_E, self.group, biases=biases)


class Exchange:
    """The rows of one layer on their way; e is the number of experts here, S of the rows that arrive.

    Attributes:
        sent, arriving: rows to and from each process.
        pieces: rows that arrive, by the process that sends them and then by expert.
        count: (e), rows of each expert.
        expert: (S), the expert of each row, or None without biases.
    """

    def __init__(self, count_E: Tensor, group: ProcessGroup, *, biases: bool) -> None:
        self.group, ranks = group, group.size()
        theirs_E = torch.empty_like(count_E)
        dist.all_to_all_single(theirs_E, count_E, group=group)
        self.sent: list[int] = count_E.view(ranks, -1).sum(1).tolist()
        self.pieces: list[int] = theirs_E.tolist()
        self.here = len(self.pieces) // ranks
        self.arriving = [sum(self.pieces[i : i + self.here]) for i in range(0, len(self.pieces), self.here)]
        self.count = theirs_E.view(ranks, -1).sum(0)
        self.expert = torch.arange(self.here, device=count_E.device).repeat_interleave(self.count) if biases else None

    def dispatch(self, x: Tensor) -> Tensor:
        """Rows by expert, all processes' (E) -> the rows of this one's experts, sorted by expert: (S, d)."""
        return regrouped(exchanged(x, self.arriving, self.sent, self.group), self.pieces, len(self.arriving))

    def by_sender(self, y: Tensor) -> Tensor:
        """The rows of this process's experts, in the order in which they came."""
        ranks = len(self.arriving)
        by_expert = [self.pieces[rank * self.here + e] for e in range(self.here) for rank in range(ranks)]
        return regrouped(y, by_expert, self.here)

    def combine(self, y: Tensor) -> Tensor:
        """Each row of `by_sender` back where it came from."""
        return exchanged(y, self.sent, self.arriving, self.group)


def exchanged(x: Tensor, arriving: list[int], sent: list[int], group: ProcessGroup) -> Tensor:
    """All-to-all of rows, that is there when it returns."""
    out = all_to_all_single_autograd(x, arriving, sent, group)
    return out.wait() if isinstance(out, AsyncCollectiveTensor) else out


def regrouped(x: Tensor, pieces: list[int], outer: int) -> Tensor:
    """The rows of `outer` groups of pieces, one of each group after the other: a transposition of pieces."""
    parts, inner = torch.split(x, pieces), len(pieces) // outer
    return torch.cat([parts[o * inner + i] for i in range(inner) for o in range(outer)])
