"""What a field may be, and the one error that says so."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection


class ConfigError(ValueError):
    """A field has a value that cannot be; the message names the field, the value and what is allowed."""


def choose(field: str, value: object, allowed: Collection[str]) -> str:
    """Return `value` if it is one of `allowed`, else raise ConfigError with the nearest names first."""
    if isinstance(value, str) and value in allowed:
        return value
    near = get_close_matches(str(value).lower(), list(allowed), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{field} = {value!r}: {hint}allowed are {', '.join(allowed)}")


def positive_int(field: str, value: object) -> int:
    """Return `value` if it is an integer of at least 1, else raise ConfigError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ConfigError(f"{field} = {value!r}: must be an integer of at least 1")
    return int(value.__index__())


def known_fields(cls: type, changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` if each is a field of `cls`, else ConfigError."""
    names = [f.name for f in fields(cls)]
    for name in changes:
        choose(f"{cls.__name__} field", name, names)
    return changes
