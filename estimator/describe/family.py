"""What an entry of the table of families says, and what several of them share.

Read from the modelling code of transformers 5.24.0. An entry says only what differs from a llama. A value is a
constant, or a rule: a function of the file's `Fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from estimator.describe.parts import Norm
from estimator.describe.rules import Rule, all_four, either, latent_scale, number, root_of_d, shared_width, size, yes

Settings = Mapping[str, Any]  # attribute of a part, or size -> constant or rule


RMS = Norm()


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What sets a family apart from a llama.

    Attributes:
        norm, order, residual_scale: as in `Parts`.
        attention, positions, mlp, experts, ends: attributes of these parts; `experts` None for a dense family.
        sizes: of the ModelConfig, where the rule of `SIZES` is not the family's.
        kinds: the kind of each layer's attention where the file has no `layer_types`; None where all are full and
            the class knows no other.
        window: the field that says how many tokens a window or chunk has.
        rotates: for each layer, whether positions are rotary there.
        sparse: for each layer, whether it has experts.
        partial: part of a head may be rotated.
        free_heads: the class reads `head_dim`; else a head is d / h wide.
        refused: fields that change the model in a way that no part says: (field, what is allowed, why).
    """

    norm: Norm | Rule = RMS
    order: str | Rule = "pre"
    residual_scale: Rule | None = None
    attention: Settings = field(default_factory=dict)
    positions: Settings = field(default_factory=dict)
    mlp: Settings = field(default_factory=dict)
    experts: Settings | None = None
    ends: Settings = field(default_factory=dict)
    sizes: Settings = field(default_factory=dict)
    kinds: Rule | None = None
    window: str = "sliding_window"
    rotates: Rule = lambda c: [True] * c.layers
    sparse: Rule = lambda c: [True] * c.layers
    partial: bool = False
    free_heads: bool = True
    refused: tuple[tuple[str, Any, str], ...] = ()


RMS1 = Norm(weight="plus-one")
LN = Norm("layer", bias=True)
LN_NO_BIAS = Norm("layer")
LN1 = Norm("layer", "plus-one", bias=True)

PLAIN = {"gated": False}
BIASED = {"gated": False, "bias": True}
ALL_BIASED = {"fused": True, "bias": True, "out_bias": True}
CLIPPED = all_four("attention_bias") | {"clip": lambda c: c.number_or_none("clip_qkv")}
LLAMA4_NORM: dict[str, Any] = {
    "qk_norm": either("use_qk_norm", "head", "none"),
    "qk_norm_kind": either("use_qk_norm", Norm(weight="none"), Norm()),
    "qk_norm_late": yes("use_qk_norm"),
}


def own_norms(flag: str) -> dict[str, Rule]:
    """Each head its own LayerNorm without bias on queries and keys, by a flag."""
    return {
        "qk_norm": either(flag, "head-own", "none"),
        "qk_norm_kind": either(flag, LN_NO_BIAS, Norm()),
    }


NO_CROSS = ("add_cross_attention", False, "the model would have a second attention in each block")
SCALED = ("scale_attn_weights", True, "the family scales its attention scores")
QK_NORMED = ("use_qk_norm", True, "the family's class always has norms on queries and keys")
GPT2_SCORES = (
    ("scale_attn_by_inverse_layer_idx", False, "the blocks would not be alike"),
    ("reorder_and_upcast_attn", False, "the scores would be cast"),
)
MPT_REFUSED = (
    ("no_bias", True, "the family's class has no biases"),
    ("expansion_ratio", 4, "the family's class has a feed-forward of 4 d"),
    ("logit_scale", None, "the family's class leaves logits as they are"),
    ("attn_config.alibi", True, "the family's class has no other positions"),
    ("attn_config.qk_ln", False, "the family's class has no norms on queries and keys"),
    ("attn_config.prefix_lm", False, "a prefix would see itself in full"),
    ("attn_config.attn_type", "multihead_attention", "the family's class has a key/value head for each head"),
)
NO_BIASES = tuple(
    (name, False, "the family has no such bias") for name in ("attention_bias", "mlp_bias", "lm_head_bias")
)
EVERY_LAYER = ("moe_layer_freq", 1, "experts would not be in every layer after the first")

GEMMA: dict[str, Any] = {"embedding_scale": root_of_d}
GEMMA2: dict[str, Any] = GEMMA | {"logits_softcap": lambda c: c.number_or_none("final_logit_softcapping")}
GEMMA2_SCALE: dict[str, Any] = {
    "scale": lambda c: c.number("query_pre_attn_scalar") ** -0.5,
    "softcap": lambda c: c.number_or_none("attn_logit_softcapping"),
}
GRANITE: dict[str, Any] = {
    "attention": all_four("attention_bias") | {"scale": number("attention_multiplier")},
    "residual_scale": number("residual_multiplier"),
    "ends": {
        "embedding_scale": number("embedding_multiplier"),
        "logits_scale": lambda c: 1 / c.number("logits_scaling"),
    },
}
COHERE: dict[str, Any] = {
    "norm": LN_NO_BIAS,
    "order": "parallel",
    "positions": {"pairs": "neighbours"},
    "ends": {"logits_scale": number("logit_scale")},
}
GLM: dict[str, Any] = {
    "attention": {"bias": yes("attention_bias")},
    "positions": {"pairs": "neighbours"},
    "mlp": {"fused": True},
    "partial": True,
}
# DeepSeek-V3's router: sigmoids, a correction where experts are chosen, the best groups first.
GROUPED: dict[str, Any] = {
    "score": "sigmoid",
    "normalised": yes("norm_topk_prob"),
    "correction": "buffer",
    "grouped": True,
    "scaling": number("routed_scaling_factor"),
    "shared": lambda c: "plain" if shared_width(c) else "none",
}
GROUP_SIZES: dict[str, Any] = {
    "expert_groups": size("n_group"),
    "groups_per_token": size("topk_group"),
    "d_shared": shared_width,
}
LATENT_SIZES: dict[str, Any] = {
    "query_rank": lambda c: c.size_or_none("q_lora_rank"),
    "kv_rank": size("kv_lora_rank"),
    "rope_dim": size("qk_rope_head_dim"),
    "nope_dim": size("qk_nope_head_dim"),
    "value_dim": size("v_head_dim"),
    "head_dim": lambda c: c.size("qk_nope_head_dim") + c.size("qk_rope_head_dim"),
}
LATENT: dict[str, Any] = all_four("attention_bias") | {
    "latent": lambda c: "keys" if c("q_lora_rank") is None else "keys-and-queries",
    "scale": latent_scale,
}

OLD: dict[str, Any] = {"norm": LN, "free_heads": False}
LEARNED: dict[str, Any] = OLD | {"positions": {"kind": "learned"}}
# A shared expert whose gate and up are one matrix; 0 is none.
GRANITE_SHARED: dict[str, Any] = {
    "score": "logits",
    "shared": lambda c: "plain" if c.count("shared_intermediate_size") else "none",
    "shared_fused": lambda c: c.count("shared_intermediate_size") > 0,
}
GRANITE_SHARED_SIZE: dict[str, Any] = {"d_shared": lambda c: c.count("shared_intermediate_size") or None}
