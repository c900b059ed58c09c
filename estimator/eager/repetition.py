"""Declared repetition: a model is a stack of groups, each a pattern of blocks that comes so many times.

Of a group a few turns stand for all: what its first turn does happens once, what the last does happens once, and what
the middle one of three does happens turns - 2 times in a row. A group of at most two turns is executed as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from estimator.eager.letters import ONE, L, Size, constant, letter

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

TURNS = 3  # that are executed of a group: the first, one for all between, the last
MIDDLE = 1


class Group(NamedTuple):
    """Blocks of the kinds `pattern`, one after the other, `turns` times."""

    pattern: tuple[Hashable, ...]
    turns: int

    @property
    def repeats(self) -> bool:
        """Whether the middle turn stands for others."""
        return self.turns >= TURNS


class Place(NamedTuple):
    """Where a block is: its group, the executed turn in it, its position in the pattern."""

    group: int
    turn: int
    position: int


@dataclass(frozen=True)
class Stack:
    """The blocks of a model, as many of each group as are executed.

    Two models whose stacks are equal execute the same; how many blocks they have are letters: L for all blocks where
    one group repeats, and where several do, for the turns of each a letter with the number of its group: L_1, L_2, ...

    Attributes:
        groups: the groups, `turns` at most `TURNS`.
    """

    groups: tuple[Group, ...]

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """The place of each executed block."""
        return tuple(
            Place(at, turn, position)
            for at, group in enumerate(self.groups)
            for turn in range(group.turns)
            for position in range(len(group.pattern))
        )

    @cached_property
    def kinds(self) -> tuple[Hashable, ...]:
        """The kind of each executed block."""
        return tuple(self.groups[p.group].pattern[p.position] for p in self.places)

    @cached_property
    def repeated(self) -> tuple[int, ...]:
        """The groups that repeat."""
        return tuple(i for i, group in enumerate(self.groups) if group.repeats)

    @cached_property
    def repetitions(self) -> tuple[Size, ...]:
        """How often the middle turn of each group in `repeated` happens, in letters."""
        if not self.repeated:
            return ()
        if len(self.repeated) == 1:
            turns = [(L - self._once) / len(self.groups[self.repeated[0]].pattern)]
        else:
            turns = [
                letter(f"L_{i + 1}", f"turns of the {_ordinal(i + 1)} group of blocks", TURNS) for i in self.repeated
            ]
        return tuple(count - (TURNS - 1) for count in turns)

    @cached_property
    def _once(self) -> int:
        """Blocks of the groups that do not repeat."""
        return sum(len(group.pattern) * group.turns for group in self.groups if not group.repeats)

    @cached_property
    def blocks(self) -> Size:
        """The number of blocks: L where one group repeats, of several their turns."""
        if len(self.repeated) == 1:
            return L
        repeated = zip(self.repeated, self.repetitions, strict=True)
        own = (len(self.groups[group].pattern) * (count + (TURNS - 1)) for group, count in repeated)
        return sum(own, constant(self._once))

    @cached_property
    def _weights(self) -> tuple[int | None, ...]:
        """Of each executed block, which of `repeated` it is in the middle of, None of others."""
        return tuple(
            self.repeated.index(p.group) if self.groups[p.group].repeats and p.turn == MIDDLE else None
            for p in self.places
        )

    def repeats(self, block: int | None) -> int | None:
        """Which of `repeated` has `block` in its middle turn; None for a block that happens once, or for none."""
        return None if block is None else self._weights[block]

    def times(self, block: int | None) -> Size:
        """How often what `block` does happens in the whole model."""
        at = self.repeats(block)
        return ONE if at is None else self.repetitions[at]

    def real_index(self, block: int, turns: Sequence[int], turn: int | None = None) -> int:
        """The index of executed block `block` in a model with `turns` of each group.

        `turn` is which repetition of a middle turn, from 0; None for the first.
        """
        place = self.places[block]
        before = sum(len(g.pattern) * t for g, t in zip(self.groups[: place.group], turns, strict=False))
        group = self.groups[place.group]
        real = place.turn
        if group.repeats:
            real = {0: 0, MIDDLE: MIDDLE + (turn or 0)}.get(place.turn, turns[place.group] - 1)
        return before + real * len(group.pattern) + place.position


class Layout(NamedTuple):
    """A stack and how many turns each of its groups really has."""

    stack: Stack
    turns: tuple[int, ...]

    @property
    def values(self) -> dict[str, int]:
        """The numbers behind L_1, L_2, ...; of groups of one or two turns too: a deeper model's sums hold for them."""
        return {f"L_{i + 1}": turns for i, turns in enumerate(self.turns)}

    def times(self, count: int) -> Layout:
        """So many of these stacks, one after the other."""
        return self if count == 1 else Layout(_stack(self.stack.groups * count), self.turns * count)


def executed(groups: Sequence[Group]) -> Layout:
    """The stack that stands for these groups."""
    short = tuple(Group(group.pattern, min(group.turns, TURNS)) for group in groups)
    return Layout(_stack(short), tuple(group.turns for group in groups))


@lru_cache(maxsize=1024)
def _stack(groups: tuple[Group, ...]) -> Stack:
    return Stack(groups)


def runs(kinds: Sequence[Hashable]) -> list[Group]:
    """Blocks in a row as groups: from the left the shortest pattern that covers the most, else one alone."""
    groups: list[Group] = []
    at = 0
    while at < len(kinds):
        best = Group((kinds[at],), 1)
        for period in range(1, (len(kinds) - at) // 2 + 1):
            pattern = tuple(kinds[at : at + period])
            turns = 1
            while tuple(kinds[at + turns * period : at + (turns + 1) * period]) == pattern:
                turns += 1
            if turns > 1 and turns * period > len(best.pattern) * best.turns:
                best = Group(pattern, turns)
        groups.append(best)
        at += len(best.pattern) * best.turns
    return groups


@lru_cache(maxsize=1024)
def executed_of(kinds: tuple[Hashable, ...]) -> int:
    """How many of these blocks, in a row, are executed."""
    return len(executed(runs(kinds)).stack.places)


def _ordinal(number: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(number, f"{number}th")


@lru_cache(maxsize=1024)
def layout(first: tuple[Hashable, ...], cycle: tuple[Hashable, ...], count: int) -> Layout:
    """The stack of `count` blocks: those of the kinds `first`, then `cycle` again and again, cut off at the last."""
    before = first[:count]
    turns, rest = divmod(count - len(before), len(cycle))
    groups = runs(before)
    if turns:
        groups.append(Group(cycle, turns))
    if rest:
        groups.append(Group(cycle[:rest], 1))
    return executed(groups)
