"""What each family of decoders is made of: one entry a `model_type`; see `estimator.describe.family`."""

from __future__ import annotations

from estimator.describe.family import (
    ALL_BIASED,
    BIASED,
    CLIPPED,
    COHERE,
    GEMMA,
    GEMMA2,
    GEMMA2_SCALE,
    GLM,
    GPT2_SCORES,
    GRANITE,
    LATENT,
    LATENT_SIZES,
    LEARNED,
    LN,
    LN1,
    LN_NO_BIAS,
    MPT_REFUSED,
    NO_BIASES,
    NO_CROSS,
    OLD,
    PLAIN,
    QK_NORMED,
    RMS1,
    SCALED,
    Family,
    own_norms,
)
from estimator.describe.hub import HUB
from estimator.describe.mixtures import MIXTURES
from estimator.describe.parts import Norm
from estimator.describe.rules import (
    act,
    all_four,
    blocks_of_kinds,
    cycle,
    either,
    exaone_windows,
    falcon_heads,
    falcon_order,
    four_d,
    gemma_activation,
    in_one_operator,
    in_windows,
    in_windows_only,
    last_of,
    logits_of_base,
    number,
    openai_activation,
    or_four_d,
    residual_of_depth,
    root_of_d,
    size,
    smollm3_windows,
    upper_windows,
    with_rope,
    with_rope_of_its_kind,
    with_theta,
    yes,
)

DENSE: dict[str, Family] = {
    "apertus": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head"},
        mlp=PLAIN,
        refused=(("qk_norm", True, QK_NORMED[2]),),
    ),
    "apertus1p5_text": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head"},
        mlp=PLAIN,
        refused=(
            ("qk_norm", True, QK_NORMED[2]),
            ("output_vocab_size", None, "the head would have other rows than the embedding"),
        ),
    ),
    "arcee": Family(attention=all_four("attention_bias"), mlp={"gated": False, "bias": yes("mlp_bias")}),
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
    "codegen": Family(
        **OLD,
        order="parallel",
        attention={"fused": True},
        positions={"pairs": "neighbours"},
        mlp=BIASED | {"activation": act("activation_function")},
        ends={"head_bias": True},
        sizes={"d_ff": or_four_d("n_inner")},
        partial=True,
    ),
    "cohere": Family(**COHERE, attention=all_four("attention_bias") | own_norms("use_qk_norm")),
    "cohere2": Family(
        **COHERE,
        attention=all_four("attention_bias"),
        kinds=last_of("sliding_window_pattern", 4),
        rotates=in_windows_only,
    ),
    "cohere_compass_text": Family(
        **COHERE | {"positions": {}, "ends": {"logits_scale": lambda c: c.number_or_none("logit_scale") or 1.0}},
        attention=all_four("attention_bias"),
        kinds=cycle("full"),
        rotates=with_rope_of_its_kind,
        free_heads=False,
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
    "ernie4_5": Family(
        attention=all_four("use_bias"), positions={"pairs": "neighbours"}, mlp={"bias": yes("use_bias")}
    ),
    "exaone": Family(attention=all_four("attention_bias"), mlp={"bias": yes("mlp_bias")}),
    "exaone4": Family(order="post", attention={"qk_norm": "head"}, kinds=exaone_windows, rotates=in_windows),
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
    "granite_swa": Family(
        **GRANITE | {"attention": GRANITE["attention"] | {"sinks": True}},
        mlp={"bias": yes("mlp_bias")},
        kinds=cycle("full", "window", "window", "window"),
        rotates=with_theta,
    ),
    "helium": Family(
        attention={"bias": yes("attention_bias")},
        positions={"pairs": "neighbours"},
        mlp={"bias": yes("mlp_bias")},
        free_heads=False,
    ),
    "hunyuan_v1_dense": Family(
        attention=all_four("attention_bias") | {"qk_norm": "head", "qk_norm_late": True},
        refused=(QK_NORMED, *NO_BIASES[1:]),
    ),
    "hyperclovax": Family(
        order=either("use_post_norm", "sandwich", "pre"),
        attention=all_four("attention_bias") | {"scale": lambda c: c.number_or_none("attention_multiplier")},
        residual_scale=number("residual_multiplier"),
        mlp={"bias": yes("mlp_bias")},
        ends={"embedding_scale": number("embedding_multiplier"), "logits_scale": number("logits_scaling")},
    ),
    "internlm3": Family(attention=all_four("attention_bias"), mlp={"bias": yes("mlp_bias")}),
    "iquestcoder": Family(
        attention=all_four("attention_bias"),
        mlp={"bias": yes("mlp_bias")},
        refused=(("clip_qkv", None, "the family's class clamps nothing"),),
    ),
    "jais2": Family(norm=LN, attention=all_four("attention_bias"), mlp={"gated": False, "bias": yes("mlp_bias")}),
    "llama": Family(attention=all_four("attention_bias"), mlp={"bias": yes("mlp_bias")}),
    "minicpm3": Family(
        attention=LATENT,
        residual_scale=residual_of_depth,
        mlp={"bias": yes("mlp_bias")},
        ends={"embedding_scale": number("scale_emb"), "logits_scale": logits_of_base},
        sizes=LATENT_SIZES
        | {"value_dim": lambda c: c.size("v_head_dim", c.size("hidden_size") // c.size("num_attention_heads"))},
    ),
    "ministral": Family(kinds=cycle("window"), refused=NO_BIASES),
    "ministral3": Family(attention={"query_scaling": "all"}, kinds=cycle("window"), refused=NO_BIASES),
    "mistral": Family(kinds=cycle("window"), refused=NO_BIASES),
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
    "nanochat": Family(
        norm=Norm(weight="none"),
        attention=all_four("attention_bias")
        | {"qk_norm": "head", "qk_norm_kind": Norm(weight="none"), "qk_norm_late": True},
        mlp=PLAIN,
        ends={"embedding_norm": True, "logits_softcap": lambda c: c.number_or_none("final_logit_softcapping")},
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
    "persimmon": Family(
        **OLD,
        attention=ALL_BIASED
        | {"qk_norm": either("qk_layernorm", "head", "none"), "qk_norm_kind": either("qk_layernorm", LN, Norm())},
        mlp=BIASED,
        partial=True,
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
    "qwen2": Family(attention={"bias": True}, kinds=upper_windows),
    "qwen3": Family(attention=all_four("attention_bias") | {"qk_norm": "head"}, kinds=upper_windows),
    "seed_oss": Family(
        attention={"bias": yes("attention_bias"), "out_bias": yes("attention_out_bias")}, mlp={"bias": yes("mlp_bias")}
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
    "vaultgemma": Family(
        norm=RMS1,
        attention=all_four("attention_bias") | GEMMA2_SCALE,
        mlp={"activation": act("hidden_activation")},
        ends=GEMMA2,
        kinds=cycle("window", "full"),
    ),
    "xglm": Family(
        **OLD,
        attention={"bias": True, "out_bias": True},
        positions={"kind": "sinusoidal"},
        mlp=BIASED | {"activation": act("activation_function")},
        ends={"embedding_scale": lambda c: root_of_d(c) if c.flag("scale_embedding") else None},
        sizes={"d_ff": size("ffn_dim")},
        refused=(NO_CROSS,),
    ),
    "youtu": Family(
        attention=LATENT,
        positions={"pairs": either("rope_interleave", "neighbours", "halves")},
        sizes=LATENT_SIZES,
    ),
}

# Families whose class is another's: by how they are published, the one that is read.
SAME_CLASS = {"gpt-sw3": "gpt2"}
DENSE |= {name: DENSE[family] for name, family in SAME_CLASS.items()}

FAMILIES = dict(sorted((DENSE | MIXTURES | HUB).items(), key=lambda entry: entry[0].lower()))


def family_groups() -> dict[str, list[str]]:
    """The names of all families, by what they are."""
    return {
        "dense": sorted(DENSE),
        "with experts": sorted(MIXTURES),
        "whose classes came with their weights": sorted(HUB, key=str.lower),
    }
