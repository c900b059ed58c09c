"""How alike the errors of two kernels are, by how far apart they are in size: what `data/prior.toml` calls octaves.

The semivariogram of predicted over timed seconds (Cressie 1993, section 2.4), of the products that somebody timed in
a sweep, by the logarithms of their m, n and k, and of single operators, by those of their rows and widths. Nothing here
looks at a training run.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from estimator.describe.catalogue import read_data
from estimator.hardware.accelerators import accelerator
from estimator.studies.operators import above_the_floor, predicted_seconds
from estimator.studies.runs import rows
from estimator.timing.roofline import efficiency, matmul_seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SWEEPS = {"A100 80GB PCIe": "a100-80gb-pcie", "B200 SXM": "b200-180gb-sxm"}
EDGES = (0.0, 0.01, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0)  # octaves; the first are repeats of one size
FEW = 10  # pairs that a median needs
DEVIATION = 0.6745  # of a normal distribution, its median absolute value


class Near(NamedTuple):
    """Pairs of about one distance: octaves, the deviation of either's error, as half of their difference has it."""

    octaves: float
    deviation: float
    pairs: int


def product_errors(gpu: str) -> tuple[Array, Array]:
    """((products, 3) octaves of b m, n and k, logarithms of timed over predicted) of a sweep."""
    data = [r for r in rows("gemm_efficiency") if r["gpu"] == gpu and r["op"] == "matmul"]
    a = accelerator(SWEEPS[gpu])
    e = efficiency(a)
    shape = {x: np.array([float(r[x]) for r in data]) for x in "bmnk"}
    b, m, n, k = (shape[x] for x in "bmnk")
    out = np.array([4.0 if r["out_dtype"] == "fp32" else 2.0 for r in data])
    again = np.array([2.0 if r["accumulate"] == "True" else 1.0 for r in data])
    shape["nbytes"] = b * (2 * m * k + 2 * k * n + out * again * m * n)
    peak = a.peak_flops("bf16")
    timed = 2 * b * m * n * k / (peak * np.array([float(r["efficiency"]) for r in data]))
    bandwidth = a.memory_bandwidth * e.memory[-1][1]
    predicted = matmul_seconds(shape, peak * e.matmul, bandwidth, a.sm_count or 1, e) + e.gap
    return np.log2(np.stack([b * m, n, k], axis=1)), np.log(timed / predicted)


def operator_errors() -> list[tuple[Array, Array]]:
    """The same of each operator's separate kernels, one way on one card: octaves of rows, width, vocabulary, f."""
    series: dict[tuple[str, ...], list[tuple[list[float], float]]] = {}
    for row in above_the_floor():
        if row.eager:
            at = [float(np.log2(row.sizes[name])) for name in ("T", "d", "V", "f")]
            key = (row.operator, row.provider, row.mode, row.gpu, row.dtype.name)
            series.setdefault(key, []).append((at, float(np.log(row.value / predicted_seconds(row)))))
    return [(np.array([x for x, _ in found]), np.array([y for _, y in found])) for found in series.values()]


def variogram(series: list[tuple[Array, Array]]) -> list[Near]:
    """The pairs within each of some series, by distance; medians, as few kernels are far off."""
    distance, difference = [], []
    for at, errors in series:
        first, second = np.triu_indices(len(errors), 1)
        distance.append(np.sqrt(((at[first] - at[second]) ** 2).sum(1)))
        difference.append(np.abs(errors[first] - errors[second]))
    h, d = np.concatenate(distance), np.concatenate(difference)
    found = []
    for low, high in pairwise(EDGES):
        here = (h >= low) & (h < high)
        if here.sum() >= FEW:
            deviation = float(np.median(d[here])) / DEVIATION / np.sqrt(2)
            found.append(Near(float(h[here].mean()), float(deviation), int(here.sum())))
    return found


@cache
def variograms() -> dict[str, list[Near]]:
    """Of the products of each sweep, and of the operators."""
    of_products = {f"products on {gpu}": variogram([product_errors(gpu)]) for gpu in SWEEPS}
    return {**of_products, "operators": variogram(operator_errors())}


def octaves(near: list[Near]) -> float:
    """Over how many the errors' correlation falls to a part e, where their deviation is that of `data/prior.toml`.

    The exponential variogram that goes nearest to the deviations: repeat**2 + each**2 (1 - exp(-h / octaves)).
    """
    each = float(read_data("prior")["each"])
    h, deviation = (np.array([getattr(x, name) for x in near]) for name in ("octaves", "deviation"))
    lengths, repeats = np.geomspace(0.5, 32, 97), np.linspace(0, deviation.min(), 41)
    fitted = np.sqrt(repeats[:, None, None] ** 2 + each**2 * (1 - np.exp(-h / lengths[None, :, None])))
    off = np.abs(fitted - deviation).mean(-1)
    return float(lengths[np.unravel_index(off.argmin(), off.shape)[1]])


def table() -> str:
    """The deviations by distance and the octaves, as a Markdown table."""
    lines = [f"| kernels | {' | '.join(f'{a:g} to {b:g}' for a, b in pairwise(EDGES))} | octaves |\n"]
    lines.append("|---" * (len(EDGES) + 1) + "|\n")
    for name, near in variograms().items():
        cells = []
        for low, high in pairwise(EDGES):
            here = [x for x in near if low <= x.octaves < high]
            cells.append(f"{here[0].deviation:.1%}" if here else "")
        lines.append(f"| {name} | {' | '.join(cells)} | {octaves(near):.1f} |\n")
    return "".join(lines)
