"""What the data files have in common: how they are read, and how people's spellings of a name are forgiven."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib import resources
from typing import Any


@cache
def read_data(name: str) -> dict[str, Any]:
    """The tables of `estimator/data/<name>.toml`. Shared between callers: do not change them."""
    with resources.files("estimator").joinpath("data", f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


def squash(name: str) -> str:
    """`name` without case, spaces, hyphens and the like: "Llama 3 8B", "llama_3_8b" and "llama-3-8b" are one."""
    return re.sub(r"[^a-z0-9.]+", "", name.lower())
