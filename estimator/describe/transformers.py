"""How transformers' classes write the parts of a decoder down, and what that is known with.

Read in transformers 5.24 (`src/transformers/models/*/modeling_*.py`), with `use_cache` off as its Trainer has it, and
compared with recordings of those classes: `tests/exact/test_transformers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from estimator.describe.adapters import EXPERTS
from estimator.describe.checks import ConfigError
from estimator.describe.routed import DEEPSEEK, GRANITE, HUNYUAN, MIXTRAL, QWEN, Routed
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

VERSION = "5.24"

NEEDS = tuple(
    Needs(name, known, f"transformers' classes are not known with {name} = {{{name}!r}}", values=("transformers",))
    for name, known in (
        ("loss", ("bundled",)),
        ("checkpointing", ("none", "block")),
        ("balance", (0.0,)),
        ("context_parallel", (1,)),
        ("expert_parallel", (1,)),
        ("tensor_parallel", (1,)),
        ("pipeline_parallel", (1,)),
        ("logits_to_keep", (None,)),
    )
)


@dataclass(frozen=True, slots=True)
class Written:
    """What sets one class apart from another, beyond its parts.

    Attributes:
        decoder: the class whose statements these are, by a name in `estimator.models.hugging_face.classes`.
        norm: an rms norm is "upcast" (in fp32, cast back, then multiplied with the weight: Llama), "upcast-late"
            (multiplied, then cast back: OLMo 2) or "upcast-wide" (with the weight in fp32 too: Helium); one that
            scales by 1 + w is Gemma's. A LayerNorm is one kernel, of a copy in fp32 where it has no weight, or with
            "centred" Cohere's, in operators; with "" it is one kernel whatever it has.
        eager_alone: the class has no other attention.
        checkpoints: the class has gradient checkpointing.
        transposed: its layers are `Conv1D`, whose matrices lie the other way round, and of which peft's LoRA alone is
            known.
        drops: where there is dropout beside that of attention's weights: "attention" and "ffn" (of what comes out, in
            there), "embedding", "added" (of what is added to the stream; of StableLM's feed-forward alone).
        out_first: attention's output projection is registered before the others (Phi-3).
        undropped: the positions with which attention's weights have no dropout (Falcon: rotary).
        queries: when what is projected becomes heads. "each": one after the other (Llama), the norm among it (Qwen3);
            "viewed": all are heads, then normed, then transposed (Cohere); "transposed": all are heads and transposed,
            then normed (Apertus); "whole": all are projected, normed or clamped, then heads (OLMo).
        rotation: "halves" (Llama), "apart" (gpt-oss: halves, by angles of half a head), "neighbours" (GLM: cosines
            repeated), "neighbours-fp32" (ERNIE), "repeated-fp32" (Cohere), "complex" (DeepSeek-V2).
        partial: how a part of a head is rotated: "inside" (the rotation takes it apart, all of a head too: GLM),
            "whole" (likewise, in one expression: Phi-3), "returned" (likewise, as it returns: Nemotron), "before" (the
            attention does: Phi), "" (there are no such heads).
        masks: kinds of attention whose masks are asked for though no layer may have it.
        tables_fp32: cosines and sines stay in fp32 (OLMo).
        tables_by_kind: each kind of layer has cosines and sines of its own (Gemma 3).
        passes_positions: blocks are given the positions' ids, which their checkpoints then keep.
        whole_scale: the embedding's scale is a buffer of an integer (MiniCPM 3).
        divides_hidden: what goes into the head is divided by a number, not its logits multiplied (MiniCPM 3).
        layer: in which order a layer registers what it has.
        late_scale: the embedding is scaled after masks are made: "same" name (Granite's with experts), "apart" (AFMoE,
            which still has a name for the embedding); "" for before.
        packed: masks are made with the positions, in which packed sequences are looked for.
        routed: its mixtures of experts; None if how they are written is not known.
        names_all: what attention and the feed-forward find have names of their own, to a block's end (StableLM).
    """

    decoder: str = "llama"
    norm: str = "upcast"
    undropped: str = ""
    eager_alone: bool = False
    checkpoints: bool = True
    transposed: bool = False
    drops: tuple[str, ...] = ()
    out_first: bool = False
    queries: str = "each"
    rotation: str = "halves"
    partial: str = ""
    masks: tuple[str, ...] = ()
    tables_fp32: bool = False
    tables_by_kind: bool = False
    passes_positions: bool = True
    names_all: bool = False
    whole_scale: bool = False
    divides_hidden: bool = False
    layer: tuple[str, ...] = ("attention", "ffn", "norms")
    late_scale: str = ""
    packed: bool = True
    routed: Routed | None = None


# Decoders with statements of their own.
OLDER: dict[str, Written] = {
    "biogpt": Written("biogpt"),
    "bloom": Written("bloom", eager_alone=True),
    "codegen": Written("codegen", rotation="neighbours", tables_fp32=True),
    "ctrl": Written("ctrl", undropped="sinusoidal", checkpoints=False),
    "falcon": Written("falcon", undropped="rotary"),
    "gpt-sw3": Written("gpt2", transposed=True),
    "gpt2": Written("gpt2", transposed=True),
    "gpt_bigcode": Written("gpt_bigcode"),
    "gpt_neo": Written("gpt_neo", eager_alone=True),
    "gpt_neox": Written("gpt_neox", partial="inside"),
    "gptj": Written("gptj", rotation="neighbours"),
    "mpt": Written("mpt", eager_alone=True),
    "openai-gpt": Written("openai-gpt", eager_alone=True, checkpoints=False, transposed=True),
    "opt": Written("opt", norm=""),
    "persimmon": Written("persimmon", partial="before"),
    "xglm": Written("xglm", eager_alone=True),
}
LLAMA = Written()
WINDOWS = Written(masks=("full",))
COHERE = Written(norm="centred", rotation="repeated-fp32")
OLMO = Written(norm="upcast-late", queries="whole", tables_fp32=True)
GLM = Written(queries="viewed", partial="inside", routed=DEEPSEEK)
# Those with experts or latent attention.
MIXTURES: dict[str, Written] = {
    "aria_text": Written(routed=Routed("chosen", shared="named", whole=("shared",), transposed=True)),
    "axk1": Written(routed=DEEPSEEK),
    "deepseek_v2": Written(rotation="complex", routed=replace(DEEPSEEK, router="limited")),
    "deepseek_v3": Written(routed=DEEPSEEK),
    "ernie4_5_moe": Written(
        rotation="neighbours-fp32",
        tables_fp32=True,
        routed=Routed("ernie4_5_moe", logits="fp32-alone", weights="inputs", shared="first"),
    ),
    "flex_olmo": replace(OLMO, routed=replace(MIXTRAL, weights="logits")),
    "gpt_oss": Written(
        norm="upcast-late",
        rotation="apart",
        masks=("full", "window"),
        packed=False,
        eager_alone=True,
        routed=Routed("gpt_oss", returns_weights=True, transposed=True),
    ),
    "granitemoe": Written(layer=("attention", "norms", "ffn"), late_scale="same", routed=GRANITE),
    "granitemoehybrid": Written(
        passes_positions=False, packed=False, layer=("norms", "ffn", "attention"), routed=GRANITE
    ),
    "granitemoeshared": Written(layer=("attention", "norms", "ffn"), late_scale="same", routed=GRANITE),
    "hunyuan_v1_moe": Written(routed=HUNYUAN),
    "hy_v3": Written(queries="transposed", routed=Routed("hy_v3", logits="fp32", adds_fp32=True)),
    "kolibri1": Written(queries="transposed", masks=("full", "window"), routed=replace(DEEPSEEK, router="kolibri1")),
    "mellum": Written(tables_by_kind=True, routed=QWEN),
    "minimax_m2": Written(queries="whole", partial="inside", routed=Routed("minimax_m2")),
    "cohere2_moe": replace(
        COHERE,
        masks=("full", "window"),
        routed=Routed("cohere2_moe", weights="inputs", shared="named"),
    ),
    "dots1": Written(routed=DEEPSEEK),
    "exaone_moe": Written(queries="transposed", routed=DEEPSEEK),
    "glm4_moe": GLM,
    "glm4_moe_lite": Written(routed=DEEPSEEK),
    "minicpm3": Written(whole_scale=True, divides_hidden=True),
    "mixtral": Written(routed=MIXTRAL),
    "olmoe": Written(queries="whole", routed=replace(MIXTRAL, weights="logits")),
    "qwen2_moe": Written(masks=("full", "window"), routed=replace(MIXTRAL, weights="logits", shared="first")),
    "qwen3_moe": Written(routed=QWEN),
    "sarvam_mla": Written(routed=DEEPSEEK),
    "sarvam_moe": GLM,
    "solar_open": Written(routed=DEEPSEEK),
    "youtu": Written(),
}
# By model_type, or the family that its parts are: the classes that are known.
CLASSES: dict[str, Written] = {
    **OLDER,
    **MIXTURES,
    **dict.fromkeys(("arcee", "bitnet", "exaone", "gemma", "granite", "hunyuan_v1_dense"), LLAMA),
    **dict.fromkeys(("hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "ministral3"), LLAMA),
    **dict.fromkeys(("mistral", "nanochat"), LLAMA),
    "starcoder2": Written(drops=("attention", "ffn", "embedding")),
    **dict.fromkeys(("cwm", "gemma2", "ministral", "qwen2", "qwen3", "smollm3", "vaultgemma"), WINDOWS),
    "cohere": replace(COHERE, queries="viewed"),
    "cohere2": replace(COHERE, masks=("full",)),
    "ernie4_5": Written(rotation="neighbours-fp32", tables_fp32=True),
    "exaone4": Written(queries="transposed", masks=("full",)),
    "gemma3_text": Written(queries="transposed", masks=("full",), tables_by_kind=True),
    "glm": Written(rotation="neighbours", partial="inside"),
    "glm4": Written(rotation="neighbours", partial="inside"),
    "helium": Written(norm="upcast-wide", rotation="neighbours"),
    "nemotron": Written(partial="returned"),
    "olmo": OLMO,
    "olmo2": OLMO,
    "olmo3": replace(OLMO, masks=("full",), tables_by_kind=True),
    "phi": Written("phi", queries="transposed", partial="before"),
    "phi3": Written(partial="whole", drops=("added",), out_first=True),
    "stablelm": Written(queries="whole", partial="before", names_all=True, drops=("added",)),
}


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if the class of `m` is not among those that are known, or not with a part that `m` has."""
    if p.implementation != "transformers":
        return
    if m.family not in CLASSES:
        raise ConfigError(
            f"implementation = 'transformers': how its class for family = {m.family!r} is written is not known; "
            f"allowed are {', '.join(sorted(CLASSES))}; estimate check --hf runs any"
        )
    if CLASSES[m.family].eager_alone and not p.attention.startswith("naive"):
        raise ConfigError(
            f"attention = {p.attention!r}: transformers' class for family = {m.family!r} has eager attention alone; "
            "allowed are naive, naive-fp32"
        )
    if not CLASSES[m.family].checkpoints and p.checkpointing != "none":
        raise ConfigError(
            f"checkpointing = {p.checkpointing!r}: transformers' class for family = {m.family!r} has no checkpoints; "
            "allowed is none"
        )
    if CLASSES[m.family].transposed and (p.adapter == "dora" or p.base_precision != "none"):
        raise ConfigError(
            f"adapter = {p.adapter!r}: layers of transformers' class for family = {m.family!r} are Conv1D; allowed are "
            "none, and lora with base_precision = 'none'"
        )
    parts = m.made_of
    own_heads = parts.attention.qk_norm == "head-own" and m.family == "stablelm"  # one module for each head
    latent, eager = parts.attention.latent, p.attention.startswith("naive")
    if EXPERTS in p.adapter_targets.split(",") and p.adapter != "none":
        raise ConfigError(
            f"adapter_targets = {p.adapter_targets!r}: adapters on stacked experts are not known of transformers' "
            "classes; allowed are its other layers"
        )
    unknown = (
        ("attention.latent", f"{latent}, attention = {p.attention}", latent == "none" or not eager),
        ("attention.out_gate", parts.attention.out_gate, not parts.attention.out_gate),
        ("attention.query_scaling", parts.attention.query_scaling, parts.attention.query_scaling != "unrotated"),
        ("attention.qk_norm", parts.attention.qk_norm, not own_heads),
        ("mlp.activation", parts.mlp.activation, parts.mlp.activation != "xielu"),
        ("experts", parts.experts is not None, parts.experts is None or CLASSES[m.family].routed is not None),
    )
    for name, value, known in unknown:
        if not known:
            raise ConfigError(
                f"implementation = 'transformers': its class for family = {m.family!r} is not known with "
                f"{name} = {value!r} of the model; estimate check --hf runs any"
            )
