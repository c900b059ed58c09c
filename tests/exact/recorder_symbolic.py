"""What the recorder and the symbolic step say of one step of our own: two ways that share no code."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import estimator as est
from estimator.eager.ledger import Category, Phase
from trainer.referee.first_difference import symbolic_events

if TYPE_CHECKING:
    from collections.abc import Iterable

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from trainer.referee.recorder.recording import Recording

FIGURES = ("peak", "parameters", "parameter bytes", "states", "saved", "events")


def against_symbolic(m: ModelConfig, p: Plan, recording: Recording) -> dict[str, tuple[Any, Any]]:
    """(recorded, symbolic) of each of `FIGURES`: the events are whether all are equal, in runs; the rest are numbers.

    Of events, the symbolic step has two micro-batches for all that follow: with more, they are not compared, nor are
    CUDA's.
    """
    device = recording.account.device
    values = est.account(m, p, device=device).evaluate(m, p)
    setup = sum(e.where.phase is Phase.SETUP for e in recording.ledger.events)
    same = (p.grad_accumulation > 2 or device == "cuda") or runs(recording.account.delta[setup:].tolist()) == runs(
        e.nbytes for e in symbolic_events(m, p)
    )
    return {
        "peak": (recording.peak_bytes, values.peak_bytes),
        "parameters": (recording.parameters, values.parameters),
        "parameter bytes": (recording.bytes_before(Category.PARAMETER), values.parameter_bytes),
        "states": (recording.bytes_before(Category.OPTIMIZER), values.optimizer_bytes),
        "saved": (recording.saved_bytes, values.activation_bytes),
        "events": (same, True),
    }


def runs(events: Iterable[int]) -> list[list[int]]:
    """Bytes of the events, each run of allocations or of frees in order of size: nothing depends on their order."""
    return [sorted(run) for _, run in groupby(events, key=lambda nbytes: nbytes > 0)]
