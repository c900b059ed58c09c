"""Between which seconds a step lies: what published runs, or an unknown stack's parts, are off by.

Two kinds of published errors are kept. In one everything that a run's source says of its software and network is put
in, though no plan says it; in the other the plan alone, as by somebody who knows no more of his stack.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from estimator.describe.catalogue import read_data
from estimator.timing.roofline import PARTS
from estimator.timing.stack import NINE_OF_TEN, covariance

if TYPE_CHECKING:
    from collections.abc import Mapping

STATED, PLAN = "stated", "plan"  # the tables of data/residuals.toml


def regime(parts: Mapping[str, float]) -> str:
    """What most of a step's time goes to: "compute-bound", "bandwidth-bound", "network-bound" or "launch-bound"."""
    kinds = {
        "compute-bound": parts["matmul"] + parts["attention"],
        "bandwidth-bound": parts["elementwise"] + parts["optimizer"],
        "network-bound": parts["communication"],
        "launch-bound": parts["launch"],
    }
    return max(kinds, key=lambda name: kinds[name])


@cache
def _spreads(table: str) -> dict[str, tuple[tuple[float, float], str]]:
    return {
        name: ((entry["low"], entry["high"]), entry["rows"]) for name, entry in read_data("residuals")[table].items()
    }


def unknown(parts: Mapping[str, float]) -> float:
    """The deviation of the logarithm of an unknown stack's time over the predicted, by what its parts are off by."""
    seconds = np.array([parts[name] for name in PARTS])
    share = seconds / seconds.sum()
    return float(np.sqrt(share @ covariance() @ share + read_data("prior")["configuration"] ** 2))


def spread(parts: Mapping[str, float], *, stated: bool = False) -> tuple[tuple[float, float], str]:
    """(low, high): factors on a predicted time between which nine published runs of ten lie; and which runs.

    Where too few runs are of a step's regime, the interval is no narrower than that of an unknown stack's parts
    (`data/prior.toml`): nobody's host and network are known as well as kernels are.

    Args:
        parts: seconds of a step by part; what most of them go to says which runs are alike.
        stated: the attention kernel, what is in fp32 and the network were said, as far as the step has them.
    """
    found = _spreads(STATED if stated else PLAN)
    kind = regime(parts)
    if kind in found:
        return found[kind]
    (low, high), rows = found["all"]
    factor = float(np.exp(NINE_OF_TEN * unknown(parts)))
    if low <= 1 / factor and factor <= high:
        return (low, high), f"{rows} None, or too few, are {kind}."
    return (min(low, 1 / factor), max(high, factor)), (
        f"{rows} None, or too few, are {kind}: widened by what an unknown stack's parts are off by."
    )
