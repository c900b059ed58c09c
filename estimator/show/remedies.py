"""What the command line says of changes that make a run fit, or better."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from estimator.answers.advice import COUNTS, LEAST_BITS, NOTICEABLE, Advisor
from estimator.answers.estimates import max_batch_size
from estimator.show.formatting import size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from estimator.answers.advice import Change
    from estimator.answers.estimates import Estimate

SHOWN = 8  # rows: who wants more asks for a goal


def advise(r: Estimate, goal: str, global_batch_size: int | None, options: Mapping[str, Any]) -> None:
    """Print what would make `r` fit, or where it does, what is better for `goal`; each as options to add."""
    largest = max_batch_size(r.model, r.plan, r.accelerator, global_batch_size=global_batch_size)
    advisor = Advisor(r, global_batch_size, **options)
    found = advisor.improvements(goal)
    title = f"What is better for {goal}" if r.fits else "What would make it fit"
    write = sys.stdout.write
    nothing = ": nothing of up to four changes"
    if not r.fits and advisor.beyond_one:
        nothing = (
            f": nothing on one such accelerator, whatever the recipe (the parameters alone, at {LEAST_BITS} bits each, "
            f"are {size(r.values.parameters * LEAST_BITS / 8)}), nor ZeRO-3 with checkpointing and bf16 over up to "
            f"{COUNTS[-1]:,} of them"
        )
    write(f"\n{title}{'' if found else nothing}\n")
    for change in found[:SHOWN]:
        write(f"  {options_of(change)}\n    {effect(change, largest)}\n")
    if any(change.alters for change in found[:SHOWN]):
        write("  * also changes what is learned; all others compute the same step another way.\n")


def options_of(change: Change) -> str:
    """A change as options of the command."""
    words = []
    for name, value in {**change.machine, **change.fields}.items():
        flag = name.replace("_", "-")
        words.append(f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(words) + (" *" if change.alters else "")


def effect(change: Change, largest: int, unit: str = "GiB") -> str:
    """What a change does: whether it fits, memory, time, dollars, and the largest micro-batch before and after."""
    fits = "fits" if change.fits else "does not fit yet"
    parts = [f"{fits}: {size(change.estimate.memory.needed, unit)} ({_less(change, unit)})"]
    named = {"work": change.work} if change.seconds is None else {"time": change.seconds}
    if change.dollars is not None:
        named["dollars"] = change.dollars
    parts += [f"{what} {_times(ratio)}" for what, ratio in named.items()]
    parts.append(f"largest micro-batch {largest:,} -> {change.largest:,}")
    return ", ".join(parts)


def _less(change: Change, unit: str) -> str:
    if abs(change.saves) <= NOTICEABLE * change.estimate.memory.needed:
        return "as now"
    return f"{size(abs(change.saves), unit)} {'less' if change.saves > 0 else 'more'}"


def _times(ratio: float) -> str:
    if abs(ratio - 1) < NOTICEABLE / 2:
        return "as now"
    return f"{ratio - 1:+.1%}"
