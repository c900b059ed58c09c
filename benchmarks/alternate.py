"""Timing by turns: each candidate once a round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def alternate(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` of each candidate, after one round that does not count.

    Every second round runs backwards: whoever comes after another finds the caches as that one left them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name in list(candidates)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            candidates[name]()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: dict[str, list[float]], base: str) -> None:
    """Print each median, its spread, and its ratio to the median of `base`."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        ratio = f"{medians[name] / medians[base]:6.3f} x {base}" if name != base else ""
        spread = f"{1e3 * min(times):,.1f} to {1e3 * max(times):,.1f}"
        print(f"{name:24} median {1e3 * medians[name]:10,.1f} ms ({spread}) {ratio}".rstrip())
    print(f"{len(next(iter(seconds.values())))} rounds by turns; load average {os.getloadavg()[0]:.2f}")
