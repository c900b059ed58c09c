"""What the data files have in common: how they are read, and how people's spellings of a name are forgiven."""

from __future__ import annotations

import re
import tomllib
from difflib import get_close_matches
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from estimator.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@cache
def read_data(name: str) -> dict[str, Any]:
    """The tables of `estimator/data/<name>.toml`. Shared between callers: do not change them."""
    with resources.files("estimator").joinpath("data", f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


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
    return ConfigError(f"{field} = {name!r}: {hint}allowed are {', '.join(allowed)}")
