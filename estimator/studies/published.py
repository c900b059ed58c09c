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

from estimator.accounting.accounts import sizes_for
from estimator.studies.runs import Run, runs
from estimator.timing.intervals import regime
from estimator.timing.kernels import Variant
from estimator.timing.roofline import PARTS
from estimator.timing.speed import Setup, shape_of, step_times
from estimator.timing.stack import Logged, Shape, StackFactor, most_telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from numpy.typing import NDArray

    from estimator.timing.roofline import Efficiency

SIX = 6  # rows of a stack, of which three calibrate the rest
COMPILED = {"compiled"}  # in the name of a software, which a plan says too
DRAWS = 40  # of three rows
FACTORS = 401  # that are tried


@dataclass(frozen=True, slots=True)
class Judged:
    """A run beside its prediction, tokens per second of one accelerator, and what most of its time goes to.

    `parts`: the predicted seconds of a step by part.
    """

    run: Run
    predicted: float
    regime: str
    parts: Mapping[str, float]

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.run.measured - 1

    @property
    def shape(self) -> Shape:
        """How large its kernels and messages are."""
        m, p = self.run.model, self.run.plan
        return shape_of(sizes_for(m, p, threads=1), p)

    @property
    def logged(self) -> Logged:
        """It, as a log would have it."""
        parts = tuple(self.parts[name] for name in PARTS)
        return Logged(self.shape, parts, self.run.tokens / self.run.measured, 0.0, 1, self.run.stack)


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
    parts = {name: sum(float(of[name][0]) for of in each) / len(each) for name in each[0]}
    return Judged(run, run.tokens / sum(parts.values()), regime(parts), parts)


@cache
def judged() -> tuple[Judged, ...]:
    """Every published run with its prediction."""
    return tuple(predict(run) for run in runs())


@cache
def by_plan() -> tuple[Judged, ...]:
    """The same by the plan alone (compiled, float8), without what a source says of its software and network."""
    plain = []
    for run in runs():
        variant = run.setup.variant
        compiled = frozenset() if variant.by_hand or COMPILED.isdisjoint(run.software.split()) else variant.fused
        plain.append(replace(run, setup=Setup(Variant(compiled, float8=variant.float8))))
    return tuple(predict(run) for run in plain)


def summary(of: Iterable[Judged], group: str) -> Summary:
    """The errors of some runs together; there must be at least one."""
    members = list(of)
    errors, weights = np.array([j.error for j in members]), np.array([j.run.weight for j in members])
    median, most = (quantile(np.abs(errors), weights, q) for q in (0.5, 0.9))
    return Summary(group, len(members), float(weights.sum()), median, most, quantile(errors, weights, 0.5))


def grouped(by: Callable[[Judged], str], of: Iterable[Judged] | None = None) -> dict[str, list[Judged]]:
    """The runs, or those of `of`, by the value of `by`, in the order of first appearance."""
    groups: dict[str, list[Judged]] = {}
    for j in judged() if of is None else of:
        groups.setdefault(by(j), []).append(j)
    return groups


def overall_of(judged: Iterable[Judged]) -> tuple[Summary, list[Summary]]:
    """(the means over the stacks, each stack) of some runs: a stack weighs the same, however many runs it has."""
    found = [summary(members, group) for group, members in grouped(lambda j: j.run.stack, judged).items()]
    mean = {name: float(np.mean([getattr(s, name) for s in found])) for name in ("median", "percentile_90", "bias")}
    return Summary("mean over stacks", sum(s.count for s in found), sum(s.independent for s in found), **mean), found


def stacks() -> list[Summary]:
    """The errors of each stack."""
    return overall_of(judged())[1]


def overall() -> Summary:
    """The means over the stacks of what each has."""
    return overall_of(judged())[0]


@dataclass(frozen=True, slots=True)
class Calibrated:
    """The rest of a stack's rows, once three of them have given its factors.

    Attributes:
        errors: of those at a quarter, a half and three quarters of the order of publication.
        covered: part of all drawn rows that lie within the interval that was given for nine of ten.
        before: the median error of a row without factors.
        others: the median error of the rest, the middle of `DRAWS` draws of three rows, and the ninth worst in ten.
        telling: the median error of the rest after the three that `most_telling` picks, before any was measured.
        one_factor: the least median error that any one factor leaves of all rows: how far they scatter.
    """

    errors: Summary
    covered: float
    before: float
    others: tuple[float, float]
    telling: float
    one_factor: float


def calibrate(known: Iterable[Judged], rest: Iterable[Judged]) -> list[tuple[Judged, bool]]:
    """The rest as those that are known have it, each with whether it is within its interval."""
    stack = StackFactor(tuple(j.logged for j in known))
    found = []
    for j in rest:
        again = stack.calibrated({name: np.array([x]) for name, x in j.parts.items()}, j.shape)
        parts = {name: float(x[0]) for name, x in again.items()}
        predicted = j.run.tokens / sum(parts.values())
        low, high = stack.spread(j.parts, j.shape)
        found.append((replace(j, predicted=predicted, parts=parts), low <= predicted / j.run.measured <= high))
    return found


@cache
def calibrated() -> dict[str, Calibrated]:
    """Of each stack of six rows or more: the errors of the rest once three of its rows have given its factors."""
    found = {}
    for stack, members in grouped(lambda j: j.run.stack).items():
        if len(members) < SIX:
            continue
        random = np.random.default_rng(DRAWS)
        draws = [random.choice(len(members), 3, replace=False) for _ in range(DRAWS)]
        by_draw = [_rest(members, set(draw.tolist())) for draw in draws]
        medians = [summary([j for j, _ in rest], stack).median for rest in by_draw]
        drawn = [(j.run.weight, within) for rest in by_draw for j, within in rest]
        telling = set(most_telling([(j.logged.shape, j.logged.parts) for j in members], 3))
        found[stack] = Calibrated(
            summary([j for j, _ in _rest(members, {len(members) * q // 4 for q in (1, 2, 3)})], stack),
            sum(weight for weight, within in drawn if within) / sum(weight for weight, _ in drawn),
            summary(members, stack).median,
            (float(np.median(medians)), float(np.quantile(medians, 0.9))),
            summary([j for j, _ in _rest(members, telling)], stack).median,
            _one_factor(members),
        )
    return found


def _rest(members: list[Judged], at: set[int]) -> list[tuple[Judged, bool]]:
    return calibrate([members[i] for i in sorted(at)], [j for i, j in enumerate(members) if i not in at])


def _one_factor(members: list[Judged]) -> float:
    """The least median error of some runs with any one factor on the predictions."""
    ratios, weights = np.array([1 + j.error for j in members]), np.array([j.run.weight for j in members])
    factors = np.geomspace(1 / ratios.max(), 1 / ratios.min(), FACTORS)
    return min(quantile(np.abs(factor * ratios - 1), weights, 0.5) for factor in factors)


def worst(count: int = 10) -> tuple[Judged, ...]:
    """The runs that are predicted worst."""
    return tuple(sorted(judged(), key=lambda j: -abs(np.log1p(j.error)))[:count])


def quantile(values: NDArray[np.float64], weights: NDArray[np.float64], q: float) -> float:
    """The value below which a part `q` of the weights lies, half of a value's own included."""
    order = np.argsort(values)
    shares = weights[order] / weights.sum()
    below = np.cumsum(shares) - shares / 2
    return float(np.interp(q, below, values[order]))
