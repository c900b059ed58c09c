"""How transformers' classes write the parts of a decoder down, and what that is known with.

Read in transformers 5.24 (`src/transformers/models/*/modeling_*.py`), with `use_cache` off as its Trainer has it, and
compared with recordings of those classes: `tests/exact/test_transformers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
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
        norm: "upcast" (in fp32, cast back, then multiplied with the weight: Llama), "upcast-late" (multiplied, then
            cast back: OLMo 2), "centred" (Cohere's LayerNorm, in operators), or "" (by the part: a LayerNorm is one
            kernel, an rms norm that scales by 1 + w is Gemma's).
    """

    norm: str = "upcast"


LLAMA = Written()
# By model_type: the classes that are known.
CLASSES = dict.fromkeys((*("llama", "mistral"),), LLAMA)  # fmt: skip


def check_model(p: Plan, m: ModelConfig) -> None:
    """Raise ConfigError if the class of `m` is not among those that are known."""
    if p.implementation == "transformers" and m.family not in CLASSES:
        raise ConfigError(
            f"implementation = 'transformers': how its class for family = {m.family!r} is written is not known; "
            f"allowed are {', '.join(sorted(CLASSES))}; estimate check --hf runs any"
        )
