"""What tensor parallelism goes with: of a plan, and of a model whose heads and columns are to be shared out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.bundled import BUNDLED, known_with
from estimator.describe.checks import ConfigError
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

NEEDS = (
    Needs(
        "shared_by",
        ("one accelerator", "zero2", "zero3"),
        "DDP and ZeRO-1 around it are not known",
        say="allowed on several accelerators is sharding zero2, zero3",
        where=BUNDLED,
    ),
    *known_with(
        ("reshard_after_forward", (None,)),
        ("adapter", ("none",)),
        ("trained", ("all",)),
        ("frozen", ("",)),
        ("update", ("after",)),
        ("precision", ("fp32", "tf32", "bf16", "bf16-mixed", "fp16-mixed", "bf16-fsdp")),
        ("optimizer", ("adamw", "adam", "sgd", "sgd-momentum", "lion")),
    ),
)
SEQUENCE = (
    Needs(
        "shares_matrices", (True,), "tensor_parallel is {tensor_parallel}", say="allowed with tensor_parallel above 1"
    ),
)
VOCABULARY = (
    SEQUENCE[0],
    Needs("implementation", ("bundled",), "Megatron's shares it without being asked"),
    Needs("loss", ("torch", "torch-fp32"), "PyTorch's own cross entropy is known of shared logits"),
    *known_with(("pipeline_parallel", (1,)), ("precision", ("fp32", "tf32", "bf16", "bf16-mixed", "bf16-fsdp"))),
)


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if `m`'s heads or columns cannot be shared out as `p` says."""
    ranks, parts = p.tensor_parallel, m.made_of
    if ranks == 1:
        return
    a, mlp = parts.attention, parts.mlp
    other = {
        "attention.latent": a.latent != "none",
        "attention.experts": a.experts,
        "attention.sinks": a.sinks,
        "attention.out_norm": a.out_norm,
        "attention.qk_norm": a.qk_norm in ("width", "head-own"),
        "mlp.down_norm": mlp.down_norm,
        "mlp.activation": mlp.activation == "xielu",
        "experts": parts.experts is not None,
        "positions.kind": parts.positions.kind == "alibi",
    }
    for name, has in other.items():
        if has:
            raise ConfigError(f"tensor_parallel = {ranks}: how {name} is shared out is not known; allowed is 1")
    sizes = {"num_heads": m.num_heads, "num_kv_heads": m.kv_heads, "d_ff": m.f}
    if p.sequence_parallel:
        sizes["seq_len"] = p.tokens(m)  # as parts that `DTensor.from_local` takes to be alike
        if not parts.ends.final_norm:
            raise ConfigError("sequence_parallel = True: is known of models with a final_norm; allowed is False")
    if p.vocabulary_parallel:
        sizes["vocab_size"] = m.vocab_size
        ends = {"embedding_dim": m.embedding_dim is not None, "ends.head_norm": parts.ends.head_norm}
        for name, has in ends.items():
            if has:
                raise ConfigError(f"vocabulary_parallel = True: is not known with {name} of the model")
    for name, size in sizes.items():
        if size % ranks:
            raise ConfigError(f"tensor_parallel = {ranks}: must divide {name}, which is {size}")
