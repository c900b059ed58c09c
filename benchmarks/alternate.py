"""Timing by turns: each candidate once a round, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import os
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Seconds(NamedTuple):
    """One call: on the clock, and on the processors, all threads together.

    On a busy machine the second is the steadier figure: it leaves out what other processes took. With several threads
    it holds their waiting for each other too, which one thread (`--threads 1`) does not have.
    """

    elapsed: float
    processor: float


def alternate(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[Seconds]]:
    """The times of every call, `repeats` of each candidate, after one round that does not count.

    Every second round runs backwards: whoever comes after another finds the caches as that one left them.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name in list(candidates)[:: 1 if turn % 2 else -1]:
            elapsed, processor = time.perf_counter(), time.process_time()
            candidates[name]()
            if turn:
                times[name].append(Seconds(time.perf_counter() - elapsed, time.process_time() - processor))
    return times


def report(times: dict[str, list[Seconds]], base: str) -> None:
    """Print each candidate's medians, the spread, and the medians' ratios to those of `base`."""
    medians = {
        name: [statistics.median(column) for column in zip(*calls, strict=True)] for name, calls in times.items()
    }
    for name, calls in times.items():
        elapsed, processor = (1e3 * median for median in medians[name])
        spread = f"{1e3 * min(calls)[0]:,.1f} to {1e3 * max(calls)[0]:,.1f}"
        line = f"{name:24} median {elapsed:9,.1f} ms ({spread}), processor {processor:9,.1f} ms"
        if name != base:
            ratios = [own / other for own, other in zip(medians[name], medians[base], strict=True)]
            line += f"; elapsed {ratios[0]:.3f}, processor {ratios[1]:.3f} x {base}"
        print(line)
    print(f"{len(next(iter(times.values())))} rounds by turns; load average {os.getloadavg()[0]:.2f}")
