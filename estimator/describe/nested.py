"""Dataclasses inside dataclasses: checked, made of mappings as a JSON file has them, and turned into such."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError, choose, known_fields, shown

if TYPE_CHECKING:
    from collections.abc import Sequence


def check(part: Any, **allowed: Sequence[str]) -> None:
    """Raise ConfigError where a field of `part` has a value or a type that cannot be; whole numbers become floats.

    A field that is itself a part may come as a mapping, as `to_dict` and a JSON file have it.
    """
    for f in fields(part):
        value, name = getattr(part, f.name), f"{type(part).__name__}.{f.name}"
        if is_part(f.default):
            object.__setattr__(part, f.name, part_of(type(f.default), value, name))
        elif f.name in allowed:
            choose(name, value, allowed[f.name])
        elif f.type == "bool" and not isinstance(value, bool):
            raise ConfigError(f"{name} = {shown(value)}: must be true or false")
        elif f.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ConfigError(f"{name} = {shown(value)}: must be an integer of at least 0")
        elif f.type == "float | None" and value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ConfigError(f"{name} = {shown(value)}: must be a finite number above 0, or none")
            object.__setattr__(part, f.name, float(value))


def is_part(value: object) -> bool:
    """Whether it has parts of its own."""
    return is_dataclass(value)


def part_of(cls: type, value: Any, name: str) -> Any:
    """`value` if it is a part of this class, or one made of a mapping of its fields; ConfigError naming it if not."""
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{name} = {shown(value)}: must be {cls.__name__}(...), or a mapping of its fields")
    return cls(**known_fields(cls, value))


def plain(value: Any, default: Any = None) -> Any:
    """Parts as nested dicts and lists, ready for JSON; of each part what differs from its defaults."""
    if isinstance(value, tuple):
        return [plain(x) for x in value]
    if not is_part(value):
        return value
    standard = default if default is not None else type(value)()
    return {
        f.name: plain(getattr(value, f.name), getattr(standard, f.name))
        for f in fields(value)
        if getattr(value, f.name) != getattr(standard, f.name)
    }
