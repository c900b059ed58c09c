"""What each family of decoders is made of: one entry a `model_type`, from the fields of a file to parts and sizes.

Read from the modelling code of transformers 5.24.0. An entry says only what differs from a llama. A value is a
constant, or a rule: a function of the file's `Fields`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from estimator.describe.parts import Norm
from estimator.describe.rules import (
    Rule,
    act,
    after_first,
    all_four,
    at_moe_layers,
    blocks_of_kinds,
    by_group_limit,
    cycle,
    either,
    every_step,
    falcon_heads,
    falcon_order,
    four_d,
    gemma_activation,
    if_grouped,
    in_one_operator,
    last_of,
    latent_scale,
    lower_windows,
    normalised_by_sum,
    number,
    one_for_all,
    openai_activation,
    or_four_d,
    query_scaling,
    root_of_d,
    shared_width,
    size,
    smollm3_windows,
    upper_windows,
    windows_if_used,
    with_rope,
    yes,
)

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
    "corrected": True,
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

FAMILIES: dict[str, Family] = {
    "apertus": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head"},
        mlp=PLAIN,
        refused=(("qk_norm", True, QK_NORMED[2]),),
    ),
    "biogpt": Family(
        **OLD,
        attention={"bias": True, "out_bias": True},
        positions={"kind": "learned", "extra_rows": 2},
        mlp=BIASED,
        ends={"embedding_scale": lambda c: root_of_d(c) if c.flag("scale_embedding") else None},
    ),
    "bitnet": Family(
        attention=all_four("attention_bias") | {"out_norm": True}, mlp={"down_norm": True}, free_heads=False
    ),
    "bloom": Family(
        **OLD,
        attention=ALL_BIASED,
        positions={"kind": "alibi"},
        mlp=BIASED | {"activation": "gelu_tanh"},
        ends={"embedding_norm": True},
        sizes={"d_ff": four_d},
        refused=(("apply_residual_connection_post_layernorm", False, "the stream would start anew at each norm"),),
    ),
    "cohere": Family(**COHERE, attention=all_four("attention_bias") | own_norms("use_qk_norm")),
    "cohere2": Family(
        **COHERE,
        attention=all_four("attention_bias"),
        kinds=last_of("sliding_window_pattern", 4),
        rotates=lambda c: [kind == "window" for kind in c.kinds],
    ),
    "ctrl": Family(
        **OLD,
        attention={"bias": True, "out_bias": True},
        positions={"kind": "sinusoidal"},
        mlp=BIASED | {"activation": "relu"},
        ends={"embedding_scale": root_of_d, "head_bias": True},
        sizes={"d_ff": size("dff")},
    ),
    "cwm": Family(mlp={"bias": yes("mlp_bias")}, kinds=cycle("full", "window", "window", "window")),
    "dbrx": Family(
        norm=LN_NO_BIAS,
        attention={"fused": True, "clip": lambda c: c.inside("attn_config").number_or_none("clip_qkv")},
        experts={
            "normalised": normalised_by_sum,
            "activation": lambda c: c.inside("ffn_config").inside("ffn_act_fn").activation("name"),
        },
        sizes={
            "num_kv_heads": lambda c: c.inside("attn_config").size("kv_n_heads"),
            "d_expert": lambda c: c.inside("ffn_config").size("ffn_hidden_size"),
            "num_experts": lambda c: c.inside("ffn_config").size("moe_num_experts"),
            "experts_per_token": lambda c: c.inside("ffn_config").size("moe_top_k"),
        },
        free_heads=False,
        refused=(("tie_word_embeddings", False, "the family's class has a head of its own"),),
    ),
    "deepseek_v2": Family(
        attention=LATENT,
        positions={"pairs": "neighbours"},
        experts=GROUPED | {"score": "softmax", "corrected": False, "normalised": False, "grouped": by_group_limit},
        sizes=LATENT_SIZES
        | GROUP_SIZES
        | {"expert_groups": if_grouped("n_group"), "groups_per_token": if_grouped("topk_group")},
        sparse=after_first,
        refused=(
            EVERY_LAYER,
            ("scoring_func", "softmax", "the family's router has a softmax"),
            ("mlp_bias", False, "the shared experts would have biases too"),
        ),
    ),
    "deepseek_v3": Family(
        attention=LATENT,
        positions={"pairs": either("rope_interleave", "neighbours", "halves")},
        experts=GROUPED,
        sizes=LATENT_SIZES | GROUP_SIZES,
        sparse=after_first,
        refused=(EVERY_LAYER, ("scoring_func", "sigmoid", "the family's router has sigmoids")),
    ),
    "ernie4_5": Family(
        attention=all_four("use_bias"), positions={"pairs": "neighbours"}, mlp={"bias": yes("use_bias")}
    ),
    "falcon": Family(
        **OLD,
        order=falcon_order,
        attention=all_four("bias") | {"fused": True},
        positions={"kind": either("alibi", "alibi", "rotary")},
        mlp={"gated": False, "bias": yes("bias"), "activation": act("activation")},
        sizes={"num_kv_heads": falcon_heads, "d_ff": or_four_d("ffn_hidden_size")},
    ),
    "gemma": Family(norm=RMS1, attention=all_four("attention_bias"), mlp={"activation": gemma_activation}, ends=GEMMA),
    "gemma2": Family(
        norm=RMS1,
        order="sandwich",
        attention=all_four("attention_bias") | GEMMA2_SCALE,
        mlp={"activation": act("hidden_activation")},
        ends=GEMMA2,
        kinds=cycle("window", "full"),
    ),
    "gemma3_text": Family(
        norm=RMS1,
        order="sandwich",
        attention=all_four("attention_bias") | GEMMA2_SCALE | {"qk_norm": "head", "qk_norm_kind": RMS1},
        mlp={"activation": act("hidden_activation")},
        ends=GEMMA2,
        kinds=last_of("sliding_window_pattern", 6),
    ),
    "glm": Family(**GLM),
    "glm4": Family(**GLM, order="sandwich"),
    "glm4_moe": Family(
        attention={"bias": yes("attention_bias"), "qk_norm": either("use_qk_norm", "head", "none")},
        experts=GROUPED,
        sizes=GROUP_SIZES,
        sparse=after_first,
        partial=True,
    ),
    "gpt2": Family(
        **LEARNED,
        attention=ALL_BIASED,
        mlp=BIASED | {"activation": in_one_operator},
        sizes={"d_ff": or_four_d("n_inner")},
        refused=(NO_CROSS, SCALED, *GPT2_SCORES),
    ),
    "gpt_bigcode": Family(
        **LEARNED,
        attention=ALL_BIASED,
        mlp=BIASED | {"activation": act("activation_function")},
        sizes={"d_ff": or_four_d("n_inner"), "num_kv_heads": either("multi_query", 1, None)},
        refused=(NO_CROSS, SCALED),
    ),
    "gpt_neo": Family(
        **LEARNED,
        attention={"out_bias": True, "scale": 1.0},
        mlp=BIASED | {"activation": act("activation_function")},
        sizes={"d_ff": or_four_d("intermediate_size")},
        kinds=blocks_of_kinds,
        window="window_size",
    ),
    "gpt_neox": Family(
        **OLD,
        order=either("use_parallel_residual", "parallel-two", "pre"),
        attention=all_four("attention_bias") | {"fused": True},
        mlp=BIASED,
        partial=True,
    ),
    "gpt_oss": Family(
        attention=all_four("attention_bias") | {"sinks": True},
        experts={"score": "logits", "router_bias": True, "bias": True, "activation": "clamped-swiglu"},
        kinds=cycle("window", "full"),
    ),
    "gptj": Family(
        **OLD,
        order="parallel",
        positions={"pairs": "neighbours"},
        mlp=BIASED | {"activation": act("activation_function")},
        ends={"head_bias": True},
        sizes={"d_ff": or_four_d("n_inner")},
        partial=True,
    ),
    "granite": Family(**GRANITE, mlp={"bias": yes("mlp_bias")}),
    "granitemoe": Family(**GRANITE, experts={"score": "logits"}),
    "hunyuan_v1_moe": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head", "qk_norm_late": True},
        experts={"shared": "plain"},
        sizes={
            "num_experts": one_for_all("num_experts"),
            "experts_per_token": one_for_all("moe_topk"),
            "d_shared": size("intermediate_size"),
        },
        refused=(QK_NORMED, *NO_BIASES[1:]),
    ),
    "jetmoe": Family(
        attention={"experts": True, "fused": True},
        experts={"score": "logits", "out_bias": True, "activation": act("activation_function")},
        sizes={
            "num_heads": lambda c: c.size("num_key_value_heads") * c.size("num_experts_per_tok"),
            "head_dim": size("kv_channels"),
        },
    ),
    "llama": Family(attention=all_four("attention_bias"), mlp={"bias": yes("mlp_bias")}),
    "llama4_text": Family(
        attention=all_four("attention_bias") | LLAMA4_NORM | {"query_scaling": query_scaling},
        positions={"pairs": "neighbours"},
        experts={"score": "sigmoid-all", "shared": "plain"},
        sizes={"d_ff": size("intermediate_size_mlp"), "d_shared": size("intermediate_size")},
        kinds=lambda c: ["chunk" if rotary else "full" for rotary in with_rope(c)],
        window="attention_chunk_size",
        rotates=with_rope,
        sparse=at_moe_layers,
    ),
    "minimax_m2": Family(
        attention={"qk_norm": "width"},
        experts={"score": "sigmoid", "corrected": True},
        partial=True,
        refused=(QK_NORMED, ("shared_intermediate_size", 0, "the family's class has no shared expert"), *NO_BIASES),
    ),
    "ministral3": Family(attention={"query_scaling": "all"}, kinds=cycle("window"), refused=NO_BIASES),
    "mistral": Family(kinds=cycle("window"), refused=NO_BIASES),
    "mixtral": Family(experts={}, kinds=cycle("window"), refused=NO_BIASES),
    "mpt": Family(
        norm=LN_NO_BIAS,
        attention={
            "fused": True,
            "clip": lambda c: c.inside("attn_config").number_or_none("clip_qkv"),
            "scale": lambda c: c.inside("attn_config").number_or_none("softmax_scale"),
        },
        positions={"kind": "alibi"},
        mlp=PLAIN | {"activation": "gelu"},
        sizes={"d_ff": four_d},
        free_heads=False,
        refused=MPT_REFUSED,
    ),
    "nemotron": Family(
        norm=LN1,
        attention=all_four("attention_bias"),
        mlp={"gated": False, "bias": yes("mlp_bias")},
        partial=True,
    ),
    "olmo": Family(norm=Norm("layer", weight="none"), attention=CLIPPED),
    "olmo2": Family(order="post", attention=all_four("attention_bias") | {"qk_norm": "width"}),
    "olmo3": Family(
        order="post",
        attention=all_four("attention_bias") | {"qk_norm": "width"},
        kinds=cycle("window", "window", "window", "full"),
    ),
    "olmoe": Family(
        attention=CLIPPED | {"qk_norm": "width"}, experts={"normalised": yes("norm_topk_prob")}, free_heads=False
    ),
    "openai-gpt": Family(
        **LEARNED,
        order="post-sum",
        attention=ALL_BIASED,
        mlp=BIASED | {"activation": openai_activation},
        ends={"final_norm": False},
        sizes={"d_ff": four_d},
    ),
    "opt": Family(
        norm=either("layer_norm_elementwise_affine", LN, Norm("layer", weight="none")),
        order=either("do_layer_norm_before", "pre", "post-sum"),
        attention=all_four("enable_bias"),
        positions={"kind": "learned", "extra_rows": 2},
        mlp={"gated": False, "bias": yes("enable_bias"), "activation": act("activation_function")},
        ends={"final_norm": lambda c: c.flag("do_layer_norm_before") and not c("_remove_final_layer_norm")},
        sizes={"d_ff": size("ffn_dim"), "embedding_dim": lambda c: c.size_or_none("word_embed_proj_dim")},
        free_heads=False,
    ),
    "phi": Family(
        norm=LN,
        order="parallel",
        attention={"bias": True, "out_bias": True, "qk_norm": either("qk_layernorm", "head", "none")}
        | {"qk_norm_kind": either("qk_layernorm", LN, Norm())},
        mlp=BIASED,
        ends={"head_bias": True},
        partial=True,
    ),
    "phi3": Family(
        attention={"fused": True}, mlp={"fused": True}, kinds=cycle("window"), partial=True, refused=NO_BIASES
    ),
    "phimoe": Family(
        norm=LN,
        attention=all_four("attention_bias"),
        experts={"score": "sparse-mixer"},
        ends={"head_bias": yes("lm_head_bias")},
        kinds=cycle("window"),
    ),
    "qwen2": Family(attention={"bias": True}, kinds=upper_windows),
    "qwen2_moe": Family(
        attention={"bias": yes("qkv_bias")},
        experts={"normalised": yes("norm_topk_prob"), "shared": "gated"},
        sizes={"d_shared": size("shared_expert_intermediate_size")},
        kinds=lower_windows,
        sparse=every_step,
    ),
    "qwen3": Family(attention=all_four("attention_bias") | {"qk_norm": "head"}, kinds=upper_windows),
    "qwen3_moe": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head"},
        experts={"normalised": yes("norm_topk_prob")},
        kinds=windows_if_used,
        sparse=every_step,
        refused=(("shared_expert_intermediate_size", 0, "the family's class has no shared expert"),),
    ),
    "smollm3": Family(
        attention=all_four("attention_bias"), mlp={"bias": yes("mlp_bias")}, kinds=smollm3_windows, rotates=with_rope
    ),
    "stablelm": Family(
        **OLD,
        order=either("use_parallel_residual", "parallel", "pre"),
        attention={"bias": yes("use_qkv_bias")} | own_norms("qk_layernorm"),
        partial=True,
    ),
    "starcoder2": Family(
        norm=LN,
        attention=all_four("use_bias"),
        mlp={"gated": False, "bias": yes("use_bias")},
        kinds=cycle("window"),
    ),
}
