"""Configurations side by side: their figures, by how much they differ, and a sentence that says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from estimator.pricing.money import cost
from estimator.show.formatting import STRATEGIES, dollars, duration, figures, hours, prefixed, size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from estimator.answers.estimates import Estimate
    from estimator.answers.request import Request
    from estimator.pricing.money import Cost

SAME = 0.005  # a smaller difference of a figure is none worth a word
SEVERAL = 1.1  # from there on a ratio is said as one: "1.9x"
TIME, MONEY, ENERGY, MEMORY, FITS = "training time", "cost", "energy", "memory needed", "fits"


class Figure(NamedTuple):
    """A figure as people read it, and as a number where it is one, in base units."""

    text: str
    value: float | None = None


def paid(q: Request, r: Estimate, price: float | None = None) -> Cost | None:
    """What a run costs; None where its time is not known."""
    return None if r.time is None else cost(q.gpu, r.time.seconds, q.count, price=price)


def measures(r: Estimate, spent: Cost | None, largest: int, unit: str) -> dict[str, Figure]:
    """What can be compared of an answer, by its name.

    Args:
        r: the answer.
        spent: what the run costs.
        largest: the largest micro-batch that fits.
        unit: of memory.
    """
    found = {
        "parameters": Figure(f"{r.values.parameters:,}", r.values.parameters),
        "trained parameters": Figure(f"{r.values.trained_parameters:,}", r.values.trained_parameters),
        MEMORY: Figure(size(r.memory.needed, unit), r.memory.needed),
        "memory there is": Figure(size(r.memory.capacity or 0, unit), r.memory.capacity or 0),
        FITS: Figure("yes" if r.fits else "no"),
        "largest micro-batch": Figure(f"{largest:,}", largest),
        "FLOPs of a step": Figure(prefixed(r.flops.step, "FLOP"), r.flops.step),
    }
    t = r.time
    if t is not None:
        found |= {
            "time of a step": Figure(duration(t.seconds_per_step), t.seconds_per_step),
            "tokens a second": Figure(figures(t.tokens_per_second), t.tokens_per_second),
            "MFU": Figure(f"{t.mfu:.1%}", t.mfu),
            TIME: Figure(hours(t.seconds), t.seconds),
        }
    if spent is not None and spent.dollars is not None:
        found[MONEY] = Figure(dollars(spent.dollars.median), spent.dollars.median)
    if spent is not None and spent.kilowatt_hours is not None:
        found[ENERGY] = Figure(prefixed(spent.kilowatt_hours * 1e3, "Wh"), spent.kilowatt_hours)
    return found


def change(now: Figure, before: Figure) -> str:
    """By how much a figure differs: "-23%", "+4.2%", "3.1x"; "" where it does not, or is no number."""
    if now.value is None or not before.value or now.text == before.text:
        return ""
    ratio = now.value / before.value
    if ratio >= 2:
        return f"{figures(ratio, 2)}x"
    return f"{ratio - 1:+.0%}" if abs(ratio - 1) > 10 * SAME else f"{ratio - 1:+.1%}"


def headline(now: Mapping[str, Figure], before: Mapping[str, Figure], unit: str = "GiB") -> str:
    """What one configuration is against another: "1.9x faster, 23% cheaper, 12.0 GiB less memory; does not fit"."""
    said = [
        _ratio(now, before, TIME, ("faster", "slower", "as fast")),
        _share(now, before, MONEY, ("cheaper", "dearer", "as dear")),
        _memory(now, before, unit),
    ]
    text = ", ".join(filter(None, said))
    if now[FITS].text == "no":
        return f"{text}; it does not fit"
    return f"{text}; it fits, which the other does not" if before[FITS].text == "no" else text


def _ratio(now: Mapping[str, Figure], before: Mapping[str, Figure], name: str, words: Sequence[str]) -> str:
    ratio = _of(now, before, name)
    if ratio is None:
        return ""
    less, more, same = words
    if abs(ratio - 1) < SAME:
        return same
    by = max(ratio, 1 / ratio)
    word = less if ratio < 1 else more
    return f"{figures(by, 2)}x {word}" if by >= SEVERAL else f"{by - 1:.1%} {word}"


def _share(now: Mapping[str, Figure], before: Mapping[str, Figure], name: str, words: Sequence[str]) -> str:
    ratio = _of(now, before, name)
    if ratio is None:
        return ""
    less, more, same = words
    if abs(ratio - 1) < SAME:
        return same
    if ratio >= 2:
        return f"{figures(ratio, 2)}x the {name}"
    return f"{abs(ratio - 1):.0%} {less if ratio < 1 else more}"


def _memory(now: Mapping[str, Figure], before: Mapping[str, Figure], unit: str) -> str:
    ratio = _of(now, before, MEMORY)
    if ratio is None or abs(ratio - 1) < SAME:
        return "as much memory"
    less = (before[MEMORY].value or 0) - (now[MEMORY].value or 0)
    return f"{size(abs(less), unit)} {'less' if less > 0 else 'more'} memory"


def _of(now: Mapping[str, Figure], before: Mapping[str, Figure], name: str) -> float | None:
    """The ratio of a figure to the other's."""
    one, other = now.get(name), before.get(name)
    if one is None or other is None or not one.value or not other.value:
        return None
    return one.value / other.value


def said(value: object) -> str:
    """A setting's value as people say it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = str(value)
    return STRATEGIES[text] if text in STRATEGIES and text != "none" else text
