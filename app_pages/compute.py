"""The library's answers, remembered: pure functions of frozen configurations, so that sessions may share them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from estimator.advice import Change, advice
from estimator.costs import Cost, cost
from estimator.estimates import max_batch_size

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.config import ModelConfig, Plan
    from estimator.report import Request


@lru_cache(maxsize=256)
def largest_batch(model: ModelConfig, plan: Plan, gpu: str) -> int:
    """`max_batch_size`, remembered."""
    return max_batch_size(model, plan, gpu)


@lru_cache(maxsize=64)
def changes(request: Request) -> tuple[Change, ...]:
    """`advice` on a request, remembered."""
    return advice(request.estimate())


def cost_of(s: Setup) -> Cost | None:
    """What the run costs; None without a time."""
    time = s.request.estimate().time
    return None if time is None else cost(s.request.gpu, time.seconds, s.request.count, price=s.price)
