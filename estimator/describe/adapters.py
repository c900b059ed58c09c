"""Which of a model's linear layers have an adapter: what a plan says of it, without a framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError, choose
from estimator.describe.selection import listed

if TYPE_CHECKING:
    from collections.abc import Iterable

ALL = "all-linear"  # peft's: every linear layer but the one that makes the logits
# The linear layers' names, of all parts that a model may have.
LINEAR = (
    *("q", "k", "v", "qkv", "kv", "out", "out_gate", "q_down", "q_up", "kv_down", "kv_up"),
    *("gate", "up", "gate_up", "down", "shared_gate", "project_in", "project_out", "head"),
)
# What transformers calls them in most models.
SPELLINGS = {
    **{f"{name}_proj": name for name in ("q", "k", "v", "qkv", "gate", "up", "gate_up", "down")},
    "o_proj": "out",
    "lm_head": "head",
}
EXPERTS = "experts"  # the stacked matrices of all experts of a mixture, which peft names by `target_parameters`
SAVED = ("embedding", "head")  # what may be trained whole beside the adapters


def targets_listed(given: object) -> str:
    """`given` as text: names of linear layers or `ALL`, in the library's spelling, and perhaps `EXPERTS`.

    Raises:
        ConfigError: one of them is no linear layer's.
    """
    names = [SPELLINGS.get(word, word) for word in listed("adapter_targets", given)]
    for name in names:
        choose("adapter_targets", name, (ALL, *LINEAR, EXPERTS))
    if not names or (ALL in names and set(names) - {ALL, EXPERTS}):
        raise ConfigError(
            f"adapter_targets = {given!r}: must be {ALL}, or some of {', '.join(LINEAR)}; {EXPERTS} goes with each"
        )
    return ",".join(names)


def saved_listed(given: object) -> str:
    """`given` as text: names of `SAVED`.

    Raises:
        ConfigError: one of them is none.
    """
    spellings = SPELLINGS | {"embed_tokens": "embedding", "wte": "embedding"}
    names = [spellings.get(word, word) for word in listed("modules_to_save", given)]
    return ",".join(dict.fromkeys(choose("modules_to_save", name, SAVED) for name in names))


def is_target(targets: str, name: str) -> bool:
    """Whether a linear layer of this name, or stacked experts, have an adapter."""
    names = targets.split(",")
    return name in names or (ALL in names and name not in ("head", EXPERTS))


def check_targets(targets: str, names: Iterable[str]) -> None:
    """Raise ConfigError if none of a model's linear layers, of these names, has an adapter."""
    there = list(dict.fromkeys(names))
    if not any(is_target(targets, name) for name in there):
        raise ConfigError(f"adapter_targets = {targets!r}: the model's linear layers are {', '.join(there)}")
