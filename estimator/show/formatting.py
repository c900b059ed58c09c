"""Figures as text: the one place where base units (bytes, FLOPs, seconds, dollars, joules) become what people read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from estimator.describe.checks import choose
from estimator.describe.units import SECONDS_PER_DAY, SECONDS_PER_HOUR, SECONDS_PER_YEAR

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from estimator.answers.estimates import Estimate

BYTE_UNITS = {"GiB": 2**30, "GB": 10**9}
SMALLER = {"GiB": (("MiB", 2**20), ("KiB", 2**10)), "GB": (("MB", 10**6), ("KB", 10**3))}
LARGER = {"GiB": ("TiB", 2**40), "GB": ("TB", 10**12)}
# SI prefixes, largest first; a number keeps three significant digits before it takes the next one.
PREFIXES = ((1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
LITTLE = 0.01  # of the peak: logits that are less are not spoken of


def figures(x: float, digits: int = 3) -> str:
    """`x` with `digits` significant digits, thousands separated, no exponent: 122,765 and 29.5 and 0.0123."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(x))))
    return f"{x:,.{places}f}"


def in_unit(nbytes: float, unit: str = "GiB") -> float:
    """Bytes as a number of `unit` ("GiB" or "GB").

    Raises:
        ConfigError: another unit.
    """
    return nbytes / BYTE_UNITS[choose("unit", unit, BYTE_UNITS)]


def size(nbytes: float, unit: str = "GiB") -> str:
    """Bytes in `unit`, or in one of its smaller or larger sisters where they read better: "29.5 GiB", "16.0 KiB"."""
    number = in_unit(abs(nbytes), unit)
    larger, factor = LARGER[unit]
    if number >= 10_000:
        return f"{figures(nbytes / factor)} {larger}"
    if number >= 0.1 or nbytes == 0:
        return f"{figures(nbytes / BYTE_UNITS[unit])} {unit}"
    for name, factor in SMALLER[unit]:
        if abs(nbytes) >= 0.1 * factor:
            return f"{figures(nbytes / factor)} {name}"
    return f"{nbytes:,.0f} B"


def prefixed(x: float, unit: str) -> str:
    """A decimal quantity with an SI prefix: 1.95e13 of "FLOP/s" is "19.5 TFLOP/s"."""
    for factor, prefix in PREFIXES:
        if abs(x) >= factor:
            return f"{figures(x / factor)} {prefix}{unit}"
    return f"{figures(x)} {unit}"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use: "3.40 ms", "18.4 min", "27.1 h", "12.0 days", "14.0 years"."""
    day = SECONDS_PER_DAY
    for factor, unit in (
        (SECONDS_PER_YEAR, "years"),
        (2 * day, "days"),
        (SECONDS_PER_HOUR, "h"),
        (120, "min"),
        (1, "s"),
    ):
        if seconds >= factor:
            return f"{figures(seconds / {'days': day, 'min': 60}.get(unit, factor))} {unit}"
    return f"{figures(seconds * 1e3)} ms" if seconds >= 1e-3 or seconds == 0 else f"{figures(seconds * 1e6)} us"


def between(low: str, high: str) -> str:
    """Two texts of figures as a range; a unit that they share is said once: "11.9 to 16.4 years"."""
    number, _, unit = low.rpartition(" ")
    return f"{number if number and high.endswith(f' {unit}') else low} to {high}"


def hours(seconds: float) -> str:
    """Seconds in hours, whole ones from 100 on: "122,765 h"."""
    number = seconds / SECONDS_PER_HOUR
    return f"{number:,.0f} h" if number >= 100 else f"{figures(number)} h"


def count(x: float) -> str:
    """A number of parameters or tokens as people say it: "1.30B", "26.0B", "124M"."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"{figures(x / factor)}{suffix}"
    return f"{x:,.0f}"


def dollars(x: float) -> str:
    """US dollars: "$1,250,000", "$3.40"."""
    return f"${x:,.2f}" if x < 100 else f"${x:,.0f}"


def short_dollars(x: float) -> str:
    """US dollars with three digits: "$171k", "$1.25M"."""
    for factor, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if x >= factor:
            return f"${figures(x / factor)}{suffix}"
    return dollars(x)


def place(estimate: Estimate) -> str:
    """Where in the step the peak is, as words: "the backward pass, at the loss (CrossEntropyBackward)"."""
    where = estimate.memory.where
    if where.phase.value == "optimizer":  # the module is only that of the parameter which the optimizer is at
        return f"the optimizer step ({where.op})"
    module = {"loss": "the loss"}.get(where.module, where.module)
    return f"the {where.phase.value} pass, at {module} ({where.op})"


def verdict(estimate: Estimate, unit: str = "GiB") -> str:
    """Whether the step fits and by how much, when and by what it is greatest, and what is in the logits: sentences."""
    memory = estimate.memory
    assert memory.capacity is not None, "an Estimate is always on an accelerator"
    free = memory.capacity - memory.needed
    need = f"{size(memory.needed, unit)} of {size(memory.capacity, unit)}"
    if free >= 0:
        first = f"Fits: a step needs {need}, which leaves {size(free, unit)}."
    else:
        first = f"Does not fit: a step needs {need}, {size(-free, unit)} more than there is."
    most, held = max(memory.parts.items(), key=lambda part: part[1])
    share = f"{held / memory.peak:.0%}"
    said = f"{first} The peak is in {place(estimate)}, where {share} is {NOUNS[most]}."
    return " ".join(filter(None, (said, logits(estimate, unit))))


def logits(estimate: Estimate, unit: str = "GiB") -> str:
    """What the logits hold of the peak, and what a loss that has them chunk by chunk would save; "" if next to none."""
    from estimator.answers.advice import NOTICEABLE, chunking_saves  # noqa: PLC0415 - which takes estimates

    memory, plan, model = estimate.memory, estimate.plan, estimate.model
    share = memory.logits / memory.peak
    if share < LITTLE:
        return ""
    shape = f"{plan.batch_size:,} x {plan.tokens(model):,} x {model.vocab_size:,}"
    said = f"The logits and the loss's copies of them ({shape}) are {share:.0%} of the peak"
    saves = chunking_saves(estimate)
    if saves is None:
        return f"{said}."
    less = f"need {size(saves, unit)} less" if saves > NOTICEABLE * memory.needed else "need no less: the peak moves"
    return f"{said}; a chunked loss would {less}."


NOUNS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "temporary": "temporary tensors",
    "inputs": "input tokens",
    "buffers": "buffers",
    "communication": "communication",
}

# What people call the ways in which accelerators share a run.
STRATEGIES = {"none": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "FSDP (ZeRO-3)"}


def in_columns(table: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Rows of cells as lines: the columns `left` begin at the left, all others end at the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
