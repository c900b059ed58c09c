"""A step is a schedule: forwards F and backwards B of its micro-batches, in the order in which a process runs them.

Gradient accumulation is F0 B0 F1 B1: one micro-batch's graph is alive at a time. F0 F1 B0 B1 keeps two alive, as a
stage of a pipeline does.
"""

from __future__ import annotations

from typing import NamedTuple

from estimator.describe.checks import ConfigError, shown

FORWARD, BACKWARD = "F", "B"


class Move(NamedTuple):
    """The forward ("F") or the backward ("B") of a micro-batch."""

    kind: str
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}"


Schedule = tuple[Move, ...]


def accumulation(micro_batches: int) -> Schedule:
    """F0 B0 F1 B1 ...: each micro-batch's backward directly after its forward."""
    return tuple(Move(kind, i) for i in range(micro_batches) for kind in (FORWARD, BACKWARD))


def all_forward_first(micro_batches: int) -> Schedule:
    """F0 F1 ... B0 B1 ...: every forward, then every backward, as GPipe runs a stage (Huang et al. 2019)."""
    return tuple(Move(kind, i) for kind in (FORWARD, BACKWARD) for i in range(micro_batches))


def one_forward_one_backward(micro_batches: int, stage: int, stages: int) -> Schedule:
    """1F1B of a stage: as many forwards ahead as there are stages after it, then a backward for each forward.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters", section 2.2; PyTorch's
    `Schedule1F1B` counts the stage itself among those that it runs ahead for.
    """
    ahead = min(micro_batches, stages - stage)
    moves = [Move(FORWARD, i) for i in range(ahead)]
    for i in range(micro_batches):
        moves.append(Move(BACKWARD, i))
        if ahead + i < micro_batches:
            moves.append(Move(FORWARD, ahead + i))
    return tuple(moves)


class Part(NamedTuple):
    """The forward or the backward of a micro-batch in one part of a stage."""

    kind: str
    micro_batch: int
    part: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.part}"


Moves = Schedule | tuple[Part, ...]


def rounds(micro_batches: int, stages: int) -> int:
    """In how many equal groups PyTorch's `ScheduleInterleaved1F1B` takes micro-batches, whose number they divide."""
    return max(1, micro_batches // stages)


def interleaved(micro_batches: int, stage: int, stages: int, parts: int, group: int | None = None) -> tuple[Part, ...]:
    """Interleaved 1F1B of a stage of several parts: a group of micro-batches goes through each of them in turn.

    Narayanan et al. 2021, section 2.2.2. In PyTorch's `ScheduleInterleaved1F1B` a `group` is that of `rounds`. Without
    one, `forward_backward_pipelining_with_interleaving` in megatron/core/pipeline_parallel/schedules.py: groups of as
    many as there are stages, of which `micro_batches` is a multiple, and all forwards first where there is one.
    """
    total = micro_batches * parts
    whole = group is None and micro_batches == stages
    group = group or stages

    def move(kind: str, at: int) -> Part:
        before, within = divmod(at, group * parts)
        part, turn = divmod(within, group)
        return Part(kind, before * group + turn, part if kind == FORWARD else parts - 1 - part)

    ahead = total if whole else min(total, 2 * (stages - stage - 1) + (parts - 1) * group)
    moves = [move(FORWARD, i) for i in range(ahead)]
    for i in range(total):
        if ahead + i < total:
            moves.append(move(FORWARD, ahead + i))
        moves.append(move(BACKWARD, i))
    return tuple(moves)


def micro_batches(schedule: Moves) -> int:
    """How many micro-batches a schedule has."""
    return 1 + max(move.micro_batch for move in schedule)


def in_flight(schedule: Moves) -> int:
    """The most forwards whose backward is still to come, of whichever part: graphs that are alive at a time."""
    alive = most = 0
    for move in schedule:
        alive += 1 if move.kind == FORWARD else -1
        most = max(most, alive)
    return most


def written(schedule: Schedule) -> str:
    """The moves with spaces between them, which `read` reads."""
    return " ".join(str(move) for move in schedule)


def read(text: str) -> Schedule:
    """The schedule that is written so: "F0 F1 B0 B1".

    Raises:
        ConfigError: a word that is no move, or moves that are not one F and then one B of each micro-batch from 0 on.
    """
    moves = []
    for word in text.split():
        kind, number = word[:1], word[1:]
        if kind not in (FORWARD, BACKWARD) or not (number.isascii() and number.isdigit()):
            raise ConfigError(f"schedule = {shown(text)}: {word!r} is no move; allowed are F0, B0, F1, B1 and so on")
        moves.append(Move(kind, int(number)))
    schedule = tuple(moves)
    if not complete(schedule):
        raise ConfigError(
            f"schedule = {shown(text)}: must have one F and after it one B of each micro-batch, numbered from 0 in the "
            "order of their F"
        )
    return schedule


def complete(schedule: Schedule) -> bool:
    """Whether each micro-batch from 0 on has one F, in this order, and one B after it."""
    forwards = [move.micro_batch for move in schedule if move.kind == FORWARD]
    at = {move: i for i, move in enumerate(schedule)}
    return (
        bool(forwards)
        and forwards == list(range(len(forwards)))
        and len(at) == len(schedule) == 2 * len(forwards)
        and all(at.get(Move(BACKWARD, i), -1) > at[Move(FORWARD, i)] for i in forwards)
    )
