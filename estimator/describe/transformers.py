"""How transformers' classes write the parts of a decoder down, and what that is known with.

Read in transformers 5.24 (`src/transformers/models/*/modeling_*.py`), with `use_cache` off as its Trainer has it, and
compared with recordings of those classes: `tests/exact/test_transformers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.describe.routed import DEEPSEEK, MIXTRAL, QWEN, Routed
from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

VERSION = "5.24"

NEEDS = tuple(
    Needs(name, known, f"transformers' classes are not known with {name} = {{{name}!r}}", values=("transformers",))
    for name, known in (
        ("attention", ("naive-fp32", "sdpa", "sdpa-flash", "sdpa-math", "sdpa-efficient")),
        ("loss", ("bundled",)),
        ("checkpointing", ("none", "block")),
        ("balance", (0.0,)),
        ("context_parallel", (1,)),
        ("expert_parallel", (1,)),
        ("tensor_parallel", (1,)),
        ("pipeline_parallel", (1,)),
        ("logits_to_keep", (0, None)),
    )
)


@dataclass(frozen=True, slots=True)
class Written:
    """What sets one class apart from another, beyond its parts.

    Attributes:
        norm: an rms norm is "upcast" (in fp32, cast back, then multiplied with the weight: Llama) or "upcast-late"
            (multiplied, then cast back: OLMo 2); one that scales by 1 + w is Gemma's. A LayerNorm is one kernel, or
            with "centred" Cohere's, in operators.
        queries: when what is projected becomes heads. "each": one after the other (Llama), the norm among it (Qwen3);
            "viewed": all are heads, then normed, then transposed (Cohere); "transposed": all are heads and transposed,
            then normed (Apertus); "whole": all are projected, normed or clamped, then heads (OLMo).
        rotation: "halves" (Llama), "neighbours" (GLM: cosines repeated), "neighbours-fp32" (ERNIE), "repeated-fp32"
            (Cohere).
        partial: how a part of a head is rotated: "inside" (the rotation takes it apart, all of a head too: GLM),
            "whole" (likewise, in one expression: Phi-3), "returned" (likewise, as it returns: Nemotron), "before" (the
            attention does: Phi), "" (there are no such heads).
        masks: kinds of attention whose masks are asked for though no layer may have it.
        tables_fp32: cosines and sines stay in fp32 (OLMo).
        tables_by_kind: each kind of layer has cosines and sines of its own (Gemma 3).
        routed: its mixtures of experts.
        names_all: what attention and the feed-forward find have names of their own, to a block's end (StableLM).
    """

    norm: str = "upcast"
    queries: str = "each"
    rotation: str = "halves"
    partial: str = ""
    masks: tuple[str, ...] = ()
    tables_fp32: bool = False
    tables_by_kind: bool = False
    names_all: bool = False
    routed: Routed = MIXTRAL


LLAMA = Written()
WINDOWS = Written(masks=("full",))
COHERE = Written(norm="centred", rotation="repeated-fp32")
OLMO = Written(norm="upcast-late", queries="whole", tables_fp32=True)
# By model_type, or the family that its parts are: the classes that are known.
CLASSES: dict[str, Written] = {
    **dict.fromkeys(("arcee", "bitnet", "exaone", "gemma", "granite", "granitemoehybrid", "hunyuan_v1_dense"), LLAMA),
    **dict.fromkeys(("hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "mistral", "nanochat"), LLAMA),
    **dict.fromkeys(("starcoder2",), LLAMA),
    **dict.fromkeys(("cwm", "gemma2", "ministral", "qwen2", "qwen3", "smollm3", "vaultgemma"), WINDOWS),
    "cohere": replace(COHERE, queries="viewed"),
    "cohere2": replace(COHERE, masks=("full",)),
    "ernie4_5": Written(rotation="neighbours-fp32", tables_fp32=True),
    "exaone4": Written(queries="transposed", masks=("full",)),
    "gemma3_text": Written(queries="transposed", masks=("full",), tables_by_kind=True),
    "glm": Written(rotation="neighbours", partial="inside"),
    "glm4": Written(rotation="neighbours", partial="inside"),
    "helium": Written(norm="upcast-late", rotation="neighbours"),
    "nemotron": Written(partial="returned"),
    "olmo": OLMO,
    "olmo2": OLMO,
    "olmo3": replace(OLMO, masks=("full",), tables_by_kind=True),
    "phi": Written(queries="transposed", partial="before"),
    "phi3": Written(partial="whole"),
    "mixtral": Written(),
    "dots1": Written(routed=DEEPSEEK),
    "exaone_moe": Written(queries="transposed", routed=DEEPSEEK),
    "glm4_moe": Written(queries="viewed", partial="inside", routed=DEEPSEEK),
    "olmoe": Written(queries="whole", routed=replace(MIXTRAL, like_logits=True)),
    "qwen2_moe": Written(masks=("full", "window"), routed=replace(MIXTRAL, like_logits=True, shared="first")),
    "qwen3_moe": Written(routed=QWEN),
    "stablelm": Written(queries="transposed", partial="before", names_all=True),
}


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if the class of `m` is not among those that are known."""
    if p.implementation == "transformers" and m.family not in CLASSES:
        raise ConfigError(
            f"implementation = 'transformers': how its class for family = {m.family!r} is written is not known; "
            f"allowed are {', '.join(sorted(CLASSES))}; estimate check --hf runs any"
        )
