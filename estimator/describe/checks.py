"""What a field may be, and the one error that says so."""

from __future__ import annotations

from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


FIGURE = 2**63 - 1  # bytes, or FLOPs of a micro-batch: what 64-bit integers hold
NORM = 1e38  # of gradients: what a float32 holds
BLOCKS = 100  # of a model, that are run one by one: a tenth of a second each at most
BLOCKS_OF_A_SWEEP = 1_000  # over all its points
POINTS = 100_000  # of a sweep; each is a model, and a time
POINTS_OF_PEAKS = 10_000_000  # of `Account.lambdify`, which computes nothing else
SHOWN = 60  # characters of what was given, in an error
PATH_SHOWN = 250  # of a path, whose end says which file it is


class ConfigError(ValueError):
    """A field has a value that cannot be; the message names the field, the value and what is allowed."""


class TooLargeError(ConfigError):
    """Sizes that are allowed, each by itself, make a figure that no 64-bit integer holds."""


def shown(value: object, most: int = SHOWN) -> str:
    """`value` as an error shows it: what Python writes for it, shortened to `most` characters where that is longer."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return "an integer of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def choose(field: str, value: object, allowed: Collection[str]) -> str:
    """Return `value` if it is one of `allowed`, else raise ConfigError with the nearest names first."""
    if isinstance(value, str) and value in allowed:
        return value
    near = get_close_matches(str(value).lower(), list(allowed), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{field} = {shown(value)}: {hint}allowed are {', '.join(allowed)}")


def positive_int(field: str, value: object, most: int = FIGURE) -> int:
    """Return `value` if it is an integer of at least 1 and at most `most`, else raise ConfigError."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ConfigError(f"{field} = {shown(value)}: must be an integer of at least 1")
    if value.__index__() > most:
        raise ConfigError(f"{field} = {shown(value)}: must be at most {most:,}")
    return int(value.__index__())


def check_figure(name: str, value: int, sizes: Mapping[str, int]) -> None:
    """Raise TooLargeError if `value`, the figure `name` of a model and plan with these sizes, is beyond 64 bits.

    The error is about the size that is the greatest, by its field.
    """
    if value <= FIGURE:
        return
    field = max(sizes, key=lambda name: sizes[name])
    raise TooLargeError(
        f"{field} = {sizes[field]}: with the other sizes {name} would be {value:.2g}, more than the {FIGURE:.2g} "
        "(2^63 - 1) that are reckoned with; take smaller sizes"
    )


def known_fields(cls: type, changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` if each is a field of `cls`, else ConfigError."""
    names = [f.name for f in fields(cls)]
    for name in changes:
        choose(f"{cls.__name__} field", name, names)
    return changes
