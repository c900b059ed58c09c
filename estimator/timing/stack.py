"""What the user's own log says of his stack, by part: how much longer kernels, messages and the host take there.

One number for the whole step would blame the kernels for a slow network. Here each part has a factor of its own, which
before any log is 1, give or take what an unknown stack is off by (`data/prior.toml`). Measured runs move the factors by
Bayes' rule: a part that most of the step goes to is moved most, two runs of different make tell parts apart, and a
single one moves them in step and leaves the prediction of other runs as uncertain as it should.

How far a kind of kernel is off depends on how large the kernels are, and the more alike two kernels are in size, the
more alike are their errors: so the timings of single kernels say (`estimator.studies.nearness`). So a factor is a
function of the run's sizes, a Gaussian process whose covariance falls off exponentially with the distance in octaves
(Rasmussen and Williams 2006, section 2.2); a log says more of runs of its own size than of others. The logarithm of
each factor is normal beforehand; as the time of a step is a sum of parts, the rule is applied to its linearisation
until that stands still (Gauss-Newton; Bell and Cathey 1993, the iterated Kalman filter's update).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.describe.catalogue import read_data
from estimator.timing.kernels import KINDS
from estimator.timing.roofline import PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

NINE_OF_TEN = 1.645  # deviations of a normal distribution on either side of its mean
TURNS = 100  # of the linearisation, at most
STILL = 1e-9  # change of a factor's logarithm at which it stands still
SAME = 1e-6  # part by which the predictions of one and the same run differ at most


class Shape(NamedTuple):
    """What decides how large the kernels and messages of a run are; numbers, or arrays of one length.

    Attributes:
        rows: tokens of a micro-batch of one accelerator, the rows of its products.
        width: d_model, which the other two sizes of a product go with.
        accelerators: how many send each other messages.
    """

    rows: Any
    width: Any
    accelerators: Any

    def octaves(self) -> Array:
        """(points, 3): their logarithms to base 2."""
        columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in self))
        return np.log2(np.stack(columns, axis=-1))


@dataclass(frozen=True, slots=True)
class Logged:
    """A run of the user's: what was predicted for its step, and what was measured.

    Attributes:
        shape: its sizes.
        parts: predicted seconds of a step by part, in the order of `PARTS`, without any factor.
        measured: seconds of a step, the median.
        spread: standard deviation of the logarithm of that median.
        steps: how many were measured.
        source: which log.
    """

    shape: Shape
    parts: tuple[float, ...]
    measured: float
    spread: float
    steps: int
    source: str

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / sum(self.parts)


class Fit(NamedTuple):
    """What the runs say of the parts' factors, and what a prediction needs of the runs.

    weights: (runs, parts) such that the covariance with them gives the factors' logarithms anywhere; shares: (runs,
    parts) of the measured time; inverse: of the covariance of the runs; residual: of each run, the logarithm of what is
    its configuration's own; own: the variance of that beforehand.
    """

    weights: Array
    shares: Array
    inverse: Array
    residual: Array
    own: float


@dataclass(frozen=True, slots=True)
class StackFactor:
    """What the runs of one stack say of it; one run or several (`estimate calibrate --log`)."""

    runs: tuple[Logged, ...]

    @property
    def source(self) -> str:
        """The logs."""
        return ", ".join(dict.fromkeys(run.source for run in self.runs))

    def by_parts(self, parts: Mapping[str, Array], shape: Shape) -> dict[str, Array]:
        """Predicted seconds of a step by part, each as its stack has it; of runs of that shape."""
        logs = np.einsum("ipjq,jq->ip", _between(shape.octaves(), _shapes(self.runs)), _fit(self.runs).weights)
        return dict(zip(PARTS, (_stacked(parts) * np.exp(logs)).T, strict=True))

    def calibrated(self, parts: Mapping[str, Array], shape: Shape) -> dict[str, Array]:
        """The same with what is a configuration's own: the run of a log comes out as it was measured."""
        own = np.exp(self._same(_stacked(parts)) @ _fit(self.runs).residual)
        return {name: x * own for name, x in self.by_parts(parts, shape).items()}

    def spread(self, parts: Mapping[str, float], shape: Shape) -> tuple[float, float]:
        """(low, high): factors on the calibrated time between which nine runs of ten of this stack are expected.

        Args:
            parts: predicted seconds of a step by part, without the factor.
            shape: the run's sizes.
        """
        fit, prior = _fit(self.runs), covariance()
        plain = {name: np.array([x]) for name, x in parts.items()}
        scaled = np.stack([x[0] for x in self.by_parts(plain, shape).values()])
        share = scaled / scaled.sum()
        same = self._same(_stacked(plain))[0]
        towards = np.einsum("p,pjq,jq->j", share, self._towards(shape), fit.shares) + fit.own * same
        variance = share @ prior @ share + fit.own - towards @ fit.inverse @ towards
        deviation = float(np.sqrt(max(variance, 0.0)))
        return float(np.exp(-NINE_OF_TEN * deviation)), float(np.exp(NINE_OF_TEN * deviation))

    def factors(self, shape: Shape | None = None) -> dict[str, tuple[float, float, float]]:
        """By part: its factor, and how far it is known: the deviation of its logarithm, now and before any log.

        Args:
            shape: of the run that they are for; None for the last one of the logs.
        """
        shape = self.runs[-1].shape if shape is None else shape
        fit, prior, between = _fit(self.runs), covariance(), self._towards(shape)
        logs = np.einsum("pjq,jq->p", between, fit.weights)
        towards = np.einsum("pjq,jq->pj", between, fit.shares)
        after = prior - towards @ fit.inverse @ towards.T
        before, now = (np.sqrt(np.maximum(np.diag(c), 0)) for c in (prior, after))
        return {name: (float(np.exp(logs[i])), float(now[i]), float(before[i])) for i, name in enumerate(PARTS)}

    def _towards(self, shape: Shape) -> Array:
        """(parts, runs, parts): the covariance of one run's factors with those of the logs."""
        return _between(shape.octaves(), _shapes(self.runs))[0]

    def _same(self, seconds: Array) -> Array:
        """(points, runs): 1 where a point is the run of a log itself."""
        those = np.array([run.parts for run in self.runs])
        near = np.abs(seconds[:, None] - those) <= SAME * those.sum(1)[:, None]
        return near.all(-1).astype(np.float64)


class Prior(NamedTuple):
    """Covariances of the logarithms of the parts' factors, before any log, (parts, parts) each (`data/prior.toml`).

    stack: what all runs of a stack share; kinds: of kernels, the more alike, the nearer in size; links: of messages,
    the more alike, the nearer the numbers of accelerators. octaves: over which the latter two fall to a part e.
    """

    stack: Array
    kinds: Array
    links: Array
    octaves: float


@cache
def _prior() -> Prior:
    prior = read_data("prior")
    stack, kinds, links = (np.zeros((len(PARTS), len(PARTS))) for _ in range(3))
    for i, name in enumerate(PARTS):
        for j, other in enumerate(PARTS):
            if name in KINDS and other in KINDS:
                # Elementwise kernels and the optimizer's only move bytes: they are one kind.
                alike = name == other or {name, other} == {"elementwise", "optimizer"}
                stack[i, j], kinds[i, j] = prior["kernels"] ** 2, prior["each"] ** 2 if alike else 0
            elif name == other == "communication":
                stack[i, j], links[i, j] = prior["messages"] ** 2, prior["links"] ** 2
            elif name == other:
                stack[i, j] = prior["host"] ** 2
    return Prior(stack, kinds, links, float(prior["octaves"]))


Of = tuple[Shape, tuple[float, ...]]  # the sizes of a run, and its predicted seconds by part


def most_telling(candidates: Sequence[Of], count: int, logged: Sequence[Of] = ()) -> list[int]:
    """Which runs to log, so that all of the candidates are then known best: their places, the most telling first.

    Each in turn is the one that leaves the least variance in the mean over all (greedy A-optimal design). What the logs
    say is not needed, only what they would be of.

    Args:
        candidates: the runs that may be logged.
        count: how many are wanted, at most as many as there are.
        logged: those that have been.
    """
    everyone = (*candidates, *logged)
    at = np.concatenate([shape.octaves() for shape, _ in everyone])
    seconds = np.array([parts for _, parts in everyone])
    shares = seconds / seconds.sum(1, keepdims=True)
    known = np.einsum("ip,ipjq,jq->ij", shares, _between(at, at), shares)
    own, some, chosen = float(read_data("prior")["configuration"]) ** 2, len(candidates), list[int]()
    rest = list(range(some, len(everyone)))
    while len(chosen) < min(count, some):
        gain = (known[:some, :some] ** 2).sum(0) / (np.diag(known)[:some] + own)
        gain[chosen] = -1.0
        best = rest.pop() if rest else int(gain.argmax())
        if best < some:
            chosen.append(best)
        known = known - np.outer(known[:, best], known[best]) / (known[best, best] + own)
    return chosen


def covariance() -> Array:
    """(parts, parts): the covariance of the logarithms of the parts' factors of one run, before any log."""
    prior = _prior()
    return prior.stack + prior.kinds + prior.links


def _between(these: Array, those: Array) -> Array:
    """(these, parts, those, parts): the same covariance between runs of two lists of shapes, in octaves.

    Of a product of (m, k) x (k, n), m is rows and both k and n go with the width.
    """
    prior = _prior()
    rows, width, accelerators = np.moveaxis(these[:, None] - those[None], -1, 0)
    kernels = np.exp(-np.hypot(rows, np.sqrt(2) * width) / prior.octaves)
    messages = np.exp(-np.abs(accelerators) / prior.octaves)
    found = prior.stack + kernels[..., None, None] * prior.kinds + messages[..., None, None] * prior.links
    return np.asarray(found.transpose(0, 2, 1, 3))


def _shapes(runs: tuple[Logged, ...]) -> Array:
    """(runs, 3)."""
    return np.concatenate([run.shape.octaves() for run in runs])


def _stacked(parts: Mapping[str, Array]) -> Array:
    """(points, parts)."""
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(parts[name]) for name in PARTS)), axis=-1).astype(np.float64)


@lru_cache(maxsize=256)
def _fit(runs: tuple[Logged, ...]) -> Fit:
    own = float(read_data("prior")["configuration"]) ** 2
    at = _shapes(runs)
    prior = _between(at, at)
    seconds = np.array([run.parts for run in runs])
    measured = np.log([run.measured for run in runs])
    # Two logs of one run share what is its own.
    near = np.abs(seconds[:, None] - seconds[None]) <= SAME * seconds.sum(1)[:, None, None]
    noise = own * near.all(-1) + np.diag([run.spread**2 for run in runs])
    certain = np.linalg.pinv(noise)

    def factors(of: Array) -> Array:
        return np.einsum("ipjq,jq->ip", prior, of)

    def worse(of: Array) -> float:
        """How unlikely the factors and what they leave are: minus the logarithm of the posterior density."""
        logs = factors(of)
        left = measured - np.log((seconds * np.exp(logs)).sum(1))
        return float((of * logs).sum() + left @ certain @ left)

    weights = np.zeros_like(seconds)
    for _ in range(TURNS):
        logs = factors(weights)
        scaled = seconds * np.exp(logs)
        shares = scaled / scaled.sum(1, keepdims=True)
        inverse = np.linalg.pinv(np.einsum("ip,ipjq,jq->ij", shares, prior, shares) + noise)
        missing = measured - np.log(scaled.sum(1)) + (shares * logs).sum(1)
        change, step = shares * (inverse @ missing)[:, None] - weights, 1.0
        # Far from the prediction a whole step can overshoot.
        while step > STILL and worse(weights + step * change) > worse(weights):
            step /= 2
        weights = weights + step * change
        if step * np.abs(factors(change)).max() < STILL:
            break
    return Fit(weights, shares, inverse, own * inverse @ missing, own)
