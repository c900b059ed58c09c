"""Published models by name."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import squash, unknown
from estimator.describe.families import FAMILIES
from estimator.describe.hf import read_config

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.parts import Parts


def presets() -> tuple[str, ...]:
    """The names that `preset` knows, by family and size."""
    return tuple(_entries())


def preset_groups() -> dict[str, tuple[str, ...]]:
    """The same names under what their families are called: "Gemma" -> ("gemma-2b", ...)."""
    groups: dict[str, list[str]] = {}
    for name, entry in _entries().items():
        groups.setdefault(entry["group"], []).append(name)
    return {group: tuple(names) for group, names in groups.items()}


def preset(name: str) -> ModelConfig:
    """The published model `name`.

    Case, spaces, `-` and `_` do not matter ("GPT-2 XL" is "gpt2-xl"), and the hub's name ("meta-llama/Llama-2-7b-hf",
    with or without its organisation) is understood. Each is read from the fields of its config.json, which stand with
    their source in `data/presets.jsonl`.

    Raises:
        ConfigError: no such model; the nearest names come first.
    """
    return read_config(_entries()[_find(name)]["config"])


def starting_points() -> tuple[str, ...]:
    """The presets that a model of one's own may start from, the usual one of each kind."""
    return tuple(name for name, entry in _entries().items() if entry.get("start"))


@cache
def written_from(m: ModelConfig) -> str | None:
    """The preset that `m` can be written as a change of: of the same parts and pattern, but for ties and biases.

    A starting point where one is like that; None where no preset is.
    """
    for name in dict.fromkeys((*starting_points(), *presets())):
        other = preset(name)
        if (other.family, other.pattern) == (m.family, m.pattern) and _habits(other, m) == m.made_of:
            return name
    return None


def _habits(other: ModelConfig, m: ModelConfig) -> Parts:
    """The parts of `other`, with the ties and the biases on q, k and v of `m`."""
    parts = other.made_of
    return replace(
        parts,
        ends=replace(parts.ends, tied=m.made_of.ends.tied),
        attention=replace(parts.attention, bias=m.made_of.attention.bias),
    )


def published_parameters(name: str) -> int | None:
    """The total number of parameters that the model's publisher states; where none is stated, what transformers counts.

    None where there is neither.

    Raises:
        ConfigError: no such model.
    """
    total: int | None = _entries()[_find(name)].get("parameters")
    return total


def sparse(name: str) -> bool:
    """Whether the preset has experts, so that a token goes through fewer parameters than there are.

    Raises:
        ConfigError: no such model.
    """
    return FAMILIES[_entries()[_find(name)]["config"]["model_type"]].experts is not None


def _find(name: str) -> str:
    found = _spellings().get(squash(name)) if isinstance(name, str) else None
    if found is None:
        every = f"the {len(presets())} names that `estimate list` prints and `estimator.presets()` returns"
        raise unknown("model", str(name), _spellings(), (every,))
    return found


@cache
def _entries() -> dict[str, dict[str, Any]]:
    """Each preset by its name: group, names on the hub, aliases, parameters, source, date, and the file's fields."""
    lines = resources.files("estimator").joinpath("data", "presets.jsonl").read_text("utf-8").splitlines()
    return {entry["name"]: entry for entry in map(json.loads, lines)}


@cache
def _spellings() -> dict[str, str]:
    """Squashed preset name, alias or hub name, with and without its organisation -> preset name."""
    return {
        squash(spelling): name
        for name, entry in _entries().items()
        for full in (name, *entry["aliases"], *entry["hub"])
        for spelling in (full, full.split("/")[-1])
    }
