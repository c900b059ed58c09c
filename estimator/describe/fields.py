"""The fields of one config.json, each with its class's default where the file is silent, checked as they are read."""

from __future__ import annotations

import json
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import number
from estimator.describe.checks import ConfigError, choose, positive_int, shown
from estimator.describe.model import ModelConfig
from estimator.describe.settings import limits

if TYPE_CHECKING:
    from collections.abc import Mapping

# The names that files have for the activations of `estimator.describe.parts`.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "xielu": "xielu",
}
KINDS = {"full_attention": "full", "attention": "full", "sliding_attention": "window", "chunked_attention": "chunk"}


@cache
def class_defaults() -> dict[str, Any]:
    """`estimator/data/hf_defaults.json`: for each family its class, the names that it takes and its defaults."""
    with resources.files("estimator").joinpath("data", "hf_defaults.json").open("rb") as file:
        data: dict[str, Any] = json.load(file)
    return data


class Fields:
    """A file's fields under the names that its class has for them.

    Null and absent are two things: an absent field has the class's default, which may be another than null.

    Attributes:
        silent: the fields read so far that the file leaves out.
        layers: the number of blocks.
        kinds: the kind of each layer's attention as declared ("full", "window", "chunk"); set by the reader.
    """

    def __init__(self, raw: Mapping[str, Any], also: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
        self.raw, self.also, self.defaults = raw, also, defaults
        self.silent: list[str] = []
        self.kinds: list[str] = []
        self.spellings: dict[str, list[str]] = {}
        for other, own in also.items():
            self.spellings.setdefault(own, []).append(other)

    @classmethod
    def of(cls, kind: str, raw: Mapping[str, Any]) -> Fields:
        """The fields of a file of this `model_type`."""
        entry = class_defaults()[kind]
        return cls(raw, entry["also"], entry["defaults"])

    def own(self, name: str) -> str:
        """The class's own name of what is `name` in general."""
        return self.also.get(name, name)

    def knows(self, name: str) -> bool:
        """Whether the class has this field."""
        return self.own(name) in self.defaults

    def reads(self, name: str) -> bool:
        """Whether the class has a field of this name, or takes the name for one."""
        return name in self.defaults or name in self.also or name in self.spellings

    def __call__(self, name: str) -> Any:
        """The value as it stands in the file, or the class's default.

        Raises:
            ConfigError: two names of the same field say different things.
        """
        own = self.own(name)
        given = [n for n in (own, *self.spellings.get(own, ())) if n in self.raw]
        if not given:
            self.silent.append(own)
            return self.defaults.get(own)
        first = self.raw[given[0]]
        for other in given[1:]:
            if self.raw[other] != first:
                raise ConfigError(
                    f"{other} = {shown(self.raw[other])}: must be {given[0]}, which is {shown(first)}, or be left out"
                )
        return first

    def inside(self, name: str) -> Fields:
        """The fields of an object within the file; absent ones have the class's defaults too."""
        value, defaults = self(name), self.defaults.get(self.own(name)) or {}
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise ConfigError(f"{name} = {shown(value)}: must be an object")
        return Fields(value, {}, defaults)

    def flag(self, name: str) -> bool:
        """True or false; null is false."""
        value = self(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{self.own(name)} = {shown(value)}: must be true or false")
        return bool(value)

    def as_size(self, name: str, value: Any) -> int:
        """`value` as a positive integer."""
        return positive_int(self.own(name), value)

    def size(self, name: str, default: int | None = None) -> int:
        """A positive integer; `default` where neither file nor class has one."""
        value = self(name)
        return self.as_size(name, default if value is None and default is not None else value)

    def size_or_none(self, name: str) -> int | None:
        """A positive integer, or null."""
        value = self(name)
        return None if value is None else self.as_size(name, value)

    def count(self, name: str) -> int:
        """An integer of at least 0."""
        value = self(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self.own(name)} = {shown(value)}: must be an integer of at least 0")
        return value

    def number(self, name: str) -> float:
        """A finite number above 0."""
        return number(self.own(name), self(name), above=True)

    def number_or_none(self, name: str) -> float | None:
        """A finite number above 0, or null."""
        return None if self(name) is None else self.number(name)

    def activation(self, name: str) -> str:
        """The activation of that name, as `parts.ACTIVATIONS` calls it."""
        return ACTIVATIONS[choose(self.own(name), self(name), tuple(ACTIVATIONS))]

    @cached_property
    def layers(self) -> int:
        """The number of blocks."""
        name, count = self.own("num_hidden_layers"), self.size("num_hidden_layers")
        if count > limits(ModelConfig)["num_layers"]:  # a list of them is made
            raise ConfigError(f"{name} = {count}: must be at most {limits(ModelConfig)['num_layers']:,}")
        return count

    def indices(self, name: str) -> set[int]:
        """Numbers of layers; null is none."""
        value = self(name)
        if value is None:
            return set()
        if not isinstance(value, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
            raise ConfigError(f"{name} = {shown(value)}: must be a list of numbers of layers")
        return set(value)

    def listed(self, name: str, allowed: tuple[Any, ...]) -> list[Any]:
        """A list with one of `allowed` for each layer."""
        value = self(name)
        if not isinstance(value, list) or len(value) != self.layers:
            raise ConfigError(f"{name}: must be a list with one entry for each of the {self.layers} layers")
        for one in value:
            if one not in allowed:
                raise ConfigError(f"{name}: {shown(one)} is none of {', '.join(map(str, allowed))}")
        return value

    def layer_types(self) -> list[str] | None:
        """The kind of each layer where the file lists them."""
        if not self.raw.get("layer_types"):
            return None
        return [KINDS[one] for one in self.listed("layer_types", tuple(KINDS))]

    def rope(self) -> Mapping[str, Any]:
        """What the file says of the rotation, in new files or old ones."""
        found: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            value = self.raw.get(name)
            if isinstance(value, dict):
                found |= value
        return found

    def rotated_part(self) -> float:
        """The fraction of a head that is rotated; 1 for all of it."""
        name, rope = "partial_rotary_factor", self.rope()
        found = [rope[name]] if name in rope else []
        found += [x[name] for x in rope.values() if isinstance(x, dict) and name in x]
        if not found:
            value = self(name)
            found = [1 if value is None else value]
        fractions = {number(name, 1 if x is None else x, most=1, above=True) for x in found}
        if len(fractions) > 1:
            raise ConfigError(f"{name}: {', '.join(map(str, sorted(fractions)))} by layer; allowed is one for all")
        return fractions.pop()
