"""What pipeline parallelism goes with: of a plan, and of a model whose blocks are to be dealt to stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.describe.schedules import all_forward_first, one_forward_one_backward
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.describe.schedules import Schedule

MOST = 128  # micro-batches of a schedule that keeps all in flight: a stage's step is executed with each of them
NEEDS = tuple(
    Needs(name, known, f"it is not known together with {name} = {{{name}!r}}")
    for name, known in (
        ("data_parallel", (1,)),
        ("tensor_parallel", (1,)),
        ("adapter", ("none",)),
        ("trained", ("all",)),
        ("frozen", ("",)),
        ("max_grad_norm", (None,)),
        ("update", ("after",)),
        ("loss", ("bundled", "torch", "torch-fp32")),
        ("checkpoint_every", (1,)),
        ("precision", ("fp32", "tf32", "bf16")),
        ("optimizer", ("adamw", "adam", "sgd", "sgd-momentum", "lion")),
    )
)


def check_plan(p: Plan) -> None:
    """Raise ConfigError if the micro-batches of `p` are too few for its stages, or too many to execute."""
    if p.pipeline_parallel == 1:
        return
    least = p.pipeline_parallel if p.pipeline_schedule == "1f1b" else 2
    if p.grad_accumulation < least:
        raise ConfigError(
            f"grad_accumulation = {p.grad_accumulation}: {p.pipeline_parallel} stages under {p.pipeline_schedule} take "
            f"at least {least} micro-batches; allowed is at least that"
        )
    if executed(p) > MOST:
        raise ConfigError(
            f"grad_accumulation = {p.grad_accumulation}: {p.pipeline_parallel} stages under {p.pipeline_schedule} take "
            f"{executed(p)} micro-batches to be run one by one; allowed are at most {MOST}"
        )


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if `m` cannot be cut into the stages of `p`."""
    stages, parts = p.pipeline_parallel, m.made_of
    if stages == 1:
        return
    if m.num_layers % stages:
        raise ConfigError(f"pipeline_parallel = {stages}: must divide num_layers, which is {m.num_layers}")
    other = {
        "tie_embeddings": parts.ends.tied,
        "pattern": len(m.rotating_pattern.kinds) > 1,
        "experts": parts.experts is not None,
        "embedding_dim": m.embedding_dim is not None,
    }
    for name, has in other.items():
        if has:
            raise ConfigError(f"pipeline_parallel = {stages}: how {name} is cut into stages is not known; allowed is 1")


def schedule(p: Plan, stage: int, micro_batches: int | None = None) -> Schedule:
    """The moves of a stage, numbered from 0, of the plan's micro-batches or of so many."""
    count = p.grad_accumulation if micro_batches is None else micro_batches
    if p.pipeline_schedule == "gpipe":
        return all_forward_first(count)
    return one_forward_one_backward(count, stage, p.pipeline_parallel)


def executed(p: Plan) -> int:
    """How many micro-batches stand for all: under 1F1B those that fill and empty the pipeline, and three between.

    All others do what the three do, when as many are in flight.
    """
    if p.pipeline_schedule == "gpipe":
        return p.grad_accumulation
    return min(p.grad_accumulation, p.pipeline_parallel + 3)
