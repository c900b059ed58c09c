"""What presets, accelerators and prices have in common: data files, forgiving names, numbers within limits."""

from __future__ import annotations

import json
import math
import re
import tomllib
from difflib import get_close_matches
from functools import cache
from importlib import resources
from numbers import Real
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@cache
def read_data(name: str) -> dict[str, Any]:
    """The tables of `estimator/data/<name>.toml`. Shared between callers: do not change them."""
    with resources.files("estimator").joinpath("data", f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


def to_toml(table: dict[str, Any], prefix: str = "") -> str:
    """A nested dict as TOML: strings, numbers, booleans, lists of these, tables."""
    plain = {key: x for key, x in table.items() if not isinstance(x, dict)}
    lines = [f"{json.dumps(key)} = {json.dumps(x, allow_nan=False)}" for key, x in plain.items()]
    parts = ["\n".join(lines)]
    for key, inner in table.items():
        if isinstance(inner, dict):
            name = f"{prefix}{json.dumps(key)}"
            parts.append(f"[{name}]\n{to_toml(inner, name + '.')}")
    return "\n\n".join(parts)


def squash(name: str) -> str:
    """`name` without case, spaces, hyphens and the like: "Llama 3 8B", "llama_3_8b" and "llama-3-8b" are one."""
    return re.sub(r"[^a-z0-9.]+", "", name.lower())


def unknown(field: str, name: str, spellings: Mapping[str, str], allowed: Iterable[str]) -> ConfigError:
    """The error for a `name` that is not among `spellings` (squashed spelling -> what it means), the nearest first."""
    wanted = squash(name)
    close = [spellings[near] for near in get_close_matches(wanted, list(spellings), n=3, cutoff=0.6)]
    begun = [meant for spelling, meant in spellings.items() if len(wanted) > 1 and spelling.startswith(wanted)]
    near = list(dict.fromkeys([*close, *begun]))[:3]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return ConfigError(f"{field} = {shown(name)}: {hint}allowed are {', '.join(allowed)}")


def number(field: str, value: object, least: float = 0, most: float = math.inf, *, above: bool = False) -> float:
    """`value` as a float if it is a finite number of at least `least` (with `above`: more) and at most `most`.

    Raises:
        ConfigError: it is not.
    """
    try:
        x = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that no float holds
        x = math.inf
    if math.isfinite(x) and least <= x <= most and not (above and x == least):
        return x
    limits = f"{'above' if above else 'of at least'} {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
    raise ConfigError(f"{field} = {shown(value)}: must be a finite number {limits}")
