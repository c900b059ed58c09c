"""The library's answers, remembered: pure functions of frozen configurations, so that sessions may share them."""

from __future__ import annotations

import gc
import time
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from estimator.answers.advice import advice
from estimator.answers.estimates import max_batch_size
from estimator.answers.sweeps import axis_values, sweep
from estimator.pricing.money import Cost, cost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from app_pages.inputs import Setup
    from estimator.answers.request import Request
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

    Swept = tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.float64]]]


@lru_cache(maxsize=256)
def largest_batch(model: ModelConfig, plan: Plan, gpu: str) -> int:
    """`max_batch_size`, remembered."""
    return max_batch_size(model, plan, gpu)


SLOW = 1.0  # seconds; without an account to build, advice takes a tenth of that
_ADVISING = Lock()


class Advice(NamedTuple):
    """What a change of the recipe does: an `advice.Change` without the estimate, which is large to remember.

    Attributes:
        fields: the plan's fields that change, with their new values.
        needed: bytes that must be free after it.
        fits, alters, saves, work, seconds: as in `Change`.
    """

    fields: Mapping[str, Any]
    needed: int
    fits: bool
    alters: bool
    saves: int
    work: float
    seconds: float | None


def changes(request: Request, waiting: Callable[[], object] = lambda: None) -> tuple[Advice, ...]:
    """`advice` on a request, remembered; one session's at a time, so that the next finds its accounts ready.

    Args:
        request: what is asked.
        waiting: called again and again while another session's is computed; it may raise to give up.
    """
    while not _ADVISING.acquire(timeout=0.1):
        waiting()
    try:
        return _changes(request)
    finally:
        _ADVISING.release()


@lru_cache(maxsize=256)
def _changes(request: Request) -> tuple[Advice, ...]:
    start = time.perf_counter()
    found = tuple(
        Advice(c.fields, c.estimate.memory.needed, c.fits, c.alters, c.saves, c.work, c.seconds)
        for c in advice(request.estimate())
    )
    if time.perf_counter() - start > SLOW:  # accounts were built: those that had to go for them are cycles
        gc.collect()
    return found


def cost_of(s: Setup) -> Cost | None:
    """What the run costs; None without a time."""
    spent = s.request.estimate().time
    return None if spent is None else cost(s.request.gpu, spent.seconds, s.request.count, price=s.price)


def costs_between(s: Setup) -> tuple[Cost, Cost] | None:
    """What the run costs at either end of its time's interval; the same twice where the MFU was given."""
    spent = s.request.estimate().time
    if spent is None:
        return None
    ends = (spent.interval.low, spent.interval.high) if spent.interval is not None else (spent.seconds, spent.seconds)
    low, high = (cost(s.request.gpu, seconds, s.request.count, price=s.price) for seconds in ends)
    return low, high


@lru_cache(maxsize=8)
def swept(request: Request, ranges: tuple[tuple[str, int, int, int, bool], ...], price: float | None) -> Swept:
    """(the values of each axis, `sweep` over them), remembered; a range is (axis, least, most, points, logarithmic)."""
    axes = {
        name: axis_values(request, name, least, most, points, logarithmic=logarithmic)
        for name, least, most, points, logarithmic in ranges
    }
    return axes, sweep(request, axes, price)
