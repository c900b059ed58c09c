"""How far the predicted time is from the training runs that others published, by stack.

A stack is a source, a card and the software: its runs share what nobody wrote down, so that many runs of one stack say
little more than a few. Each stack weighs the same, however many runs it has. What is printed and written about it is
`estimator.studies.published_report`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from estimator.studies.runs import Run, runs
from estimator.timing.speed import regime, step_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from estimator.timing.roofline import Efficiency

SIX = 6  # rows of a stack, of which three calibrate the rest


@dataclass(frozen=True, slots=True)
class Judged:
    """A run beside its prediction, tokens per second of one accelerator, and what most of its time goes to."""

    run: Run
    predicted: float
    regime: str

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.run.measured - 1


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of a group of runs: absolute ones at the median and the 90th percentile, and the signed median.

    `independent`: as how many independent measurements the runs count.
    """

    group: str
    count: int
    independent: float
    median: float
    percentile_90: float
    bias: float


def predict(run: Run, e: Efficiency | None = None) -> Judged:
    """The run with its prediction; `e` in place of what its accelerator's kernels reach."""
    each = [step_times(run.model, p, run.accelerator, run.setup, e) for p in run.plans]
    parts = {name: sum(float(of[name][0]) for of in each) for name in each[0]}
    tokens = run.plan.batch_size * run.plan.tokens(run.model) * run.plan.grad_accumulation
    return Judged(run, tokens * len(each) / sum(parts.values()), regime(parts))


@cache
def judged() -> tuple[Judged, ...]:
    """Every published run with its prediction."""
    return tuple(predict(run) for run in runs())


def summary(of: Iterable[Judged], group: str) -> Summary:
    """The errors of some runs together; there must be at least one."""
    members = list(of)
    errors, weights = np.array([j.error for j in members]), np.array([j.run.weight for j in members])
    median, most = (quantile(np.abs(errors), weights, q) for q in (0.5, 0.9))
    return Summary(group, len(members), float(weights.sum()), median, most, quantile(errors, weights, 0.5))


def grouped(by: Callable[[Judged], str]) -> dict[str, list[Judged]]:
    """The runs by the value of `by`, in the order of first appearance."""
    groups: dict[str, list[Judged]] = {}
    for j in judged():
        groups.setdefault(by(j), []).append(j)
    return groups


def overall_of(judged: Iterable[Judged]) -> tuple[Summary, list[Summary]]:
    """(the means over the stacks, each stack) of some runs: a stack weighs the same, however many runs it has."""
    groups: dict[str, list[Judged]] = {}
    for j in judged:
        groups.setdefault(j.run.stack, []).append(j)
    found = [summary(members, group) for group, members in groups.items()]
    mean = {name: float(np.mean([getattr(s, name) for s in found])) for name in ("median", "percentile_90", "bias")}
    return Summary("mean over stacks", sum(s.count for s in found), sum(s.independent for s in found), **mean), found


def stacks() -> list[Summary]:
    """The errors of each stack."""
    return overall_of(judged())[1]


def overall() -> Summary:
    """The means over the stacks of what each has."""
    return overall_of(judged())[0]


def calibrated() -> dict[str, tuple[Summary, list[float]]]:
    """Of each stack of six rows or more: the errors of the rest once three of its rows have given its factor.

    The three are its rows at a quarter, a half and three quarters of the order in which they were published, and the
    factor is the middle of what they take over what was predicted. With the summary come measured over predicted times.
    """
    found = {}
    for stack, members in grouped(lambda j: j.run.stack).items():
        if len(members) < SIX:
            continue
        at = {len(members) * q // 4 for q in (1, 2, 3)}
        factor = float(np.median([1 + members[i].error for i in at]))
        rest = [
            replace(j, predicted=j.predicted / factor) for i, j in enumerate(members) if i not in at
        ]  # a time that many times as long
        found[stack] = summary(rest, stack), [1 + j.error for j in rest]
    return found


def worst(count: int = 10) -> tuple[Judged, ...]:
    """The runs that are predicted worst."""
    return tuple(sorted(judged(), key=lambda j: -abs(np.log1p(j.error)))[:count])


def quantile(values: NDArray[np.float64], weights: NDArray[np.float64], q: float) -> float:
    """The value below which a part `q` of the weights lies, half of a value's own included."""
    order = np.argsort(values)
    shares = weights[order] / weights.sum()
    below = np.cumsum(shares) - shares / 2
    return float(np.interp(q, below, values[order]))
