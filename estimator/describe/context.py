"""What context parallelism goes with: of a plan, and of a model whose sequences are to be shared out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.bundled import known_with
from estimator.describe.checks import ConfigError
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

NEEDS = (
    Needs("implementation", ("bundled",), "implementation is {implementation!r}"),
    *known_with(
        ("tensor_parallel", (1,)),
        ("pipeline_parallel", (1,)),
        ("expert_parallel", (1,)),
        ("adapter", ("none",)),
        ("trained", ("all",)),
        ("frozen", ("",)),
    ),
)


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if `m`'s sequences cannot be shared out as `p` says."""
    ranks, parts = p.context_parallel, m.made_of
    if ranks == 1:
        return
    if p.tokens(m) % ranks:
        raise ConfigError(f"context_parallel = {ranks}: must divide seq_len, which is {p.tokens(m)}")
    for name, has in (
        ("attention.latent", parts.attention.latent != "none"),
        ("attention.experts", parts.attention.experts),
        ("experts", parts.experts is not None),
    ):
        if has:
            raise ConfigError(f"context_parallel = {ranks}: how {name} is shared out is not known; allowed is 1")
