"""Bytes, FLOPs, hours, dollars and kilowatt-hours of training a Transformer, derived symbolically.

    import estimator as est
    m = est.preset("gpt2-xl")
    p = est.Plan(batch_size=4, attention="sdpa")
    r = est.estimate(m, p, "a100-80gb-sxm", mfu=0.5, steps=400_000, global_batch_size=1024)
    r.memory.peak, r.fits, r.time.hours
    est.account(m, p).peak_bytes          # the formula behind it

Names are loaded when they are first used, so that importing this package takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan

if TYPE_CHECKING:
    from estimator.accounting.accounts import Account, account
    from estimator.answers.estimates import Estimate, estimate, max_batch_size
    from estimator.answers.layouts import layouts
    from estimator.answers.plans import budget, plan
    from estimator.describe.hf import from_hf
    from estimator.describe.presets import preset, presets
    from estimator.hardware.accelerators import Accelerator, accelerator, accelerators
    from estimator.pricing.money import cost
    from estimator.pricing.planning import compute_optimal, tokens_for
    from estimator.studies.assignment import textbook

__version__ = "0.1.0"

_HOME = {
    "Account": "accounting.accounts",
    "account": "accounting.accounts",
    "cost": "pricing.money",
    "Estimate": "answers.estimates",
    "estimate": "answers.estimates",
    "layouts": "answers.layouts",
    "budget": "answers.plans",
    "plan": "answers.plans",
    "max_batch_size": "answers.estimates",
    "Accelerator": "hardware.accelerators",
    "accelerator": "hardware.accelerators",
    "accelerators": "hardware.accelerators",
    "compute_optimal": "pricing.planning",
    "tokens_for": "pricing.planning",
    "from_hf": "describe.hf",
    "preset": "describe.presets",
    "presets": "describe.presets",
    "textbook": "studies.assignment",
}

__all__ = [
    "Accelerator",
    "Account",
    "ConfigError",
    "Estimate",
    "ModelConfig",
    "Plan",
    "accelerator",
    "accelerators",
    "account",
    "budget",
    "compute_optimal",
    "cost",
    "estimate",
    "from_hf",
    "layouts",
    "max_batch_size",
    "plan",
    "preset",
    "presets",
    "textbook",
    "tokens_for",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'estimator' has no attribute {name!r}")
    module = importlib.import_module(f"estimator.{_HOME[name]}")
    # A sub-module may have the name of its function (estimator.accounting.accounts): the function wins.
    for public, home in _HOME.items():
        if home == _HOME[name]:
            globals()[public] = getattr(module, public)
    return globals()[name]
