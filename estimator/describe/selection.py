"""Which parameters of a model are trained: named by part of the model, or by layer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError, choose, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from estimator.describe.model import ModelConfig

PARTS = ("embedding", "attention", "feed-forward", "norms", "head")
SPELLINGS = {"embeddings": "embedding", "norm": "norms", "ffn": "feed-forward", "layers": "blocks"}
NAMES = ("all", "blocks", *PARTS)
NOTHING_TRAINED = "trained and frozen: no parameter of the model is left to train; name a part of it in trained alone"
LAYERS = re.compile(r"layers:(\d+)(?:-(\d+))?")


def part_of(module: str) -> str:
    """The part of the model that a module's path belongs to: one of `PARTS`, or "residual" for a block itself."""
    names = module.split(".")
    if names[-1].endswith("norm"):
        return "norms"
    if "attention" in names:
        return "attention"
    if "ffn" in names:
        return "feed-forward"
    return {"head": "head", "blocks": "residual"}.get(names[0], "embedding")


def listed(field: str, given: object, separator: str = ",") -> tuple[str, ...]:
    """The words of a list, given as text with commas or as a sequence.

    Raises:
        ConfigError: it is neither.
    """
    words = given.split(separator) if isinstance(given, str) else given
    if not isinstance(words, (tuple, list)) or not all(isinstance(word, str) for word in words):
        raise ConfigError(f"{field} = {shown(given)}: must be names with commas between them, or a list of names")
    return tuple(word.strip() for word in words if word.strip())


def parts_listed(field: str, given: object) -> str:
    """`given` as text: names of `NAMES` or ranges of layers ("layers:0-3"), in the library's spelling.

    Raises:
        ConfigError: one of them is neither.
    """
    found = []
    for word in listed(field, given):
        name = SPELLINGS.get(word, word)
        layers = LAYERS.fullmatch(name)
        if layers is None:
            choose(field, name, (*NAMES, "layers:FIRST-LAST"))
        if name == "layers:FIRST-LAST" or (layers is not None and int(layers[1]) > int(layers[2] or layers[1])):
            raise ConfigError(
                f"{field} = {shown(word)}: layers are two numbers from 0, the first no greater: layers:0-3"
            )
        found.append(name)
    return ",".join(found)


@dataclass(frozen=True, slots=True)
class Selection:
    """The parameters that are trained: those that `trained` names, but those that `frozen` names.

    Attributes:
        trained, frozen: names of `NAMES`, or ranges of layers.
    """

    trained: tuple[str, ...] = ("all",)
    frozen: tuple[str, ...] = ()

    @classmethod
    def of(cls, trained: str, frozen: str) -> Selection:
        """From the fields of a plan."""
        return cls(listed("trained", trained), listed("frozen", frozen))

    def at(self, layer: int | None) -> Selection:
        """What it says of one layer, or of what is in none: without ranges, equal for layers that are treated alike."""
        return Selection(_resolved(self.trained, layer), _resolved(self.frozen, layer))

    @property
    def told_apart(self) -> int:
        """The first layer from which on all layers are treated alike."""
        return max((last + 1 for name in (*self.trained, *self.frozen) for _, last in _ranges(name)), default=0)

    def has(self, module: str) -> bool:
        """Whether the parameters of the module at this path are trained; ranges are resolved (`at`)."""
        names = {"all", part_of(module), *(("blocks",) if module.startswith("blocks.") else ())}
        return not names.isdisjoint(self.trained) and names.isdisjoint(self.frozen)

    @property
    def has_block(self) -> bool:
        """Whether a part of a block is trained."""
        return any(self.has(f"blocks.0.{module}") for module in ("attention", "ffn", "norm"))

    def check(self, m: ModelConfig) -> None:
        """Raise ConfigError if a name says nothing of this model, or nothing is trained."""
        for field, names in (("trained", self.trained), ("frozen", self.frozen)):
            for name in names:
                for _, last in _ranges(name):
                    if last >= m.num_layers:
                        raise ConfigError(f"{field} = {name!r}: the model's layers are 0 to {m.num_layers - 1}")
                if name == "head" and m.made_of.ends.tied and not m.made_of.ends.head_bias:
                    raise ConfigError(f"{field} = 'head': the model's head is its embedding's matrix; say embedding")


def _ranges(name: str) -> Iterable[tuple[int, int]]:
    found = LAYERS.fullmatch(name)
    return [(int(found[1]), int(found[2] or found[1]))] if found else []


@lru_cache(maxsize=4096)
def _resolved(names: tuple[str, ...], layer: int | None) -> tuple[str, ...]:
    found = []
    for name in names:
        ranges = _ranges(name)
        if not ranges:
            found.append(name)
        elif layer is not None and any(first <= layer <= last for first, last in ranges):
            found.append("blocks")
    return tuple(dict.fromkeys(found))
