"""How long a pipeline's step takes: the schedule itself is run, with the seconds of each stage's moves."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from estimator.describe.schedules import FORWARD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.describe.schedules import Schedule


class StageTime(NamedTuple):
    """Seconds of one micro-batch in a stage, of sending what comes out of it, and of its update."""

    forward: float
    backward: float
    send: float
    update: float


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
                    ready = sent + times[source].send
                start = max(free[stage], ready)
                free[stage] = start + (times[stage].forward if onwards else times[stage].backward)
                done[stage, kind, turn] = free[stage]
                bars.append(Bar(stage, str(move), start, free[stage]))
                at[stage] += 1
        if len(bars) == before:
            raise ValueError("the stages' schedules wait for one another")
    return bars + [Bar(stage, "update", free[stage], free[stage] + spent.update) for stage, spent in enumerate(times)]
