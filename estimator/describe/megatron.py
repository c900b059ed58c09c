"""What Megatron-LM's way of running a step goes with: of a plan, and of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

NEEDS = tuple(
    Needs(name, known, f"Megatron's implementation is not known with {name} = {{{name}!r}}", values=("megatron",))
    for name, known in (
        ("precision", ("bf16-master",)),
        ("sharding", ("none", "zero1")),
        ("attention", ("naive", "sdpa", "sdpa-flash")),
        ("loss", ("bundled",)),
        ("checkpointing", ("none", "selective", "block")),
        ("checkpoint_every", (1,)),
        ("optimizer", ("adamw", "adam")),
        ("max_grad_norm", (None,)),
        ("gradient_as_bucket_view", (False,)),
        ("trained", ("all",)),
        ("frozen", ("",)),
        ("adapter", ("none",)),
        ("update", ("after",)),
        ("pipeline_schedule", ("1f1b",)),
    )
)


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if `m` has what Megatron's GPT model, as it is executed here, has not."""
    if p.implementation != "megatron":
        return
    parts, why = m.made_of, "Megatron's implementation"
    a, mlp, ends = parts.attention, parts.mlp, parts.ends
    plain = (
        ("order", parts.order, ("pre",)),
        ("attention.latent", a.latent, ("none",)),
        ("attention.qk_norm", a.qk_norm, ("none",)),
        ("attention.softcap", a.softcap, (None,)),
        ("attention.sinks", a.sinks, (False,)),
        ("attention.out_gate", a.out_gate, (False,)),
        ("attention.out_norm", a.out_norm, (False,)),
        ("positions.kind", parts.positions.kind, ("rotary", "learned")),
        ("mlp.down_norm", mlp.down_norm, (False,)),
        ("ends.embedding_norm", ends.embedding_norm, (False,)),
        ("ends.logits_softcap", ends.logits_softcap, (None,)),
        ("ends.head_norm", ends.head_norm, (False,)),
        ("experts", parts.experts is not None, (False,)),
        ("embedding_dim", m.embedding_dim, (None,)),
        ("sliding_window", m.sliding_window, (None,)),
    )
    for name, value, known in plain:
        if value not in known:
            raise ConfigError(f"implementation = 'megatron': {why} is not known with {name} = {value!r} of the model")
    stages = p.pipeline_parallel * p.virtual_stages
    sizes = {
        "num_layers": (m.num_layers, stages, "pipeline_parallel times virtual_stages"),
        "vocab_size": (m.vocab_size, p.tensor_parallel, "tensor_parallel; Megatron pads it"),
    }
    if p.sequence_parallel:
        sizes["seq_len"] = (p.tokens(m), p.tensor_parallel, "tensor_parallel")
    for name, (size, ways, what) in sizes.items():
        if size % ways:
            raise ConfigError(f"{name} = {size}: must be a multiple of {ways} ({what})")
