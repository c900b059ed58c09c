"""Expert parallelism: each rank has a part of every layer's experts, and rows go to those that have theirs and back.

The message is `all_to_all_single_autograd` of torch/distributed/_functional_collectives.py: a new tensor of what
arrives, and in backward one of what went. gloo and NCCL receive straight into it. What arrives lies by the rank that
sent it and then by expert; `torch.split` and `torch.cat` bring the rows of an expert together, as in
`sort_chunks_by_idxs` of megatron/core/transformer/moe/moe_utils.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.eager.autograd import attach, record
from estimator.eager.letters import ONE, ZERO, Function, letter
from estimator.eager.ops import python_number
from estimator.eager.tensor import INT64, Locals, Tensor, empty_like, op
from estimator.eager.views import contiguous
from estimator.optim.updates import at_parameter
from estimator.parallel.placement import EXPERT
from estimator.parallel.tensor import part_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.autograd import Context
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Machine

RANKS = letter("x", "accelerators that share each layer's experts (expert parallelism)")
IMBALANCE_UNIT = 10**6
IMBALANCE = letter("i", "rows of the most loaded expert over the mean of all, in millionths")
_ARRIVING = Function(
    lambda pairs, experts, ranks, rank: (
        ranks
        * (
            pairs // experts * (experts // ranks)
            + np.clip(pairs % experts - rank * (experts // ranks), 0, experts // ranks)
        )
    ),
    "rows({0}, {1}, {2}, {3})",
    "rows that arrive at rank {3} of {2}, each of which deals {0} out evenly among {1} experts",
)


class Place(NamedTuple):
    """Which of those that share the experts a rank is, and whether expert 0, of the first, gets more than others."""

    rank: int
    imbalanced: bool


def experts_on(machine: Machine, experts: Size) -> Size:
    """How many of a layer's experts a rank has."""
    part = part_of(experts, RANKS)
    return ONE if machine.at_most(part, ONE) else part


def _most_to_the_first(pairs: Any, picks: Any, experts: Any, ranks: Any, imbalance: Any, rank: Any) -> Any:
    """The rows of `_LOADED`, of numbers or arrays."""
    points = np.broadcast_arrays(pairs, picks, experts, ranks, imbalance, rank)
    found = np.empty(points[0].shape, dtype=np.int64)
    for at in np.ndindex(found.shape):
        found[at] = _rows_of_one(*(int(point[at]) for point in points))
    return found if found.shape else int(found)


def _rows_of_one(pairs: int, picks: int, experts: int, ranks: int, imbalance: int, rank: int) -> int:
    """`trainer.model.router.deal_out`: the first tokens' first choice is expert 0, all else goes round the others."""
    first = min(round(imbalance / IMBALANCE_UNIT * pairs / experts), pairs // picks)
    own, others = experts // ranks, experts - 1
    start, end = max(rank * own - 1, 0), (rank + 1) * own - 1  # the others of this rank, from 0
    rows = pairs // others * (end - start) + min(max(pairs % others - start, 0), end - start)
    turns, rest = divmod(first, others // math.gcd(picks, others))  # the choices that expert 0 has taken go round too
    taken = [start <= turn * picks % others < end for turn in range(others // math.gcd(picks, others))]
    rows -= turns * sum(taken) + sum(taken[:rest])
    return ranks * (rows + (first if rank == 0 else 0))


_LOADED = Function(
    _most_to_the_first,
    "rows({0}, {1}, {2}, {3}, {4}, {5})",
    "rows that arrive at rank {5} of {3}, each of which sends {4} millionths of an even share of {0} to expert 0 of "
    "{2}, of which a token chooses {1}",
)


def rows_arriving(machine: Machine, pairs: Size, experts: Size, place: Place) -> Size:
    """Rows that a rank gets where each rank deals `pairs` of token and choice out, evenly or most to the first."""
    rank, picks = place.rank, machine.shapes.letters["K"]
    if place.imbalanced:
        rows = _LOADED(pairs, picks, experts, RANKS, IMBALANCE, rank)
        return ZERO if machine.at_most(rows, ZERO) else rows
    return pairs if machine.divides(experts, pairs) else _ARRIVING(pairs, experts, RANKS, rank)


class Exchange:
    """`trainer.model.exchange.Exchange`, of a layer's rows on one rank.

    Attributes:
        sent, arriving: how many rows.
        count: rows of each of this rank's experts.
        expert: the expert of each row, where they have biases.
    """

    def __init__(self, v: Locals, counts: Tensor, here: Size, place: Place, rows: Size, *, biases: bool) -> None:
        machine = counts.machine
        self.sent, self.arriving = rows, rows_arriving(machine, rows, counts.shape[0], place)
        with Locals() as inner:
            inner.theirs = empty_like(counts)
            machine.collective("all-to-all", EXPERT, inner.theirs, waits="step")
            machine.empty((RANKS,), INT64).discard()
            v.count = machine.empty((here,), INT64)
            machine.kernel("sum", (inner.theirs,), (v.count,))
        v.expert = None
        if biases:
            with Locals() as inner:
                inner.names = machine.empty((here,), INT64)
                inner.ends = machine.empty((here,), INT64)
                v.expert = machine.empty((self.arriving,), INT64)
                machine.kernel("repeat_interleave", (inner.names, v.count), (v.expert,))

    def dispatch(self, x: Tensor) -> Tensor:
        """The rows that arrive, by expert."""
        return regrouped(all_to_all(x, self.arriving))

    def combine(self, y: Tensor) -> Tensor:
        """Each row back where it came from."""
        return all_to_all(y, self.sent)


@op
def all_to_all(x: Tensor, arriving: Size) -> Tensor:
    """`all_to_all_single_autograd`: of a contiguous tensor; the gradient takes the same way back."""
    sent = x.shape[0]

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.grad = contiguous(grad)
        return [_exchanged(c.grad, sent)]

    node = record("all_to_all_single", (x,), backward)
    return attach(node, _exchanged(x, arriving))


def _exchanged(x: Tensor, arriving: Size) -> Tensor:
    machine = x.machine
    out = machine.empty((arriving, *x.shape[1:]), x.dtype)
    machine.collective("all-to-all", EXPERT, out if machine.at_most(x.shape[0], arriving) else x, waits="step")
    return out


@op
def regrouped(x: Tensor) -> Tensor:
    """`torch.cat` of the pieces of `torch.split` in another order; backward does the same with the gradient."""
    node = record("SplitWithSizesBackward0", (x,), lambda _, grad: [_copied(grad)])
    return attach(node, _copied(x))


def _copied(x: Tensor) -> Tensor:
    out = x.machine.empty(x.shape, x.dtype)
    x.machine.kernel("cat", (x,), (out,))
    return out


def average(parameters: Sequence[Tensor]) -> None:
    """The gradients of experts, which have all ranks' tokens in them, divided by their number as DDP's mean is."""
    for p in parameters:
        assert p.grad is not None
        with at_parameter(p, "div_"), python_number(p.machine, p.grad.dtype):
            p.machine.kernel("div_", (p.grad,), (p.grad,), arithmetic=p.numel)
