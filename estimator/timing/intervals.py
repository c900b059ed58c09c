"""Between which seconds a step lies: what published runs, or an unknown stack's parts, are off by.

Two kinds of published errors are kept. In one everything that a run's source says of its software and network is put
in, though no plan says it; in the other the plan alone, as by somebody who knows no more of his stack.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from estimator.describe.catalogue import read_data
from estimator.timing.kernels import KINDS
from estimator.timing.roofline import PARTS
from estimator.timing.stack import NINE_OF_TEN, covariance

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

STATED, PLAN, FEW = "stated", "plan", "few"  # the tables of data/residuals.toml
REGIMES = ("compute-bound", "bandwidth-bound", "network-bound", "launch-bound")
SHOWN = 0.99  # a widening of less is not said


def regime(parts: Mapping[str, float]) -> str:
    """What most of a step's time goes to, one of `REGIMES`."""
    products, bytes_ = parts["matmul"] + parts["attention"], parts["elementwise"] + parts["optimizer"]
    kinds = dict(zip(REGIMES, (products, bytes_, parts["communication"], parts["launch"]), strict=True))
    return max(kinds, key=lambda name: kinds[name])


class Errors(NamedTuple):
    """Measured over predicted time of some published runs: nine of ten lie between `low` and `high`; `rows` says which.

    Of runs that are too few for that, all do.
    """

    low: float
    high: float
    rows: str


@cache
def _errors(table: str) -> tuple[dict[str, Errors], dict[str, Errors]]:
    """(those of all runs and of each regime that has enough, those of each other regime that has any)."""
    of = dict(read_data("residuals")[table])
    few = of.pop(FEW, {})
    enough, too_few = ({name: Errors(**entry) for name, entry in found.items()} for found in (of, few))
    return enough, too_few


def unknown(parts: Mapping[str, float]) -> float:
    """The deviation of the logarithm of an unknown stack's time over the predicted, by what its parts are off by."""
    share = _shares(parts)
    return float(np.sqrt(share @ covariance() @ share + read_data("prior")["configuration"] ** 2))


def waited(parts: Mapping[str, float]) -> float:
    """The part of that which its messages and its host are off by."""
    share = np.where([name in KINDS for name in PARTS], 0.0, _shares(parts))
    return float(np.sqrt(share @ covariance() @ share))


def _shares(parts: Mapping[str, float]) -> NDArray[np.float64]:
    seconds = np.array([parts[name] for name in PARTS])
    return np.asarray(seconds / seconds.sum())


def spread(parts: Mapping[str, float], *, stated: bool = False) -> tuple[tuple[float, float], str]:
    """(low, high): factors on a predicted time between which nine published runs of ten lie; and which runs.

    Published runs say what kernels are off by; most of them wait little for messages and for the host, which nobody
    knows as well. So what these two are off by (`data/prior.toml`) is added as they share in the step, as independent
    errors add. Where no published run, or too few, are of a step's regime, the interval is no narrower than what an
    unknown stack's parts are off by, nor than those few.

    Args:
        parts: seconds of a step by part; what most of them go to says which runs are alike.
        stated: the attention kernel, what is in fp32 and the network were said, as far as the step has them.
    """
    enough, too_few = _errors(STATED if stated else PLAN)
    kind = regime(parts)
    errors = enough.get(kind, enough["all"])
    if kind not in enough:  # no narrower than that of any other regime either
        errors = errors._replace(low=min(x.low for x in enough.values()), high=max(x.high for x in enough.values()))
    low, high = _added(errors.low, errors.high, NINE_OF_TEN * waited(parts))
    said = [errors.rows]
    if kind not in enough:
        factor = float(np.exp(NINE_OF_TEN * unknown(parts)))
        few = too_few.get(kind)
        said.append(few.rows if few else f"None of them is {kind}.")
        ends = (low, high, 1 / factor, factor, *(few[:2] if few else ()))
        low, high = min(ends), max(ends)
        said.append("Widened by what an unknown stack's parts are off by.")
    elif low < SHOWN * errors.low:
        share = sum(parts[name] for name in PARTS if name not in KINDS) / sum(parts.values())
        said.append(f"Widened by what an unknown network and host are off by, which take {share:.0%} of the step.")
    return (low, high), " ".join(said)


def _added(low: float, high: float, error: float) -> tuple[float, float]:
    """The interval of a factor with an independent one, of such a logarithm on either side, added."""
    below, above = (float(np.hypot(np.log(end), error)) for end in (low, high))
    return float(np.exp(-below)), float(np.exp(above))
