"""An out-of-memory message beside the estimate of the run that it is of: where they differ, and what would fit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.answers.advice import Advisor
from estimator.eager.ledger import Category, Phase
from estimator.memory.allocator import GRANULE
from estimator.memory.device import timeline

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from estimator.answers.advice import Change
    from estimator.answers.estimates import Estimate
    from estimator.answers.messages import Message
    from estimator.eager.ledger import Where
    from estimator.memory.device import Timeline

# What the allocator asks of the device for a request (c10/cuda/CUDACachingAllocator.cpp, `get_allocation_size`).
SMALL, SMALL_SEGMENT = 2**20, 2 * 2**20
LARGE, LARGE_SEGMENT, ROUND = 10 * 2**20, 20 * 2**20, 2 * 2**20
LIKE = 0.02  # of what is allocated: figures that differ by less are taken for the same


@dataclass(frozen=True, slots=True)
class Moment:
    """An allocation of the step.

    Attributes:
        where: its place.
        first: in the first step, in which the optimizer has no state until it runs; else in a later one.
        nbytes: what it takes.
        before: bytes that are alive before it, in the allocator's blocks, cuBLAS's workspace among them.
    """

    where: Where
    first: bool
    nbytes: int
    before: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """A message and an estimate, side by side.

    Attributes:
        message, estimate: the two.
        moment: the allocation of the step that is most like the one that failed; None where none is, or none failed.
        expected: the first allocation that does not fit, by the estimate; None where all do.
        more: bytes that are allocated beyond what the estimate has alive then; negative for fewer.
        fits: single changes of the recipe after which the step fits, what is beyond the estimate counted in; those
            that do not change what is learned come first, then the fastest.
    """

    message: Message
    estimate: Estimate
    moment: Moment | None
    expected: Moment | None
    more: int
    fits: tuple[Change, ...]

    @property
    def capacity(self) -> int:
        """What this process can have of the device."""
        known = self.message.capacity or self.estimate.memory.capacity or 0
        return known - (self.message.others or 0)

    @property
    def fragmented(self) -> bool:
        """What was reserved and not allocated would have held what was asked for."""
        m = self.message
        return m.tried is not None and m.unallocated is not None and m.unallocated >= m.tried


def explain(message: Message, r: Estimate, global_batch_size: int | None = None, **options: Any) -> Explanation:
    """What `message`, of a run that `r` is the estimate of, says beside it; `options` are those `r` was made with."""
    device = (message.capacity or r.memory.capacity or 0) - (message.others or 0)
    runs = _runs(r, device)
    moment = _moment(message, runs)
    more = (message.allocated or 0) - (r.memory.allocated if moment is None else moment.before)
    if moment is None and message.kind == "message":
        more = max(more, 0)  # it failed before the peak, at a place that is not known
    expected = next((run.at(run.end - 1) for run in runs if run.end < len(run.live)), None)
    found = Explanation(message, r, moment, expected, more, ())
    unknown = max(more, 0)
    changes = Advisor(r, global_batch_size, **options).single()
    fitting = [c for c in changes if c.estimate.memory.needed + unknown <= found.capacity]
    fitting.sort(key=lambda c: (c.alters, c.seconds or c.work, -c.saves))
    return replace(found, fits=tuple(fitting))


def asked_of_device(nbytes: int) -> int:
    """What the allocator asks of the device for so many bytes, which is what its message says it tried."""
    if nbytes <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if nbytes < LARGE else -(-nbytes // ROUND) * ROUND


@dataclass(frozen=True, slots=True)
class _Run:
    """A step up to the first allocation that does not fit: that is event `end` - 1, where `end` is not its length."""

    line: Timeline
    first: bool
    live: NDArray[np.int64]  # in the allocator's blocks, after each event
    end: int

    def at(self, index: int) -> Moment:
        """An allocation of it."""
        nbytes = int(self.line.delta[index])
        return Moment(self.line.where(index), self.first, nbytes, int(self.live[index]) - nbytes)


def _runs(r: Estimate, device: int) -> list[_Run]:
    """The first step, and if that fits a later one, on a device of so many bytes."""
    memory = r.memory
    line = timeline(memory.account, memory.sizes, GRANULE)
    updates = np.cumsum(line.phases == Phase.OPTIMIZER.value) > 0
    states = line.categories[Category.OPTIMIZER.value]
    beside = memory.needed - memory.allocated
    found = []
    for first in (True, False):
        live = line.live + memory.workspace - (np.where(updates, 0, states) if first else 0)
        over = np.flatnonzero((live + beside > device) & (line.delta > 0))
        found.append(_Run(line, first, live, int(over[0]) + 1 if len(over) else len(live)))
        if len(over):
            break
    return found


def _moment(message: Message, runs: list[_Run]) -> Moment | None:
    """The allocation of the message's size before which what is alive is nearest to what the message says."""
    if message.tried is None or message.allocated is None:
        return None
    unit = next((u for u in (2**30, 2**20, 2**10) if message.tried >= u), 1)
    found: list[tuple[int, Moment]] = []
    for run in runs:
        for index in np.flatnonzero(run.line.delta[: run.end] > 0).tolist():
            if abs(asked_of_device(int(run.line.delta[index])) - message.tried) <= unit / 100:  # of two decimals
                moment = run.at(index)
                found.append((abs(moment.before - message.allocated), moment))
    return min(found, key=lambda entry: entry[0])[1] if found else None
