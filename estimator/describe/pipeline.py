"""What pipeline parallelism goes with: of a plan, and of a model whose blocks are to be dealt to stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe import schedules
from estimator.describe.bundled import BUNDLED, known_with
from estimator.describe.checks import ConfigError
from estimator.describe.schedules import (
    accumulation,
    all_forward_first,
    interleaved,
    one_forward_one_backward,
    rounds,
)
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.describe.schedules import Part, Schedule

ALIKE = 3  # micro-batches that are executed of those that a stage runs ahead, and of those between: the middle one
# stands for all others
GROUPS = 4  # of micro-batches that are executed of interleaved parts
NEEDS = (
    Needs(
        "shared_by",
        ("one accelerator", "none", "zero2"),
        "ZeRO-1 and ZeRO-3 around it are not known",
        say="allowed on several accelerators is sharding none (DDP), zero2",
        where=BUNDLED,
    ),
    *known_with(
        ("gradient_as_bucket_view", (False,)),
        ("shard_group", (None,)),
        ("offload", ("none",)),
        ("autocast", (False,)),
        ("adapter", ("none",)),
        ("trained", ("all",)),
        ("frozen", ("",)),
        ("update", ("after",)),
        ("loss", ("bundled", "torch", "torch-fp32")),
        ("checkpoint_every", (1,)),
        ("precision", ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-fsdp")),
        ("optimizer", ("adamw", "adam", "sgd", "sgd-momentum", "lion")),
    ),
)

VIRTUAL = (
    Needs("implementation", ("bundled", "megatron"), "interleaved stages are not known of {implementation!r}"),
    Needs("pipeline_schedule", ("1f1b",), "parts run 1F1B, and pipeline_schedule is {pipeline_schedule!r}"),
    Needs(
        "shared_by",
        ("one accelerator",),
        "of PyTorch's interleaved schedule data parallelism is not known",
        say="allowed is one accelerator a stage, or several that share its matrices",
        where=BUNDLED,
    ),
    Needs("is_pipeline", (True,), "pipeline_parallel is {pipeline_parallel}", say="allowed above 1"),
)


def check_plan(p: Plan) -> None:
    """Raise ConfigError if the micro-batches of `p` are too few for its stages."""
    if p.pipeline_parallel == 1:
        return
    if p.virtual_stages > 1 and p.implementation == "megatron" and p.grad_accumulation % p.pipeline_parallel:
        raise ConfigError(
            f"grad_accumulation = {p.grad_accumulation}: interleaved stages take a multiple of the "
            f"{p.pipeline_parallel} stages"
        )
    if p.interleaves and p.grad_accumulation % rounds(p.grad_accumulation, p.pipeline_parallel):
        groups = rounds(p.grad_accumulation, p.pipeline_parallel)
        raise ConfigError(
            f"grad_accumulation = {p.grad_accumulation}: PyTorch's ScheduleInterleaved1F1B takes them in {groups} "
            f"groups, one for each {p.pipeline_parallel} stages; allowed is a multiple of {groups}"
        )
    least = least_micro_batches(p)
    if p.shared_by == "none" and p.pipeline_schedule == "gpipe":
        raise ConfigError(
            "pipeline_schedule = 'gpipe': DDP's reducer fails under PyTorch's ScheduleGPipe (an assertion in "
            f"reducer.cpp), and data_parallel is {p.data_parallel}; allowed is 1f1b"
        )
    if p.grad_accumulation < least:
        why = " around which DDP's reducer fails where all forwards come first" if least > p.pipeline_parallel else ""
        raise ConfigError(
            f"grad_accumulation = {p.grad_accumulation}: {p.pipeline_parallel} stages under {p.pipeline_schedule}{why} "
            f"take at least {least} micro-batches; allowed is at least that"
        )


def telling_stages(p: Plan) -> tuple[int, ...]:
    """The stages of which one needs the most memory: the first, the second and the last.

    Each of those between has fewer micro-batches in flight than the one before it.
    """
    last = p.pipeline_parallel - 1
    return tuple(sorted({0, min(1, last), last}))


def least_micro_batches(p: Plan) -> int:
    """The fewest that the schedule takes: 1F1B one for each stage, and one more where DDP is around a stage.

    With as many as stages the first stage runs all forwards first, under which DDP's reducer fails (an assertion in
    torch/csrc/distributed/c10d/reducer.cpp), as it does under GPipe.
    """
    if not p.is_pipeline:
        return 1
    replicated = p.shared_by == "none" and p.implementation == "bundled"
    return p.pipeline_parallel + replicated if p.pipeline_schedule == "1f1b" else 2


def takes(p: Plan, micro_batches: int) -> bool:
    """Whether the schedule of `p` takes so many micro-batches, in place of the plan's."""
    if micro_batches < least_micro_batches(p):
        return False
    if p.interleaves:
        return micro_batches % rounds(micro_batches, p.pipeline_parallel) == 0
    return p.virtual_stages == 1 or micro_batches % p.pipeline_parallel == 0


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if `m` cannot be cut into the stages of `p`."""
    stages, parts = p.pipeline_parallel, m.made_of
    if stages == 1:
        return
    if m.num_layers % stages:
        raise ConfigError(f"pipeline_parallel = {stages}: must divide num_layers, which is {m.num_layers}")
    if p.interleaves and m.num_layers % (stages * p.virtual_stages):
        each = f"{stages} stages of {p.virtual_stages} parts each"
        raise ConfigError(f"num_layers = {m.num_layers}: must be a multiple of {each}")
    other = {
        "tie_embeddings": parts.ends.tied and p.implementation == "bundled",
        "pattern": len(m.rotating_pattern.kinds) > 1,
        "experts": parts.experts is not None,
        "embedding_dim": m.embedding_dim is not None,
    }
    for name, has in other.items():
        if has:
            way = ", or tie_embeddings False" if name == "tie_embeddings" else ""
            raise ConfigError(
                f"pipeline_parallel = {stages}: how {name} is cut into stages is not known; allowed is 1{way}"
            )


def parted(p: Plan, stage: int, micro_batches: int | None = None) -> tuple[Part, ...]:
    """The moves of the parts of a stage under PyTorch's interleaved 1F1B; of so many micro-batches in groups alike."""
    count = p.grad_accumulation
    group = count // rounds(count, p.pipeline_parallel)
    return interleaved(micro_batches or count, stage, p.pipeline_parallel, p.virtual_stages, group)


def schedule(p: Plan, stage: int) -> Schedule:
    """The moves of a stage of one part, numbered from 0."""
    if p.pipeline_schedule == "gpipe":
        return all_forward_first(p.grad_accumulation)
    return one_forward_one_backward(p.grad_accumulation, stage, p.pipeline_parallel)


def in_flight(p: Plan, stage: int) -> int:
    """How many forwards a stage runs before its first backward: so many micro-batches it has alive at the most.

    Of interleaved stages, forwards of their parts: 2 (P - stage - 1) + (v - 1) P + 1, or all of them
    (`get_pp_rank_microbatches` in megatron/core/pipeline_parallel/schedules.py).
    """
    if p.pipeline_schedule == "gpipe":
        return p.grad_accumulation
    if p.interleaves:
        return schedules.in_flight(parted(p, stage))
    if p.virtual_stages > 1:
        ahead = 2 * (p.pipeline_parallel - stage - 1) + (p.virtual_stages - 1) * p.pipeline_parallel + 1
        every = p.grad_accumulation * p.virtual_stages
        return every if p.grad_accumulation == p.pipeline_parallel else min(every, ahead)
    return min(p.grad_accumulation, p.pipeline_parallel - stage)


def executed_parts(p: Plan, stage: int) -> tuple[Part, ...]:
    """The moves that stand for all of those of a stage's interleaved parts: of `GROUPS` micro-batches.

    When the first has gone back through all parts, each part has had a backward, and from then on a group leaves what
    the one before it did.
    """
    if not p.interleaves:
        return ()
    groups = rounds(p.grad_accumulation, p.pipeline_parallel)
    return parted(p, stage, p.grad_accumulation // groups * min(groups, GROUPS))


def executed(p: Plan, stage: int) -> Schedule:
    """The moves that stand for all of a stage's: of the forwards ahead, and of those between, at most `ALIKE`.

    Under 1F1B the send of the last forward but one of those ahead is held until there is no forward left. So it makes a
    difference whether a backward comes after that micro-batch's own and before the last forward.
    """
    if not p.is_pipeline:
        return accumulation(min(p.grad_accumulation, 2))
    if p.interleaves:
        return ()
    own = -(-in_flight(p, stage) // p.virtual_stages)
    ahead, between = min(own, ALIKE), min(max(p.grad_accumulation - own, 0), ALIKE)
    if p.pipeline_schedule == "gpipe":
        return all_forward_first(ahead)
    if p.implementation == "megatron":  # which lets go of what it has sent
        between = min(between, 1)
    elif own > ALIKE and between:
        between = ALIKE if p.grad_accumulation - own > own - 2 else 1
    return one_forward_one_backward(ahead + between, 0, ahead)
