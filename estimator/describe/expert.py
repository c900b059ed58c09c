"""What expert parallelism goes with: of a plan, and of a model whose experts are to be shared out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.bundled import BUNDLED, known_with
from estimator.describe.checks import ConfigError
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

NEEDS = (
    Needs("implementation", ("bundled",), "implementation is {implementation!r}"),
    Needs(
        "shared_by",
        ("one accelerator", "none", "zero2", "zero3"),
        "ZeRO-1 of the other parameters is not known",
        say="allowed is sharding none (DDP), zero2, zero3",
        where=BUNDLED,
    ),
    *known_with(
        ("tensor_parallel", (1,)),
        ("pipeline_parallel", (1,)),
        ("gradient_as_bucket_view", (False,)),
        ("adapter", ("none",)),
        ("trained", ("all",)),
        ("frozen", ("",)),
        ("update", ("after",)),
        ("precision", ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-fsdp")),
        ("shard_group", (None,)),
        ("reshard_after_forward", (None,)),
        ("offload", ("none",)),
        ("optimizer", ("adamw", "adam", "sgd", "sgd-momentum", "lion")),
    ),
)


def check_plan(p: Plan) -> None:
    """Raise ConfigError if the accelerators that share the experts are not those that see different data."""
    if p.expert_parallel not in (1, p.data_parallel):
        raise ConfigError(
            f"expert_parallel = {p.expert_parallel}: those that see different data share the experts, and "
            f"data_parallel is {p.data_parallel}; allowed are 1, {p.data_parallel}"
        )


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if `m`'s experts cannot be shared out as `p` says."""
    ranks, parts = p.expert_parallel, m.made_of
    if ranks == 1:
        return
    if parts.experts is None or m.num_experts is None or m.experts_per_token is None:
        raise ConfigError(f"expert_parallel = {ranks}: the model has no experts; allowed is 1")
    if parts.attention.experts:
        raise ConfigError(f"expert_parallel = {ranks}: how attention.experts is shared out is not known; allowed is 1")
    if m.num_experts % ranks:
        raise ConfigError(f"expert_parallel = {ranks}: must divide num_experts, which is {m.num_experts}")
    pairs = p.batch_size * p.tokens(m) * m.experts_per_token
    if pairs < m.num_experts:
        raise ConfigError(
            f"expert_parallel = {ranks}: a micro-batch sends {pairs} rows to {m.num_experts} experts, and some get "
            "none; allowed are longer or more sequences, or 1"
        )
