"""The library's answers, remembered: pure functions of frozen configurations, so that sessions may share them."""

from __future__ import annotations

import ctypes
import gc
import platform
import time
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from estimator.answers.advice import Advisor
from estimator.answers.estimates import max_batch_size
from estimator.answers.layouts import search
from estimator.answers.plans import plan
from estimator.answers.sweeps import axis_values, reach, sweep
from estimator.pricing.money import Cost, cost

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from app_pages.inputs import Setup
    from estimator.answers.found_layouts import Layouts
    from estimator.answers.plans import Plans
    from estimator.answers.request import Request
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

    Swept = tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.float64]]]


@lru_cache(maxsize=256)
def largest_batch(model: ModelConfig, plan: Plan, gpu: str, global_batch_size: int | None) -> int:
    """`max_batch_size`, remembered."""
    return max_batch_size(model, plan, gpu, global_batch_size=global_batch_size)


SLOW = 1.0  # seconds; without an account to build, advice takes a tenth of that
_ADVISING = Lock()


class Advice(NamedTuple):
    """What a change does: an `advice.Change` without the estimate, which is large to remember.

    Attributes:
        fields: the plan's fields that change, with their new values.
        machine: "gpu" and "count" as far as they change.
        needed: bytes that must be free after it.
        largest: the largest micro-batch that fits after it.
        fits, alters, saves, work, seconds, dollars, size: as in `Change`.
    """

    fields: Mapping[str, Any]
    machine: Mapping[str, Any]
    needed: int
    largest: int
    fits: bool
    alters: bool
    saves: int
    work: float
    seconds: float | None
    dollars: float | None
    size: int


class _ProgressOf:
    """Where the advice that is being computed tells how far it is: the session that waits for it."""

    def __init__(self) -> None:
        self.tell: Callable[[float], object] = lambda _: None


_progress = _ProgressOf()


def changes(
    request: Request, goal: str = "memory", tell: Callable[[float], object] = lambda _: None
) -> tuple[Advice, ...]:
    """`Advisor.improvements` of a request, remembered; one session's at a time, so that the next finds its accounts.

    Args:
        request: what is asked.
        goal: what is better.
        tell: called again and again with how much is done, of 1; it may raise to give up.
    """
    while not _ADVISING.acquire(timeout=0.1):
        tell(0.0)
    try:
        _progress.tell = tell
        return _changes(request, goal)
    finally:
        _ADVISING.release()


def _give_back() -> None:
    """Have glibc return to the system what it keeps of freed memory: else a crowd's peak stays."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@lru_cache(maxsize=256)
def _changes(request: Request, goal: str) -> tuple[Advice, ...]:
    start = time.perf_counter()
    options = {
        name: value for name, value in request.run.items() if name not in ("count", "steps", "global_batch_size")
    }
    advisor = Advisor(request.estimate(), request.global_batch_size, _progress.tell, **options)
    found = tuple(
        Advice(
            c.fields, c.machine, c.estimate.memory.needed, c.largest, c.fits, c.alters, c.saves, c.work, c.seconds,
            c.dollars, c.size,
        )
        for c in advisor.improvements(goal)
    )  # fmt: skip
    if time.perf_counter() - start > SLOW:  # accounts were built: those that had to go for them are cycles
        gc.collect()
        _give_back()
    return found


@lru_cache(maxsize=16)
def planned(asked: tuple[tuple[str, Any], ...]) -> Plans:
    """`estimator.plan` of (argument, value) pairs, remembered."""
    with _ADVISING:
        return plan(**dict(asked))


@lru_cache(maxsize=16)
def laid_out(
    model: ModelConfig, plan: Plan, gpu: str, count: int, global_batch_size: int, price: float | None
) -> Layouts:
    """`estimator.answers.layouts.search`, remembered."""
    with _ADVISING:
        return search(model, plan, gpu, count=count, global_batch_size=global_batch_size, price=price)


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


@lru_cache(maxsize=64)
def reachable(request: Request, axis: str) -> int:
    """`sweeps.reach`, remembered."""
    return reach(request, axis)


@lru_cache(maxsize=8)
def swept(request: Request, ranges: tuple[tuple[str, int, int, int, bool], ...], price: float | None) -> Swept:
    """(the values of each axis, `sweep` over them), remembered; a range is (axis, least, most, points, logarithmic)."""
    axes = {
        name: axis_values(request, name, least, most, points, logarithmic=logarithmic)
        for name, least, most, points, logarithmic in ranges
    }
    return axes, sweep(request, axes, price)
