"""What each family of decoders is made of: one entry a `model_type`, from the fields of a config.json to parts and sizes.

Read from the modelling code of transformers 5.24.0. An entry says only what differs from a llama. A value is a constant,
or a rule: a function of the file's `Fields`. A new family takes one entry, of one to six lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import log, sqrt
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError
from estimator.describe.parts import Norm

if TYPE_CHECKING:
    from estimator.describe.fields import Fields

Rule = Callable[["Fields"], Any]
Settings = Mapping[str, Any]  # attribute of a part, or size -> constant or rule


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

    norm: Norm | Rule = Norm()
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


def yes(name: str) -> Rule:
    """Whether the file says so."""
    return lambda c: c.flag(name)


def size(name: str) -> Rule:
    """A positive integer."""
    return lambda c: c.size(name)


def number(name: str) -> Rule:
    """A finite number."""
    return lambda c: c.number(name)


def either(name: str, then: Any, other: Any) -> Rule:
    """One of two, by a flag."""
    return lambda c: then if c.flag(name) else other


def act(name: str) -> Rule:
    """An activation, by the name that files have for it."""
    return lambda c: c.activation(name)


def all_four(name: str) -> dict[str, Rule]:
    """Biases on q, k, v and the output projection, by one flag."""
    return {"bias": yes(name), "out_bias": yes(name)}


def cycle(*kinds: str) -> Rule:
    """Kinds of layers that repeat."""
    return lambda c: [kinds[i % len(kinds)] for i in range(c.layers)]


def last_of(name: str, default: int) -> Rule:
    """Every so many-th layer is full, those before it have a window."""
    return lambda c: ["full" if (i + 1) % c.size(name, default) == 0 else "window" for i in range(c.layers)]


def windows_if_used(c: Fields) -> list[str]:
    """A window in all layers, unless `use_sliding_window` says no (Qwen 3's mixtures of experts)."""
    return [("window" if c.flag("use_sliding_window") else "full")] * c.layers


def upper_windows(c: Fields) -> list[str]:
    """The layers from `max_window_layers` up have a window, if `use_sliding_window` (Qwen 2 and 3)."""
    first = c.count("max_window_layers") if c.flag("use_sliding_window") else c.layers
    return ["full" if i < first else "window" for i in range(c.layers)]


def lower_windows(c: Fields) -> list[str]:
    """Every second of the layers below `max_window_layers`, from the first, has one (Qwen 2's mixtures of experts)."""
    end = c.count("max_window_layers") if c.flag("use_sliding_window") else 0
    return ["full" if i % 2 or i >= end else "window" for i in range(c.layers)]


def with_rope(c: Fields) -> list[bool]:
    """1 for a layer with rotation in `no_rope_layers`, whose name says the opposite; else by their interval."""
    given = c("no_rope_layers")
    if given:
        return [bool(one) for one in c.listed("no_rope_layers", (0, 1))]
    every = c.size("no_rope_layer_interval")
    return [(i + 1) % every != 0 for i in range(c.layers)]


def smollm3_windows(c: Fields) -> list[str]:
    """Layers without rotation have a window, if any have."""
    used = c.flag("use_sliding_window")
    return ["window" if used and not rotary else "full" for rotary in with_rope(c)]


def blocks_of_kinds(c: Fields) -> list[str]:
    """GPT-Neo's [[["global", "local"], 12]]: pairs of kinds and how often they follow each other."""
    names = {"global": "full", "local": "window"}
    given = c("attention_types")
    if given is None:
        return cycle("full", "window")(c)
    try:
        kinds = [names[kind] for block, times in given for _ in range(min(times, c.layers)) for kind in block]
    except (TypeError, ValueError, KeyError):
        kinds = []
    if len(kinds) != c.layers:
        raise ConfigError(
            f"attention_types = {given!r}: must be pairs of kinds (global, local) and how often they repeat, "
            f"{c.layers} layers in all"
        )
    return kinds


def after_first(c: Fields) -> list[bool]:
    """All layers but the first `first_k_dense_replace` have experts."""
    return [i >= c.count("first_k_dense_replace") for i in range(c.layers)]


def every_step(c: Fields) -> list[bool]:
    """Every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step, dense = c.size("decoder_sparse_step"), c.indices("mlp_only_layers")
    return [i not in dense and (i + 1) % step == 0 for i in range(c.layers)]


def at_moe_layers(c: Fields) -> list[bool]:
    """Those that `moe_layers` lists; else every `interleave_moe_layer_step`-th (Llama 4)."""
    if c("moe_layers") is not None:
        return [i in c.indices("moe_layers") for i in range(c.layers)]
    return [(i + 1) % c.size("interleave_moe_layer_step") == 0 for i in range(c.layers)]


def falcon_order(c: Fields) -> str:
    """Two norms side by side in the new decoder, unless told otherwise."""
    if not c.flag("parallel_attn"):
        if c.flag("new_decoder_architecture"):
            raise ConfigError("parallel_attn = False: the new decoder architecture is parallel; allowed is true")
        return "pre"
    norms = c("num_ln_in_parallel_attn")
    return "parallel-two" if norms == 2 or (norms is None and c.flag("new_decoder_architecture")) else "parallel"


def falcon_heads(c: Fields) -> int | None:
    """One key/value head if `multi_query`, `num_kv_heads` in the new decoder."""
    if c.flag("new_decoder_architecture"):
        heads: int | None = c.size_or_none("num_kv_heads")
        return heads
    return 1 if c.flag("multi_query") else None


def latent_scale(c: Fields) -> float:
    """1 / sqrt(width of a query), times the square of yarn's factor for long contexts (Peng et al. 2023)."""
    scale = 1 / sqrt(c.size("qk_nope_head_dim") + c.size("qk_rope_head_dim"))
    yarn = c.rope()
    factor, mscale = yarn.get("factor"), yarn.get("mscale_all_dim")
    if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in (factor, mscale)) and factor > 1:
        scale *= (0.1 * mscale * log(factor) + 1) ** 2
    return scale


def shared_width(c: Fields) -> int | None:
    """So many shared experts side by side are one of so many times the width; None where there are none."""
    shared = c.count("n_shared_experts") if c("n_shared_experts") is not None else 0
    return shared * c.size("moe_intermediate_size") or None


def own_norms(flag: str) -> dict[str, Rule]:
    """Each head its own LayerNorm without bias on queries and keys, by a flag."""
    return {
        "qk_norm": either(flag, "head-own", "none"),
        "qk_norm_kind": either(flag, LN_NO_BIAS, Norm()),
    }


def by_group_limit(c: Fields) -> bool:
    """DeepSeek-V2 chooses among all experts, or within the best groups."""
    method = c("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"topk_method = {method!r}: allowed are greedy, group_limited_greedy")
    return method == "group_limited_greedy"


def if_grouped(name: str) -> Rule:
    """A size that only the choice within groups has."""
    return lambda c: c.size(name) if by_group_limit(c) else None


def normalised_by_sum(c: Fields) -> bool:
    """DBRX divides the weights by their norm of any order; order 1 is their sum, null is not at all."""
    order = c.inside("ffn_config")("moe_normalize_expert_weights")
    if order not in (1, None):
        raise ConfigError(f"moe_normalize_expert_weights = {order!r}: allowed are 1 (their sum) and null")
    return order is not None


def one_for_all(name: str) -> Rule:
    """A number, or a list with one for each layer, which must all be the same."""

    def rule(c: Fields) -> int:
        given = c(name)
        if isinstance(given, list) and len(given) == c.layers and all(one == given[0] for one in given):
            given = given[0]
        return c.as_size(name, given)

    return rule


def in_one_operator(c: Fields) -> str:
    """GPT-2's own spelling of the tanh approximation is eight operators; the bundled model has it in one."""
    name: str = c.activation("activation_function")
    return "gelu_tanh" if name == "gelu_new" else name


def openai_activation(c: Fields) -> str:
    """The first GPT's "gelu" is the tanh approximation."""
    return "gelu_new" if c("afn") == "gelu" else c.activation("afn")


def query_scaling(c: Fields) -> str:
    """Llama 4 scales queries by their position where they are not rotated."""
    return "unrotated" if c.flag("attn_temperature_tuning") else "none"


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


def root_of_d(c: Fields) -> float:
    """What an embedding is multiplied with, so that it is as long as it is wide."""
    return sqrt(c.size("hidden_size"))


def four_d(c: Fields) -> int:
    """Vaswani et al. 2017: the feed-forward is four times as wide as the stream."""
    return 4 * c.size("hidden_size")


def or_four_d(name: str) -> Rule:
    """A size; null means 4 d."""
    return lambda c: c.size_or_none(name) or four_d(c)


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

FAMILIES: dict[str, Family] = {
    "apertus": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head"},
        mlp=PLAIN,
        refused=(("qk_norm", True, QK_NORMED[2]),),
    ),
    "biogpt": Family(
        norm=LN,
        attention={"bias": True, "out_bias": True},
        positions={"kind": "learned", "extra_rows": 2},
        mlp=BIASED,
        ends={"embedding_scale": lambda c: root_of_d(c) if c.flag("scale_embedding") else None},
        free_heads=False,
    ),
    "bitnet": Family(attention=all_four("attention_bias") | {"out_norm": True}, mlp={"down_norm": True}),
    "bloom": Family(
        norm=LN,
        attention=ALL_BIASED,
        positions={"kind": "alibi"},
        mlp=BIASED | {"activation": "gelu_tanh"},
        ends={"embedding_norm": True},
        sizes={"d_ff": four_d},
        free_heads=False,
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
        norm=LN,
        attention={"bias": True, "out_bias": True},
        positions={"kind": "sinusoidal"},
        mlp=BIASED | {"activation": "relu"},
        ends={"embedding_scale": root_of_d, "head_bias": True},
        sizes={"d_ff": size("dff")},
        free_heads=False,
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
        norm=LN,
        order=falcon_order,
        attention=all_four("bias") | {"fused": True},
        positions={"kind": either("alibi", "alibi", "rotary")},
        mlp={"gated": False, "bias": yes("bias"), "activation": act("activation")},
        sizes={"num_kv_heads": falcon_heads, "d_ff": or_four_d("ffn_hidden_size")},
        free_heads=False,
    ),
    "gemma": Family(norm=RMS1, attention=all_four("attention_bias"), mlp={"activation": "gelu_tanh"}, ends=GEMMA),
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
        norm=LN,
        attention=ALL_BIASED,
        positions={"kind": "learned"},
        mlp=BIASED | {"activation": in_one_operator},
        sizes={"d_ff": or_four_d("n_inner")},
        free_heads=False,
        refused=(NO_CROSS, SCALED, *GPT2_SCORES),
    ),
    "gpt_bigcode": Family(
        norm=LN,
        attention=ALL_BIASED,
        positions={"kind": "learned"},
        mlp=BIASED | {"activation": act("activation_function")},
        sizes={"d_ff": or_four_d("n_inner"), "num_kv_heads": either("multi_query", 1, None)},
        free_heads=False,
        refused=(NO_CROSS, SCALED),
    ),
    "gpt_neo": Family(
        norm=LN,
        attention={"out_bias": True, "scale": 1.0},
        positions={"kind": "learned"},
        mlp=BIASED | {"activation": act("activation_function")},
        sizes={"d_ff": or_four_d("intermediate_size")},
        kinds=blocks_of_kinds,
        window="window_size",
        free_heads=False,
    ),
    "gpt_neox": Family(
        norm=LN,
        order=either("use_parallel_residual", "parallel-two", "pre"),
        attention=all_four("attention_bias") | {"fused": True},
        mlp=BIASED,
        partial=True,
        free_heads=False,
    ),
    "gpt_oss": Family(
        attention=all_four("attention_bias") | {"sinks": True},
        experts={"score": "logits", "router_bias": True, "bias": True, "activation": "clamped-swiglu"},
        kinds=cycle("window", "full"),
    ),
    "gptj": Family(
        norm=LN,
        order="parallel",
        positions={"pairs": "neighbours"},
        mlp=BIASED | {"activation": act("activation_function")},
        ends={"head_bias": True},
        sizes={"d_ff": or_four_d("n_inner"), "rotary_dim": lambda c: c.size_or_none("rotary_dim")},
        free_heads=False,
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
    "olmoe": Family(attention=CLIPPED | {"qk_norm": "width"}, experts={"normalised": yes("norm_topk_prob")}),
    "openai-gpt": Family(
        norm=LN,
        order="post-sum",
        attention=ALL_BIASED,
        positions={"kind": "learned"},
        mlp=BIASED | {"activation": openai_activation},
        ends={"final_norm": False},
        sizes={"d_ff": four_d},
        free_heads=False,
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
        norm=LN,
        order=either("use_parallel_residual", "parallel", "pre"),
        attention={"bias": yes("use_qkv_bias")} | own_norms("qk_layernorm"),
        partial=True,
        free_heads=False,
    ),
    "starcoder2": Family(
        norm=LN,
        attention=all_four("use_bias"),
        mlp={"gated": False, "bias": yes("use_bias")},
        kinds=cycle("window"),
    ),
}
