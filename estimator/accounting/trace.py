"""From a ledger of three blocks to a step of any number of blocks.

Blocks are alike, so the ledger of a model with three of them says everything about one with L: what the first block
does happens once, what the last does happens once, and what the middle one does happens L - 2 times in a row. (Models
of one or two blocks are run as they are.) Where only every n-th block is checkpointed, n blocks are alike n others:
they are the unit that repeats, and the last may be longer. A `Trace` holds the ledger as arrays of counts over *size
classes*, the few dozen different (bytes, category) of storages, from which live bytes follow exactly, as polynomials
or as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.accounting.step import run_step
from estimator.eager.ledger import Category, Phase
from estimator.eager.sizes import ZERO, evaluate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.eager.ledger import Ledger, Where
    from estimator.eager.sizes import ShapeClass, Size
    from estimator.models.layers import Recipe


def executed_blocks(num_layers: Any, unit: int) -> Any:
    """How many blocks tell the whole story: three units and what does not fill one, or all; a number or an array."""
    return np.minimum(num_layers, 3 * unit + num_layers % unit)


@lru_cache(maxsize=8)  # each is megabytes; accounts keep theirs
def trace(recipe: Recipe, shapes: ShapeClass, device: str, executed: int) -> Trace:
    """The trace of a step of which `executed` blocks are run: the middle one of three whole units repeats."""
    unit = recipe.checkpoint_every
    return Trace(run_step(recipe, shapes, device, executed), repeats=executed >= 3 * unit, unit=unit)


@dataclass(frozen=True)
class Moment:
    """An allocation at which live bytes may peak, as counts over size classes: constant + repetitions x slope."""

    where: Where
    constant: NDArray[np.int32]
    slope: NDArray[np.int32]


class Trace:
    """A ledger as arrays. `repeats` says whether the second unit of blocks stands for all between first and last.

    Attributes:
        unit: blocks of a unit.
        middle_blocks: those of the second unit.
        executed: blocks that the ledger has.
        classes: (bytes, category) of each size class.
        step: index of the first event after the setup.
        klass, sign: of each event, the size class and +1 or -1.
        middle: of each event, whether it happens once in every middle block.
    """

    def __init__(self, ledger: Ledger, *, repeats: bool, unit: int = 1) -> None:
        self.ledger, self.repeats, self.unit = ledger, repeats, unit
        self.middle_blocks = range(unit, 2 * unit) if repeats else range(0)
        self.executed = 1 + max(e.where.block for e in ledger.events if e.where.block is not None)
        index: dict[tuple[Size, Category], int] = {}
        self.klass = np.array(
            [index.setdefault((e.storage.nbytes, e.storage.category), len(index)) for e in ledger.events], dtype=np.intp
        )
        self.classes = list(index)
        self.sign = np.array([e.sign for e in ledger.events], dtype=np.int64)
        self.step = next(i for i, e in enumerate(ledger.events) if e.where.phase is not Phase.SETUP)
        self.middle = self._middle()

    def _middle(self) -> NDArray[np.bool_]:
        """Which events belong to the middle unit, with what happens between it and the next (a name is rebound)."""
        blocks: list[int | None] = [e.where.block for e in self.ledger.events]
        phases = [e.where.phase for e in self.ledger.events]
        after: list[int | None] = [None] * len(blocks)
        upcoming: int | None = None
        for i in range(len(blocks) - 1, -1, -1):
            if i + 1 < len(blocks) and phases[i] is not phases[i + 1]:
                upcoming = None
            upcoming = blocks[i] if blocks[i] is not None else upcoming
            after[i] = upcoming
        current: int | None = None
        middle = np.zeros(len(blocks), dtype=bool)
        for i, block in enumerate(blocks):
            if i and phases[i] is not phases[i - 1]:
                current = None
            if block is not None:
                current = block
            elif after[i] is None:
                current = None
            middle[i] = current in self.middle_blocks
        return middle

    @cached_property
    def segments(self) -> list[tuple[int, int]]:
        """[start, end) of each run of middle events."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], self.middle, [False])).astype(np.int8)))
        return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]

    @cached_property
    def moments(self) -> list[Moment]:
        """The rows of `moment_counts`, each with its place."""
        return [Moment(*row) for row in zip(*self._moments, strict=True)]

    @property
    def moment_counts(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(moments, classes) twice: the constants and the slopes of all moments."""
        return self._moments[1:]

    @cached_property
    def _moments(self) -> tuple[list[Where], NDArray[np.int32], NDArray[np.int32]]:
        """Every allocation of the step that is followed by a free, with the counts alive after it.

        Live bytes change by the same amount from each middle unit to the next, so of a middle unit's event only the
        first and the last repetition can be the greatest: two moments. Where they change by that amount from the first
        unit to the middle and from the middle to the last as well, one of those two is greater: none.
        """
        deltas = np.zeros((len(self.sign), len(self.classes)), dtype=np.int32)  # what each event adds to the counts
        deltas[np.arange(len(self.sign)), self.klass] = self.sign
        live = deltas.cumsum(0, dtype=np.int32)
        once = np.where(self.middle[:, None], 0, deltas).cumsum(0, dtype=np.int32)
        repeated = np.where(self.middle[:, None], deltas, 0)
        total = repeated.cumsum(0, dtype=np.int32)
        before, net = np.zeros_like(total), np.zeros_like(total)  # whole segments before; the segment of an event
        for start, end in self.segments:
            net[start:end] = repeated[start:end].sum(0)
            before[start:end] = total[start - 1] if start else 0
            before[end:] = total[end - 1]
        peaks = (self.sign > 0) & np.append(self.sign[1:] < 0, True)
        peaks[: self.step] = False
        found = []
        for i in np.flatnonzero(peaks):
            where = self.ledger.events[i].where
            if not self.middle[i]:
                found.append((where, once[i], before[i]))
                continue
            inside = total[i] - before[i]
            low, high = (live[partner] - live[i] for partner in self._partners(int(i)))
            if bool((low == -high).all()) and (bool((low == net[i]).all()) or bool((high == net[i]).all())):
                continue
            found.append((where, once[i] + inside, before[i]))
            found.append((where, once[i] + inside - net[i], before[i] + net[i]))
        places, constants, slopes = zip(*found, strict=True)
        return list(places), np.array(constants), np.array(slopes)

    @cached_property
    def _positions(self) -> dict[tuple[Phase, int | None, int], int]:
        """(phase, block, n): the n-th event of a block in a phase."""
        count: dict[tuple[Phase, int | None], int] = {}
        positions = {}
        for i, event in enumerate(self.ledger.events):
            key = event.where.phase, event.where.block
            positions[*key, count.setdefault(key, 0)] = i
            count[key] += 1
        return positions

    @cached_property
    def _places(self) -> dict[int, tuple[Phase, int | None, int]]:
        return {at: key for key, at in self._positions.items()}

    def _partners(self, i: int) -> tuple[int, int]:
        """The events of the first and the last unit that are event i of the middle one; i where there is none."""
        phase, block, ordinal = self._places[i]
        assert block is not None
        ends = (self._positions.get((phase, block + step, ordinal), i) for step in (-self.unit, self.unit))
        first, last = (at if self.ledger.events[at].where.op == self.ledger.events[i].where.op else i for at in ends)
        return first, last

    def class_bytes(self, sizes: Mapping[str, int], granule: int = 1) -> NDArray[np.int64]:
        """Bytes of one storage of each class, rounded up to `granule`."""
        return np.array([-(-evaluate(n, sizes) // granule) * granule for n, _ in self.classes], dtype=np.int64)

    def expand(self, num_layers: int) -> NDArray[np.intp]:
        """Indices of the events of a step with `num_layers` blocks, in order, the setup included."""
        if not self.repeats:
            return np.arange(len(self.sign))
        pieces, last = [], 0
        for start, end in self.segments:
            pieces += [np.arange(last, start), np.tile(np.arange(start, end), self.repetitions(num_layers))]
            last = end
        return np.concatenate([*pieces, np.arange(last, len(self.sign))])

    def repetitions(self, layers: Any) -> Any:
        """How often the middle unit happens in a model of so many layers: a number, an array or a polynomial."""
        return (layers - self.executed % self.unit) // self.unit - 2

    def times(self, block: int | None) -> tuple[int, int]:
        """How often what block `block` does happens, as (constant, slope) of constant + slope x repetitions."""
        return (0, 1) if block in self.middle_blocks else (1, 0)

    def named(self, where: Where, num_layers: int) -> Where:
        """`where` in a model of `num_layers`: the last unit's blocks have their index there."""
        if not self.repeats or where.block is None or where.block < self.middle_blocks.stop:
            return where
        index = num_layers - self.executed + where.block
        return where._replace(block=index, module=where.module.replace(f"blocks.{where.block}", f"blocks.{index}", 1))


def total(trace: Trace, terms: Sequence[tuple[int | None, Size]], layers: Size) -> Size:
    """The sum of (block, size) terms over all blocks; `layers` is the number of blocks, a letter or a number."""
    once = repeated = ZERO
    for block, size in terms:
        if block in trace.middle_blocks:
            repeated = repeated + size
        else:
            once = once + size
    return once + repeated * trace.repetitions(layers)
