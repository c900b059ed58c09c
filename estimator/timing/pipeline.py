"""How long a pipeline's step takes: the schedule itself is run, with the seconds of each stage's moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.describe.schedules import FORWARD, all_forward_first, interleaved, rounds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from estimator.describe.schedules import Part, Schedule


class StageTime(NamedTuple):
    """Seconds of one micro-batch in a stage, of sending what comes out onwards and (`back`) back, and of its update."""

    forward: Any
    backward: Any
    send: Any
    update: Any
    back: Any = 0.0


class Bar(NamedTuple):
    """A move of a stage in the step: from when to when, in seconds."""

    stage: int
    move: str
    start: float
    end: float


def simulated(schedules: Sequence[Schedule], times: Sequence[StageTime]) -> list[Bar]:
    """Every move of every stage: each waits for the stage's move before it, and for what it is sent.

    Args:
        schedules: of each stage, its moves in order.
        times: of each stage.

    Raises:
        ValueError: the stages wait for one another.
    """
    last = len(schedules) - 1
    done: dict[tuple[int, str, int], float] = {}
    at, free = [0] * len(schedules), [0.0] * len(schedules)
    bars: list[Bar] = []
    while any(i < len(moves) for i, moves in zip(at, schedules, strict=True)):
        before = len(bars)
        for stage, moves in enumerate(schedules):
            while at[stage] < len(moves):
                kind, turn = move = moves[at[stage]]
                onwards = kind == FORWARD
                source = stage - 1 if onwards else stage + 1
                ready = 0.0
                if 0 <= source <= last:
                    sent = done.get((source, kind, turn))
                    if sent is None:
                        break
                    ready = sent + (times[source].send if onwards else times[source].back)
                start = max(free[stage], ready)
                free[stage] = start + (times[stage].forward if onwards else times[stage].backward)
                done[stage, kind, turn] = free[stage]
                bars.append(Bar(stage, str(move), start, free[stage]))
                at[stage] += 1
        if len(bars) == before:
            raise ValueError("the stages' schedules wait for one another")
    return bars + [Bar(stage, "update", free[stage], free[stage] + spent.update) for stage, spent in enumerate(times)]


def simulated_parts(count: int, parts: int, times: Sequence[StageTime], *, in_rounds: bool = False) -> list[Bar]:
    """`simulated` of interleaved 1F1B, each stage having so many parts, of a micro-batch's seconds each the same part.

    What the first stage takes longer than another belongs to its first part, and the last's to its last. `in_rounds`
    is PyTorch's schedule, else it is Megatron's.
    """
    stages = len(times)
    last = stages - 1
    least = StageTime(*(min(column) for column in zip(*times, strict=True)))
    group = count // rounds(count, stages) if in_rounds else None
    schedules = [interleaved(count, stage, stages, parts, group) for stage in range(stages)]

    def seconds(stage: int, move: Part) -> float:
        own, base = (getattr(t, "forward" if move.kind == FORWARD else "backward") for t in (times[stage], least))
        ends = {0: 0, last: parts - 1}
        if stage in ends:
            return float(base / parts + (own - base if move.part == ends[stage] else 0.0))
        return float(own / parts)

    def source(stage: int, move: Part) -> tuple[int, int] | None:
        onwards = move.kind == FORWARD
        before, part = (stage - 1, move.part) if onwards else (stage + 1, move.part)
        if 0 <= before <= last:
            return before, part
        wrapped = (last, part - 1) if onwards else (0, part + 1)
        return wrapped if 0 <= wrapped[1] < parts else None

    done: dict[tuple[int, Part], float] = {}
    at, free = [0] * stages, [0.0] * stages
    bars: list[Bar] = []
    while any(i < len(moves) for i, moves in zip(at, schedules, strict=True)):
        before = len(bars)
        for stage, moves in enumerate(schedules):
            while at[stage] < len(moves):
                move = moves[at[stage]]
                ready, wanted = 0.0, source(stage, move)
                if wanted is not None:
                    sent = done.get((wanted[0], move._replace(part=wanted[1])))
                    if sent is None:
                        break
                    ready = sent + (times[wanted[0]].send if move.kind == FORWARD else times[wanted[0]].back)
                start = max(free[stage], ready)
                free[stage] = done[stage, move] = start + seconds(stage, move)
                bars.append(Bar(stage, str(move), start, free[stage]))
                at[stage] += 1
        if len(bars) == before:
            raise ValueError("the stages' schedules wait for one another")
    return bars + [Bar(stage, "update", free[stage], free[stage] + spent.update) for stage, spent in enumerate(times)]


def finished(
    kind: str, counts: NDArray[np.int64], times: StageTime, parts: int = 1, *, in_rounds: bool = False
) -> NDArray[np.float64]:
    """(stages, points): when each stage's update is over; the last entry of `simulated`, for many steps at once.

    Args:
        kind: "1f1b", "gpipe" or "interleaved".
        counts: (points,), micro-batches of each step, at least as many as there are stages under 1F1B.
        times: (stages, points) each.
        parts: of a stage that is interleaved.
        in_rounds: as for `simulated_parts`.
    """
    if kind != "1f1b":
        found = [_simulated_ends(int(n), times, at, parts, in_rounds) for at, n in enumerate(counts.tolist())]
        return np.stack(found, axis=1)
    stages = len(times.forward)
    index = np.arange(stages)[:, None]
    # What a forward adds that only passes through the stages from the first on.
    through = (times.forward + np.concatenate([np.zeros_like(times.send[:1]), times.send[:-1]])).cumsum(0)
    free, behind = np.zeros(times.forward.shape), np.full(times.forward.shape, -np.inf)
    for turn in range(int(counts.max()) + stages):
        ready = np.concatenate([behind[1:] + times.back[1:], np.full_like(behind[:1], -np.inf)])
        mine = turn - (stages - index)  # the micro-batch whose backward each stage runs now
        runs = (mine >= 0) & (mine < counts)
        behind = np.where(runs, np.maximum(free, ready) + times.backward, behind)
        free = np.where(runs, behind, free)
        ends = np.maximum.accumulate(free + times.forward - through, 0) + through
        free = np.where(turn < counts, ends, free)
    return free + times.update


def _simulated_ends(count: int, times: StageTime, point: int, parts: int, in_rounds: bool) -> list[float]:
    stages = len(times.forward)
    each = [StageTime(*(float(x[stage, point]) for x in times)) for stage in range(stages)]
    whole = [all_forward_first(count)] * stages
    bars = simulated(whole, each) if parts == 1 else simulated_parts(count, parts, each, in_rounds=in_rounds)
    return [bar.end for bar in bars[-stages:]]
