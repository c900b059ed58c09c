"""Networks between nodes: an input of every estimate of several nodes, with a default that is shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from estimator.describe.catalogue import number, read_data, squash, unknown


@dataclass(frozen=True, slots=True)
class Network:
    """What one accelerator sends to another node.

    Attributes:
        name: of the catalogue, or "given".
        bandwidth: bytes/s of one accelerator in one direction, as the datasheet says.
        source: where that was read.
    """

    name: str
    bandwidth: float
    source: str


def networks() -> tuple[str, ...]:
    """The names of well-known clusters whose network is in the catalogue."""
    return tuple(read_data("networks")["network"])


def network(given: str | float | None = None) -> Network:
    """The network that `given` means.

    Args:
        given: a name of `networks()`, bytes/s of one accelerator, or None for what is assumed.

    Raises:
        ConfigError: an unknown name, or a bandwidth that is not above 0.
    """
    data = read_data("networks")
    if given is None:
        given = data["default"]
    if not isinstance(given, str):
        return Network("given", number("network", given, above=True), "given")
    spellings = {squash(name): name for name in data["network"]}
    if squash(given) not in spellings:
        raise unknown("network", given, spellings, (*data["network"], "or bytes/s of one accelerator"))
    name = spellings[squash(given)]
    entry = data["network"][name]
    return Network(name, number("bandwidth", entry["bandwidth"], above=True), entry["source"])


@cache
def straggling() -> float:
    """The part by which a step is longer with each doubling of the nodes beyond one."""
    return number("straggling", read_data("networks")["straggling"], most=1)
