"""Families whose classes came with their weights on the hub, and are in no transformers; see `family`.

Read from the modeling files beside the weights: baichuan-inc/Baichuan-7B and -13B-Base, inclusionAI/Ling-lite and
Ling-mini-2.0, THUDM/chatglm3-6b and glm-4-9b, deepseek-ai/deepseek-moe-16b-base, internlm/internlm-7b and internlm2-7b,
openbmb/MiniCPM-2B-sft-bf16, allenai/OLMo-7B, OrionStarAI/Orion-14B-Base, tiiuae/falcon-7b and -40b as of May 2023,
stabilityai/stablelm-3b-4e1t, Skywork/Skywork-13B-base, xverse/XVERSE-13B, 01-ai/Yi-6B as of November 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError, shown
from estimator.describe.family import EVERY_LAYER, GROUP_SIZES, GROUPED, LN, OLD, RMS, Family
from estimator.describe.parts import Norm
from estimator.describe.rules import (
    after_first,
    all_four,
    either,
    logits_of_base,
    number,
    or_four_d,
    residual_of_depth,
    shared_if_any,
    shared_width,
    size,
    yes,
)

if TYPE_CHECKING:
    from estimator.describe.fields import Fields


def _baichuan_positions(c: Fields) -> str:
    """The 7B has rotary positions and says how many; the 13B has ALiBi, and a length for its tokenizer only."""
    return "rotary" if "max_position_embeddings" in c.raw else "alibi"


BAICHUAN2_ROWS = 125_696  # the two generations share a model_type and differ in their vocabulary, and their head


_shared_of = shared_if_any("num_shared_experts")


def _chatglm_bias(c: Fields) -> bool:
    return c.flag("add_qkv_bias") or c.flag("add_bias_linear")


def _olmo_width(c: Fields) -> int:
    """Gate and up are one matrix of `mlp_hidden_size` rows; null is `mlp_ratio` times d."""
    both = c.size_or_none("mlp_hidden_size") or c.size("mlp_ratio") * c.size("hidden_size")
    if both % 2:
        raise ConfigError(f"mlp_hidden_size = {shown(both)}: gate and up share its rows; must be even")
    return both // 2


def _olmo_norm(c: Fields) -> Norm:
    kinds = {"default": "layer", "low_precision": "layer", "rms": "rms"}
    kind, affine = c("layer_norm_type"), c.flag("layer_norm_with_affine")
    if not isinstance(kind, str) or kind not in kinds:
        raise ConfigError(f"layer_norm_type = {shown(kind)}: allowed are {', '.join(kinds)}")
    bias = kinds[kind] == "layer" and affine and (c.flag("include_bias") or c.flag("bias_for_layer_norm"))
    return Norm(kinds[kind], "plain" if affine else "none", bias=bias)


FALCON: dict[str, Any] = OLD | {
    "attention": all_four("bias") | {"fused": True},
    "positions": {"kind": either("alibi", "alibi", "rotary")},
    "mlp": {"gated": False, "bias": yes("bias"), "activation": "gelu"},
}

HUB: dict[str, Family] = {
    "RefinedWeb": Family(
        **FALCON,
        order="parallel-two",
        sizes={"num_kv_heads": size("n_head_kv"), "d_ff": or_four_d("ffn_hidden_size")},
    ),
    "RefinedWebModel": Family(
        **FALCON,
        order=either("parallel_attn", "parallel", "pre"),
        sizes={"num_kv_heads": either("multi_query", 1, None), "d_ff": or_four_d("ffn_hidden_size")},
    ),
    "Yi": Family(free_heads=False),
    "aquila": Family(free_heads=False),
    "baichuan": Family(
        attention={"fused": True},
        positions={"kind": _baichuan_positions},
        ends={"head_norm": lambda c: c("vocab_size") == BAICHUAN2_ROWS},
        sizes={
            "context_length": lambda c: c.size("max_position_embeddings", c.size("model_max_length")),
        },
        free_heads=False,
    ),
    "bailing_moe": Family(
        attention={"fused": True, "bias": yes("use_qkv_bias"), "out_bias": yes("use_bias")},
        experts={
            "normalised": yes("norm_topk_prob"),
            "shared": lambda c: "plain" if _shared_of(c) else "none",
        },
        ends={"head_norm": yes("norm_head")},
        sizes={"d_shared": _shared_of},
        sparse=after_first,
        refused=(
            ("norm_softmax", False, "the loss would be another"),
            ("use_bias", False, "the experts would have biases too"),
            ("multi_gate", False, "there would be a router for each kind of input"),
        ),
    ),
    "bailing_moe_v2": Family(
        attention={
            "fused": True,
            "bias": yes("use_qkv_bias"),
            "out_bias": yes("use_bias"),
            "qk_norm": either("use_qk_norm", "head", "none"),
        },
        experts=GROUPED | {"shared": lambda c: "plain" if _shared_of(c) else "none"},
        sizes=GROUP_SIZES | {"d_shared": _shared_of},
        sparse=after_first,
        partial=True,
        refused=(
            ("use_bias", False, "the experts would have biases too"),
            ("score_function", "sigmoid", "the family's router has sigmoids"),
            ("use_rmsnorm", True, "the family's class has no other norm"),
        ),
    ),
    "chatglm": Family(
        norm=either("rmsnorm", RMS, LN),
        attention={"fused": True, "bias": _chatglm_bias, "out_bias": yes("add_bias_linear")},
        positions={"pairs": "neighbours"},
        mlp={"fused": True, "bias": yes("add_bias_linear"), "activation": "silu"},
        ends={"final_norm": yes("post_layer_norm")},
        sizes={
            "vocab_size": size("padded_vocab_size"),
            "context_length": size("seq_length"),
            "d_ff": size("ffn_hidden_size"),
            "head_dim": size("kv_channels"),
            "num_kv_heads": lambda c: c.size("multi_query_group_num") if c.flag("multi_query_attention") else None,
        },
        partial=True,
        refused=(
            ("apply_residual_connection_post_layernorm", False, "the stream would start anew at each norm"),
            ("position_encoding_2d", False, "the first ChatGLM has positions of two kinds, and a prefix seen in full"),
            ("pre_seq_len", None, "a prefix that is learned would stand before the text"),
        ),
    ),
    "deepseek": Family(
        attention=all_four("attention_bias"),
        experts={
            "normalised": yes("norm_topk_prob"),
            "shared": lambda c: "plain" if shared_width(c) else "none",
        },
        sizes={"d_shared": shared_width},
        sparse=after_first,
        refused=(EVERY_LAYER, ("scoring_func", "softmax", "the family's router has a softmax")),
    ),
    "hf_olmo": Family(
        norm=_olmo_norm,
        attention={"fused": True, "bias": yes("include_bias"), "out_bias": yes("include_bias")}
        | {"clip": lambda c: c.number_or_none("clip_qkv")},
        positions={"kind": lambda c: "alibi" if c.flag("alibi") else "rotary" if c.flag("rope") else "learned"},
        mlp={"fused": True, "bias": yes("include_bias"), "activation": "silu"},
        ends={"tied": yes("weight_tying")},
        sizes={
            "vocab_size": lambda c: c.size("embedding_size", c.size("vocab_size")),
            "context_length": size("max_sequence_length"),
            "d_ff": _olmo_width,
            "num_kv_heads": lambda c: c.size("n_kv_heads", 1 if c.flag("multi_query_attention") else c.size("n_heads")),
        },
        free_heads=False,
        refused=(
            ("activation_type", "swiglu", "the family's published models have a gate"),
            ("block_type", "sequential", "attention and feed-forward would share their matrices"),
            ("attention_layer_norm", False, "the norms on queries and keys would be of the whole width"),
            ("scale_logits", False, "the logits would be multiplied with 1 / sqrt(d)"),
        ),
    ),
    "internlm": Family(attention=all_four("bias"), free_heads=False),
    "internlm2": Family(attention=all_four("bias") | {"fused": True}),
    "minicpm": Family(
        attention=all_four("attention_bias"),
        residual_scale=residual_of_depth,
        ends={"embedding_scale": number("scale_emb"), "logits_scale": logits_of_base},
        refused=(("num_experts", 0, "it would be MiniCPM-MoE"),),
    ),
    "orion": Family(norm=LN, attention=all_four("attention_bias"), free_heads=False),
    "skywork": Family(free_heads=False),
    "stablelm_epoch": Family(norm=LN, attention={"bias": yes("use_qkv_bias")}, free_heads=False, partial=True),
    "xverse": Family(free_heads=False),
}
