"""What the user's own log says of his stack, by part: how much longer kernels, messages and the host take there.

One number for the whole step would blame the kernels for a slow network. Here each part has a factor of its own, which
before any log is 1, give or take what an unknown stack is off by (`data/prior.toml`). Measured runs move the factors by
Bayes' rule: a part that most of the step goes to is moved most, two runs of different make tell parts apart, and a
single one moves them in step and leaves the prediction of other runs as uncertain as it should. The logarithm of each
factor is normal beforehand; as the time of a step is a sum of parts, the rule is applied to its linearisation until
that stands still (Gauss-Newton; Bell and Cathey 1993, the iterated Kalman filter's update).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from estimator.describe.catalogue import read_data
from estimator.timing.kernels import KINDS
from estimator.timing.roofline import PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

NINE_OF_TEN = 1.645  # deviations of a normal distribution on either side of its mean
TURNS = 100  # of the linearisation, at most
STILL = 1e-9  # change of a factor's logarithm at which it stands still
SAME = 1e-6  # part by which the predictions of one and the same run differ at most


@dataclass(frozen=True, slots=True)
class Logged:
    """A run of the user's: what was predicted for its step, and what was measured.

    Attributes:
        parts: predicted seconds of a step by part, in the order of `PARTS`, without any factor.
        measured: seconds of a step, the median.
        spread: standard deviation of the logarithm of that median.
        steps: how many were measured.
        source: which log.
    """

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
    """The parts' factors after the runs: their logarithms, and what an interval needs of the runs.

    shares: (runs, parts) of the measured time; inverse: of the covariance of the runs; residual: of each run, the
    logarithm of what is its configuration's own; own: the variance of that beforehand.
    """

    logs: Array
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

    def by_parts(self, parts: Mapping[str, Array]) -> dict[str, Array]:
        """Predicted seconds of a step by part, each as its stack has it."""
        return dict(zip(PARTS, _stacked(parts).T * np.exp(_fit(self.runs).logs)[:, None], strict=True))

    def calibrated(self, parts: Mapping[str, Array]) -> dict[str, Array]:
        """The same with what is a configuration's own: the run of a log comes out as it was measured."""
        own = np.exp(self._same(_stacked(parts)) @ _fit(self.runs).residual)
        return {name: x * own for name, x in self.by_parts(parts).items()}

    def spread(self, parts: Mapping[str, float]) -> tuple[float, float]:
        """(low, high): factors on the calibrated time between which nine runs of ten of this stack are expected.

        Args:
            parts: predicted seconds of a step by part, without the factor.
        """
        fit = _fit(self.runs)
        seconds = _stacked({name: np.array([x]) for name, x in parts.items()})
        scaled = seconds[0] * np.exp(fit.logs)
        share = scaled / scaled.sum()
        prior = covariance()
        towards = fit.shares @ prior @ share + fit.own * self._same(seconds)[0]
        variance = share @ prior @ share + fit.own - towards @ fit.inverse @ towards
        deviation = float(np.sqrt(max(variance, 0.0)))
        return float(np.exp(-NINE_OF_TEN * deviation)), float(np.exp(NINE_OF_TEN * deviation))

    def factors(self) -> dict[str, tuple[float, float, float]]:
        """By part: its factor, and how far it is known: the deviation of its logarithm, now and before any log."""
        fit, prior = _fit(self.runs), covariance()
        towards = prior @ fit.shares.T
        after = prior - towards @ fit.inverse @ towards.T
        before, now = (np.sqrt(np.maximum(np.diag(c), 0)) for c in (prior, after))
        return {name: (float(np.exp(fit.logs[i])), float(now[i]), float(before[i])) for i, name in enumerate(PARTS)}

    def _same(self, seconds: Array) -> Array:
        """(points, runs): 1 where a point is the run of a log itself."""
        those = np.array([run.parts for run in self.runs])
        near = np.abs(seconds[:, None] - those) <= SAME * those.sum(1)[:, None]
        return near.all(-1).astype(np.float64)


def covariance() -> Array:
    """(parts, parts): the covariance of the logarithms of the parts' factors, before any log (`data/prior.toml`)."""
    prior = read_data("prior")
    found = np.zeros((len(PARTS), len(PARTS)))
    for i, name in enumerate(PARTS):
        for j, other in enumerate(PARTS):
            if name in KINDS and other in KINDS:
                # Elementwise kernels and the optimizer's only move bytes: they are one kind.
                alike = name == other or {name, other} == {"elementwise", "optimizer"}
                found[i, j] = prior["kernels"] ** 2 + (prior["each"] ** 2 if alike else 0)
            elif name == other:
                found[i, j] = prior["messages" if name == "communication" else "host"] ** 2
    return found


def _stacked(parts: Mapping[str, Array]) -> Array:
    """(points, parts)."""
    return np.stack(np.broadcast_arrays(*(np.atleast_1d(parts[name]) for name in PARTS)), axis=-1).astype(np.float64)


@lru_cache(maxsize=256)
def _fit(runs: tuple[Logged, ...]) -> Fit:
    prior, own = covariance(), float(read_data("prior")["configuration"]) ** 2
    seconds = np.array([run.parts for run in runs])
    measured = np.log([run.measured for run in runs])
    # Two logs of one run share what is its own.
    near = np.abs(seconds[:, None] - seconds[None]) <= SAME * seconds.sum(1)[:, None, None]
    noise = own * near.all(-1) + np.diag([run.spread**2 for run in runs])
    certain = np.linalg.pinv(noise)

    def worse(of: Array) -> float:
        """How unlikely the factors and what they leave are: minus the logarithm of the posterior density."""
        left = measured - np.log((seconds * np.exp(prior @ of)).sum(1))
        return float(of @ prior @ of + left @ certain @ left)

    weights = np.zeros(len(PARTS))  # the factors' logarithms are the prior's covariance times these
    for _ in range(TURNS):
        scaled = seconds * np.exp(prior @ weights)
        shares = scaled / scaled.sum(1, keepdims=True)
        inverse = np.linalg.pinv(shares @ prior @ shares.T + noise)
        missing = measured - np.log(scaled.sum(1)) + shares @ prior @ weights
        change, step = shares.T @ inverse @ missing - weights, 1.0
        # Far from the prediction a whole step can overshoot.
        while step > STILL and worse(weights + step * change) > worse(weights):
            step /= 2
        weights = weights + step * change
        if step * np.abs(prior @ change).max() < STILL:
            break
    return Fit(prior @ weights, shares, inverse, own * inverse @ missing, own)
