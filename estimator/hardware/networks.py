"""Networks between nodes: an input of every estimate of several nodes, with a default that is shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

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
def deviation() -> float:
    """The standard deviation of accelerators' speeds, as a part of their mean.

    Of a normal distribution, whose box plot has whiskers 1.5 times the box long on either side of it.
    """
    box = 2 * NormalDist().inv_cdf(0.75)
    return number("variation", read_data("networks")["variation"], most=1) / (4 * box)


def slowest(count: int, spread: float | None = None) -> float:
    """The part by which the slowest of `count` accelerators is expected to be behind one of them.

    Args:
        count: accelerators that wait for one another.
        spread: standard deviation of their speeds, if not `deviation()`.

    Source: Blom 1958, the expected largest of n normal values.
    """
    return (deviation() if spread is None else spread) * NormalDist().inv_cdf((count - 0.375) / (count + 0.25))
