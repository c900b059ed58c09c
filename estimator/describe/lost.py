"""What a config.json asks for, and its class does not read: said, since transformers leaves it out in silence."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError, shown
from estimator.describe.parts import Layer, Parts

if TYPE_CHECKING:
    from estimator.describe.fields import Fields

# What a file may ask for that its class may not read: (fields, the values that ask for nothing, what it would be,
# whether the model has it all the same).
Present = Callable[[Parts, tuple[Layer, ...]], bool]
UNREAD: tuple[tuple[tuple[str, ...], tuple[Any, ...], str, Present], ...] = (
    (
        ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        (None, 1, 0),
        "experts",
        lambda parts, _: parts.experts is not None,
    ),
    (
        ("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"),
        (None, 0),
        "a shared expert",
        lambda parts, _: parts.experts is not None and parts.experts.shared != "none",
    ),
    (
        ("first_k_dense_replace",),
        (None, 0),
        "dense layers before those with experts",
        lambda _, layers: not all(layer.sparse for layer in layers),
    ),
    (
        ("use_qk_norm", "qk_layernorm"),
        (None, False),
        "norms on queries and keys",
        lambda parts, _: parts.attention.qk_norm != "none",
    ),
    (
        ("q_lora_rank", "kv_lora_rank"),
        (None, 0),
        "latent attention",
        lambda parts, _: parts.attention.latent != "none",
    ),
    (
        ("attn_logit_softcapping",),
        (None, 0),
        "a soft cap on scores",
        lambda parts, _: parts.attention.softcap is not None,
    ),
    (
        ("final_logit_softcapping",),
        (None, 0),
        "a soft cap on logits",
        lambda parts, _: parts.ends.logits_softcap is not None,
    ),
)


def nothing_lost(kind: str, c: Fields, parts: Parts, layers: tuple[Layer, ...]) -> None:
    """Raise ConfigError if the file asks for a part that its class does not read, and that the model has not."""
    for names, nothing, what, present in UNREAD:
        for name in names:
            if not c.reads(name) and c.raw.get(name) not in nothing and not present(parts, layers):
                raise ConfigError(
                    f"{name} = {shown(c.raw[name])}: {kind}'s class does not read it, so {what} would be lost; allowed "
                    f"is {json.dumps(nothing[-1])}, or another model_type"
                )
