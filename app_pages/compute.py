"""The library's answers, remembered: pure functions of frozen configurations, so sessions may share them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import estimator as est
from estimator.config import ConfigError

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.config import ModelConfig, Plan
    from estimator.costs import Cost
    from estimator.estimates import Estimate


@lru_cache(maxsize=256)
def estimated(
    model: ModelConfig, plan: Plan, gpu: str, mfu: float | None, steps: int, global_batch_size: int, count: int
) -> Estimate:
    """`est.estimate`, remembered."""
    return est.estimate(model, plan, gpu, mfu=mfu, steps=steps, global_batch_size=global_batch_size, count=count)


def estimate_of(s: Setup) -> Estimate:
    """The estimate of what the sidebar says.

    Raises:
        ConfigError: the library cannot answer.
    """
    return estimated(s.model, s.plan, s.gpu, s.mfu, s.steps, s.global_batch_size, s.count)


@lru_cache(maxsize=256)
def largest_batch(model: ModelConfig, plan: Plan, gpu: str) -> int:
    """`est.max_batch_size`, remembered."""
    return est.max_batch_size(model, plan, gpu)


def cost_of(s: Setup, seconds: float) -> Cost:
    """What the run costs."""
    return est.cost(s.gpu, seconds, s.count, price=s.price)


__all__ = ["ConfigError", "cost_of", "estimate_of", "estimated", "largest_batch"]
