"""What a run costs: accelerator-hours, dollars, energy, CO2 and checkpoint storage.

Every figure is time x dated data (`data/prices.toml`, `data/energy.toml`), and says which data it took.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import median
from typing import TYPE_CHECKING

from estimator.describe.catalogue import number, read_data
from estimator.describe.checks import choose
from estimator.describe.run import Run
from estimator.describe.settings import checked
from estimator.describe.units import JOULES_PER_KILOWATT_HOUR, SECONDS_PER_HOUR
from estimator.hardware.accelerators import Accelerator, accelerator

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("on-demand", "spot", "capacity-block", "marketplace", "rule-of-thumb")


@dataclass(frozen=True, slots=True)
class Price:
    """What one provider asked for one accelerator-hour on one day.

    Attributes:
        accelerator: id of the catalogue.
        provider: who sells.
        offer: the instance or tier; empty where the provider has one.
        kind: one of `KINDS`.
        usd_per_hour: US dollars for one accelerator for one hour.
        count: accelerators that are sold together.
        region: where; empty where the source does not say.
        date: YYYY, YYYY-MM or YYYY-MM-DD, as exact as the source.
        source: where it was read.
        verified: False for a recalled price, which is listed but not used.
        notes: what else the source says.
    """

    accelerator: str
    provider: str
    offer: str
    kind: str
    usd_per_hour: float
    count: int
    region: str
    date: str
    source: str
    verified: bool
    notes: str


@dataclass(frozen=True, slots=True)
class Range:
    """Low, median and high of one figure."""

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What `count` accelerators cost for some time. A figure that cannot be had is None, and `missing` says why.

    Attributes:
        accelerator_hours: count x hours.
        dollars: over the providers' prices, or three times the user's own; None without a price.
        energy_joules: of the whole servers and the facility around them; None without the accelerator's power.
        co2_kg: of that energy; None with it.
        utilisation: power drawn over rated power.
        server: rated power of the server over that of its accelerators.
        pue: facility power over IT power.
        grid: kg of CO2 per kWh.
        prices: what `dollars` was taken from; empty for the user's own price.
        assumptions: the factors as sentences, with year and source.
        missing: one sentence for each figure that is None.
    """

    accelerator_hours: float
    dollars: Range | None
    energy_joules: float | None
    co2_kg: float | None
    utilisation: float
    server: float
    pue: float
    grid: float
    prices: tuple[Price, ...]
    assumptions: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def kilowatt_hours(self) -> float | None:
        """`energy_joules` in kWh."""
        return None if self.energy_joules is None else self.energy_joules / JOULES_PER_KILOWATT_HOUR


def prices(name: str | Path | Accelerator, kind: str | None = None) -> tuple[Price, ...]:
    """All prices on file for an accelerator, of one `kind` or of all, cheapest first. May be empty.

    Raises:
        ConfigError: unknown accelerator or kind.
    """
    id_ = accelerator(name).id
    if kind is not None:
        choose("kind of price", kind, KINDS)
    found = [price for price in _all_prices() if price.accelerator == id_ and kind in (None, price.kind)]
    return tuple(sorted(found, key=lambda price: price.usd_per_hour))


def price_range(name: str | Path | Accelerator, kind: str = "on-demand") -> tuple[Range, tuple[Price, ...]] | None:
    """US dollars per accelerator-hour over the providers, and the prices behind it; None where there is no price.

    Taken are the verified prices, of each offer the newest. Low and high are the cheapest and the dearest offer; the
    median is over providers, each with the median of its offers, so that a provider with many offers counts once.

    Raises:
        ConfigError: unknown accelerator or kind.
    """
    newest: dict[tuple[str, str, int, str], Price] = {}
    for price in prices(name, kind):
        offer = (price.provider, price.offer, price.count, price.region)
        if price.verified and (offer not in newest or price.date > newest[offer].date):
            newest[offer] = price
    if not newest:
        return None
    by_provider: dict[str, list[float]] = {}
    for price in newest.values():
        by_provider.setdefault(price.provider, []).append(price.usd_per_hour)
    asked = [price.usd_per_hour for price in newest.values()]
    middle = median(median(offers) for offers in by_provider.values())
    return Range(min(asked), middle, max(asked)), tuple(newest.values())


def cost(
    name: str | Path | Accelerator,
    seconds: float,
    count: int = 1,
    *,
    price: float | str | None = None,
    utilisation: float | str | None = None,
    server: float | str | None = None,
    pue: float | str | None = None,
    grid: float | str | None = None,
) -> Cost:
    """What `count` accelerators cost for `seconds`.

    energy = seconds x count x power x server x utilisation x PUE; CO2 = energy x grid.

    Args:
        name: as for `hardware.accelerator`.
        seconds: wall-clock time.
        count: accelerators that are paid for all that time.
        price: US dollars per accelerator-hour, or a kind of price ("spot", ...); None means "on-demand".
        utilisation: power drawn over rated power, in (0, 1].
        server: rated power of the server over that of its accelerators, at least 1.
        pue: facility power over IT power, at least 1.
        grid: kg of CO2 per kWh, at least 0.
            These four also take a name from `data/energy.toml` (pue="aws", grid="france"), and None means its default.

    Raises:
        ConfigError: a number out of its range, or an unknown name. A price or a power that is not known is no error:
            the figure is None and `missing` says why.
    """
    a = accelerator(name)
    seconds = number("seconds", seconds)
    count = checked(Run, "count", count)
    hours = count * seconds / SECONDS_PER_HOUR
    missing, assumptions, factors = [], [], {}
    bounds = {"utilisation": (0, 1), "server": (1, math.inf), "pue": (1, math.inf), "grid": (0, math.inf)}
    given = {"utilisation": utilisation, "server": server, "pue": pue, "grid": grid}
    for field, (least, most) in bounds.items():
        factors[field], said = _factor(field, given[field], least, most)
        assumptions.append(said)

    asked, used = _asked(a, price)
    dollars = None
    if asked is None:
        kinds = sorted({p.kind for p in prices(a) if p.verified})
        other = f"; on file are prices of the kinds {', '.join(kinds)}" if kinds else "; give your own in US dollars"
        missing.append(f"dollars: no {price or 'on-demand'} price is on file for {a.id}{other}")
    else:
        dollars = Range(hours * asked.low, hours * asked.median, hours * asked.high)
    energy = co2 = None
    if a.power is None:
        missing.append(f"energy: the power of {a.id} is not published")
    else:
        watts = a.power * factors["server"] * factors["utilisation"] * factors["pue"]
        energy = seconds * count * watts
        co2 = energy / JOULES_PER_KILOWATT_HOUR * factors["grid"]
    return Cost(
        hours, dollars, energy, co2, **factors, prices=used, assumptions=tuple(assumptions), missing=tuple(missing)
    )


@cache
def _all_prices() -> tuple[Price, ...]:
    data = read_data("prices")
    silent = {"offer": "", "region": "", "notes": ""}
    return tuple(Price(**{**silent, **entry, "source": data["source"][entry["source"]]}) for entry in data["price"])


def _asked(a: Accelerator, price: float | str | None) -> tuple[Range | None, tuple[Price, ...]]:
    """Dollars per accelerator-hour, and the prices on file behind it."""
    if price is None or isinstance(price, str):
        return price_range(a, price or "on-demand") or (None, ())
    own = number("price", price)
    return Range(own, own, own), ()


def _factor(field: str, given: float | str | None, least: float, most: float) -> tuple[float, str]:
    """The value of a factor, and a sentence that says where it comes from."""
    table = read_data("energy")[field]
    if given is None or isinstance(given, str):
        names = [name for name, entry in table.items() if name != "default"]
        name = choose(field, table["default"] if given is None else given, names)
        entry = table[name]
        doubt = "" if entry["verified"] else ", unverified"
        return entry["value"], f"{field} = {entry['value']:g} ({name}, {entry['date']}{doubt}: {entry['source']})"
    value = number(field, given, least, most, above=field == "utilisation")
    return value, f"{field} = {value:g} (given)"
