"""What DeepSpeed's way of sharing a model out goes with."""

from __future__ import annotations

from estimator.describe.settings import Needs

# runtime/zero/config.py of deepspeed 0.19.8
BUCKET, LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
PREFETCHED = 50_000_000  # elements that ZeRO-3 gathers ahead, at most (stage3_prefetch_bucket_size)
PERSISTENCE = 100_000  # elements up to which ZeRO-3 keeps a parameter whole (stage3_param_persistence_threshold)

NEEDS = tuple(
    Needs(name, known, f"DeepSpeed's implementation is not known with {name} = {{{name}!r}}", values=("deepspeed",))
    for name, known in (
        ("precision", ("bf16-master",)),
        ("fp32_gradients", (False,)),
        ("sharding", ("zero1", "zero2", "zero3")),
        ("shard_group", (None,)),
        ("optimizer", ("adamw", "adam")),
        ("gradient_as_bucket_view", (False,)),
        ("trained", ("all",)),
        ("frozen", ("",)),
        ("adapter", ("none",)),
        ("update", ("after",)),
        ("offload", ("none", "states")),
        ("tensor_parallel", (1,)),
        ("expert_parallel", (1,)),
        ("context_parallel", (1,)),
        ("pipeline_parallel", (1,)),
    )
)
ONLY = (Needs("implementation", ("deepspeed",), "it is known of DeepSpeed's implementation"),)
OF_STAGE_3 = (*ONLY, Needs("sharding", ("zero3",), "sharding is {sharding!r}, and only zero3 takes parameters apart"))
