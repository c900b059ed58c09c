"""From a ledger of a few turns of each group of blocks to a step of any number of them.

What the first turn of a group does happens once, what the last does happens once, and what the middle one of three
does happens as often as the group has turns between them (`estimator.eager.repetition`). A `Trace` holds the ledger as
arrays of counts over *size classes*, the few dozen different (bytes, category) of storages, from which live bytes
follow exactly, as polynomials or as numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ONE, ZERO, as_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.eager.ledger import Ledger, Where
    from estimator.eager.letters import Size, Sizes
    from estimator.eager.repetition import Stack

    _Place = tuple[Phase, int | None, int]


@dataclass(frozen=True)
class Moment:
    """An allocation at which live bytes may peak, as counts over size classes.

    Attributes:
        where: its place.
        counts: (1 + groups that repeat, classes): what is there once, and what for each repetition of each group.
    """

    where: Where
    counts: NDArray[np.signedinteger]


def rounded_up(nbytes: Any, granule: int) -> Any:
    """Bytes as blocks of `granule` hold them."""
    return -(-nbytes // granule) * granule


def _each(values: Sizes, nbytes: Size, copies: Size, granule: int) -> Any:
    """Of copies of one storage, which there may be none of."""
    count = values.value(copies)
    return rounded_up(values.value(nbytes) // np.maximum(count, 1), granule) * count


class Trace:
    """A ledger as arrays.

    Attributes:
        stack: the blocks that were executed.
        classes: (bytes, category) of each size class.
        copies: of each size class, how many storages of equal size its bytes are.
        step: index of the first event after the setup.
        klass, sign: of each event, the size class and +1 or -1.
        group: of each event, which of `stack.repeated` it happens once in every middle turn of; -1 if it happens once.
    """

    def __init__(self, ledger: Ledger, stack: Stack) -> None:
        self.ledger, self.stack = ledger, stack
        index: dict[tuple[Size, Category, Size], int] = {}
        keys = [(e.storage.nbytes, e.storage.category, e.storage.copies) for e in ledger.events]
        self.klass = np.array([index.setdefault(key, len(index)) for key in keys], dtype=np.intp)
        self.classes = [(nbytes, category) for nbytes, category, _ in index]
        self.copies = [copies for *_, copies in index]
        self.sign = np.array([e.sign for e in ledger.events], dtype=np.int64)
        steps = (i for i, e in enumerate(ledger.events) if e.where.phase is not Phase.SETUP)
        self.step = next(steps, len(ledger.events))  # a host may only keep what it had
        self._turns = self._executed_turns()
        middle = {turn: at for turn, at in enumerate(self._repeats_of_turns()) if at is not None}
        self.group = np.array([middle.get(turn, -1) for turn in self._turns.tolist()], dtype=np.int64)

    def _repeats_of_turns(self) -> list[int | None]:
        """Of each executed turn of the stack, counted through, which of `stack.repeated` it is the middle of."""
        firsts = [i for i, place in enumerate(self.stack.places) if place.position == 0]
        return [self.stack.repeats(block) for block in firsts]

    def _executed_turns(self) -> NDArray[np.int64]:
        """The executed turn, counted through the stack, that each event belongs to; -1 outside of all.

        What happens between two blocks (a name is rebound) belongs to the one before, as long as another follows.
        """
        turn_of: list[int] = []
        for place in self.stack.places:
            turn_of.append((turn_of[-1] if turn_of else -1) + (place.position == 0))
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
        turns = np.full(len(blocks), -1, dtype=np.int64)
        for i, block in enumerate(blocks):
            if i and phases[i] is not phases[i - 1]:
                current = None
            if block is not None:
                current = block
            elif after[i] is None:
                current = None
            if current is not None:
                turns[i] = turn_of[current]
        return turns

    @cached_property
    def segments(self) -> list[tuple[int, int, int]]:
        """(start, end, group) of each run of events of one group's middle turn."""
        edges = [0, *(np.flatnonzero(np.diff(self.group)) + 1).tolist(), len(self.group)]
        return [(a, b, int(self.group[a])) for a, b in pairwise(edges) if self.group[a] >= 0]

    def moments(self) -> list[Moment]:
        """The rows of `moment_counts`, each with its place."""
        return [Moment(*row) for row in zip(*self._moments, strict=True)]

    @property
    def moment_counts(self) -> NDArray[np.signedinteger]:
        """(moments, 1 + groups that repeat, classes): the counts of all moments."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[list[Where], NDArray[np.signedinteger]]:
        """Every allocation of the step that is followed by a free, with the counts alive after it.

        Live bytes change by the same amount from each middle turn to the next, so of a middle turn's event only the
        first and the last repetition can be the greatest: two moments. Where they change by that amount from the first
        turn to the middle and from the middle to the last as well, one of those two is greater: none.
        """
        deltas = np.zeros((len(self.sign), len(self.classes)), dtype=np.int32)  # what each event adds to the counts
        deltas[np.arange(len(self.sign)), self.klass] = self.sign
        live = deltas.cumsum(0, dtype=np.int32)
        once = np.where(self.group[:, None] >= 0, 0, deltas).cumsum(0, dtype=np.int32)
        groups = len(self.stack.repeated)
        before = np.zeros((groups, *deltas.shape), dtype=np.int32)  # whole segments of each group that lie before
        inside, net = np.zeros_like(deltas), np.zeros_like(deltas)  # of an event's own segment: so far, and in all
        for start, end, group in self.segments:
            so_far = deltas[start:end].cumsum(0, dtype=np.int32)
            inside[start:end] = so_far
            net[start:end] = so_far[-1]
            before[group, end:] += so_far[-1]
        peaks = (self.sign > 0) & np.append(self.sign[1:] < 0, True)
        peaks[: self.step] = False
        positions = self._positions()
        by_event = {at: key for key, at in positions.items()}
        places, counts = [], []
        for i in np.flatnonzero(peaks):
            where, group = self.ledger.events[i].where, int(self.group[i])
            if group < 0:
                places.append(where)
                counts.append(np.concatenate((once[i][None], before[:, i])))
                continue
            low, high = (live[at] - live[i] for at in self._partners(int(i), by_event[int(i)], positions))
            if bool((low == -high).all()) and (bool((low == net[i]).all()) or bool((high == net[i]).all())):
                continue
            first = np.concatenate(((once[i] + inside[i])[None], before[:, i]))
            last = first.copy()
            last[0] -= net[i]
            last[1 + group] += net[i]
            places += [where, where]
            counts += [first, last]
        found = np.array(counts)
        return places, found.astype(np.min_scalar_type(-1 - int(np.abs(found).max())))  # they are small: kept in a byte

    def _positions(self) -> dict[_Place, int]:
        """(phase, block, n): the n-th event of a block in a phase."""
        count: dict[tuple[Phase, int | None], int] = {}
        positions = {}
        for i, event in enumerate(self.ledger.events):
            key = event.where.phase, event.where.block
            positions[*key, count.setdefault(key, 0)] = i
            count[key] += 1
        return positions

    def _partners(self, i: int, place: _Place, positions: Mapping[_Place, int]) -> tuple[int, int]:
        """The events of the first and the last turn that are event i of the middle one; i where there is none."""
        phase, block, ordinal = place
        if block is None:
            return i, i
        unit = len(self.stack.groups[self.stack.places[block].group].pattern)
        ends = (positions.get((phase, block + step, ordinal), i) for step in (-unit, unit))
        first, last = (at if self.ledger.events[at].where.op == self.ledger.events[i].where.op else i for at in ends)
        return first, last

    def class_bytes(self, sizes: Mapping[str, int], granule: int = 1) -> NDArray[np.int64]:
        """Bytes of one storage of each class, or of its copies together, each rounded up to `granule`."""
        return np.array([int(n) for n in self.rounded_classes(sizes, granule)], dtype=np.int64)

    def rounded_classes(self, sizes: Mapping[str, Any], granule: int) -> list[Any]:
        """The same at `sizes` that are numbers or arrays."""
        values = as_sizes(sizes)
        return [
            rounded_up(values.value(n), granule) if copies is ONE else _each(values, n, copies, granule)
            for (n, _), copies in zip(self.classes, self.copies, strict=True)
        ]

    def repetitions(self, sizes: Mapping[str, int]) -> list[int]:
        """How often the middle turn of each group that repeats happens at `sizes`."""
        values = as_sizes(sizes)
        return [int(values.value(count)) for count in self.stack.repetitions]

    def expand(self, sizes: Mapping[str, int]) -> NDArray[np.intp]:
        """Indices of the events of a step of as many blocks as `sizes` say, in order, the setup included."""
        return self.repeated(sizes)[0]

    def repeated(self, sizes: Mapping[str, int]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """`expand`, and of each event which repetition of its middle turn it is, 0 of those that happen once."""
        counts = self.repetitions(sizes)
        pieces, turns, last = [], [], 0
        for start, end, group in self.segments:
            pieces += [np.arange(last, start), np.tile(np.arange(start, end), counts[group])]
            turns += [np.zeros(start - last, dtype=np.intp), np.repeat(np.arange(counts[group]), end - start)]
            last = end
        rest = np.arange(last, len(self.sign))
        return np.concatenate([*pieces, rest]), np.concatenate([*turns, np.zeros_like(rest)])

    def named(self, where: Where, turns: Sequence[int]) -> Where:
        """`where` in a model with so many turns of each group: the last blocks have their index there."""
        if where.block is None:
            return where
        index = self.stack.real_index(where.block, turns)
        return where._replace(block=index, module=where.module.replace(f"blocks.{where.block}", f"blocks.{index}", 1))

    def total(self, terms: Sequence[tuple[int | None, Size]]) -> Size:
        """The sum of (block, size) terms over all blocks."""
        sums = [ZERO] * (1 + len(self.stack.repeated))
        for block, size in terms:
            at = self.stack.repeats(block)
            at = 0 if at is None else 1 + at
            sums[at] = sums[at] + size
        return sum((count * x for count, x in zip((ONE, *self.stack.repetitions), sums, strict=True)), ZERO)
