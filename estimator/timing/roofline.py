"""Seconds of a step: each kernel of the ledger on an accelerator's peak, bandwidth and efficiencies.

A kernel takes the longer of its arithmetic and its bytes, and a fixed cost for being launched. What a kernel reaches of
the peak is data (`data/efficiency.toml`), fitted to published measurements of kernels by `tools/fit_efficiency.py`, one
set for an accelerator; measured training runs are what judges it (`studies.published`), never what it is fitted to.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.describe.catalogue import number, read_data
from estimator.describe.checks import ConfigError, choose
from estimator.eager.ledger import Phase
from estimator.timing import float8
from estimator.timing.kernels import COLUMNS, HALF, KINDS, LISTED

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator
    from estimator.timing.kernels import Table

    Array = NDArray[np.float64]

SPLITS = (1, 2, 4, 8)  # ways to cut the sum of a product with few tiles, as cuBLAS's split-K kernels do
PARTS = (*KINDS, "communication", "launch")


@dataclass(frozen=True, slots=True)
class Flash:
    """A fused attention kernel: FLOP/s over peak on a long sequence, and what short ones lose.

    Attributes:
        head_dims, forward, backward: fraction of the peak in each direction at each head width; between them linear,
            beyond them the nearest.
        rows: fixed work of one query row, as a number of keys (prologue, softmax's rescaling, epilogue).
        diagonal: width of a tile; of those on the diagonal of a causal mask the empty half is computed too.
    """

    head_dims: tuple[float, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    rows: float
    diagonal: float


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What kernels reach on one accelerator.

    Attributes:
        origin: where the figures come from, a sentence.
        matmul: fraction of the peak of a product in large tiles, long in every direction, on tensor cores.
        single: the same in fp32 and fp64, where the board's power limits nothing.
        depth: prologue and epilogue of a tile, as a number of steps along k.
        tiles: (m, n) of the tiles that a library chooses from.
        tile_cost: a tile of s elements runs at s / (s + tile_cost) of that fraction: small ones load more for each
            FLOP.
        fixed: factor on both for a 16-bit product: they are so many clocks, in which this card's multiprocessors do
            less or more than those of the card that was timed.
        unaligned: fraction of that rate of a 16-bit product with a matrix whose rows begin at odd places.
        quantised: how much of a last, partly filled wave of tiles is paid for: 1 all of it, 0 its share.
        flash: the fused attention kernels by name.
        attention: the one that `scaled_dot_product_attention` takes.
        memory: (bytes, fraction of the bandwidth) of kernels that move so much, in rising order of bytes; between them
            linear in the logarithm, beyond them the nearest.
        slower: by name of kernel, its time over that of one that only moves the same bytes.
        pace: by name of kernel and bytes of an element ("gelu/2"), bytes/s at which its arithmetic is done, however
            fast they are moved: what a CPU's kernels wait for.
        walk: by how a kernel walks its operands (`estimator.eager.ledger.ACCESSES`), elements that a multiprocessor
            does in a clock: with an offset to compute or a dtype to convert for each, that limits it, not the bytes.
        clock: the clock that the card runs at over the datasheet's, for which its peaks are given.
        gap: seconds of the device between one kernel and the next.
        host: seconds that the host takes to launch one from Python.
        checkpoint: seconds of the host to checkpoint a block and to prepare its recomputation.
        asynchronous: the host runs ahead of the device (CUDA), so that only the slower of both is waited for.
        within, between: fraction of the link inside a node and between nodes that a large collective reaches.
        latency: seconds of one hop of a collective.
        contention: part of a hidden collective's time by which it slows what hides it.
    """

    origin: str
    matmul: float
    single: float
    depth: float
    tiles: tuple[tuple[int, int], ...]
    tile_cost: float
    quantised: float
    flash: Mapping[str, Flash]
    attention: str
    memory: tuple[tuple[float, float], ...]
    slower: Mapping[str, float]
    gap: float
    host: float
    checkpoint: float
    asynchronous: bool
    within: float
    between: float
    latency: float
    contention: float
    pace: Mapping[str, float] = field(default_factory=dict)
    walk: Mapping[str, float] = field(default_factory=dict)
    unaligned: float = 1.0
    fixed: float = 1.0
    clock: float = 1.0


def matmul_seconds(
    shape: Mapping[str, Array],
    peak: Any,
    bandwidth: Any,
    processors: float,
    e: Efficiency,
    most: Mapping[str, Array] | None = None,
    fixed: Any = 1.0,
) -> Array:
    """Seconds of a batched product of b x (m, k) x (k, n) that moves `nbytes`, by the best of the library's tiles.

    `peak` is what large tiles reach, in FLOP/s. `most`: of experts' products, how many times the mean of m, and of k,
    the most loaded expert has; the others share what is left. `fixed`: factor on what each tile costs beside its sum.

    A tile takes k + depth steps; tiles run in waves of one a processor. Few tiles on a long sum are split along it, for
    the price of writing and reading the partial sums in fp32. A wave is over when its longest tile is.
    """
    b, m, n, k = (shape[name] for name in "bmnk")
    uneven_m, uneven_k = (1.0, 1.0) if most is None else (most["m"], most["k"])
    others = m * np.where(b > 1, (b - uneven_m) / np.maximum(b - 1, 1), 1)
    rate, depth, tile_cost = peak / processors, e.depth * fixed, e.tile_cost * fixed
    best = np.full(np.broadcast_shapes(m.shape, np.shape(rate)), np.inf)
    for tile_m, tile_n in e.tiles:
        area = tile_m * tile_n
        steps = 2 * area / (rate * area / (area + tile_cost))
        rows = np.ceil(uneven_m * m / tile_m) + (b - 1) * np.ceil(others / tile_m)
        tiles = rows * np.ceil(n / tile_n) / processors
        for split in SPLITS:
            waves = e.quantised * np.ceil(tiles * split) + (1 - e.quantised) * np.maximum(tiles * split, 1)
            sums = 0 if split == 1 else 2 * 4 * split * b * m * n / bandwidth
            longest = np.maximum(waves * (k / split + depth), uneven_k * k / split + depth)
            best = np.minimum(best, longest * steps + sums)
    return np.maximum(best, shape["nbytes"] / bandwidth)


def flash_seconds(
    shape: Mapping[str, Array], backward: Array, peak: Any, bandwidth: Any, flash: Flash, masked: Any = False
) -> Array:
    """Seconds of a fused attention of b heads, m x n scores, k = products x head_dim; `backward` says which.

    A causal one leaves out half of the scores, one that is `masked` by a tensor none.
    """
    products = np.where(backward, 5, 2)
    width = shape["k"] / products
    fraction = np.where(
        backward,
        np.interp(width, flash.head_dims, flash.backward),
        np.interp(width, flash.head_dims, flash.forward),
    )
    scores = shape["m"] * (np.where(masked, shape["n"], shape["n"] / 2 + flash.diagonal / 2) + flash.rows)
    return np.maximum(2 * shape["b"] * scores * shape["k"] / (peak * fraction), shape["nbytes"] / bandwidth)


def moving_seconds(nbytes: Array, bandwidth: float, e: Efficiency) -> Array:
    """Seconds of a kernel that only moves bytes."""
    at, fractions = zip(*e.memory, strict=True)
    fraction = fractions[0] if len(at) == 1 else np.interp(np.log(np.maximum(nbytes, 1)), np.log(at), fractions)
    return np.asarray(nbytes / (bandwidth * fraction))


def kernel_seconds(
    table: Table,
    shape: Mapping[str, Array],
    accelerator: Accelerator,
    e: Efficiency,
    *,
    sizes: Mapping[str, Any] | None = None,
    half: str = "bf16",
    single: str = "fp32",
    kernel: str | None = None,
    imbalance: float = 1.0,
) -> Array:
    """(rows, points): seconds of one launch of each row; arguments as for `busy`."""
    bandwidth = accelerator.memory_bandwidth
    # A CPU's caches are faster than its memory; a GPU's memory is at its fastest when most is moved.
    streaming = np.maximum(shape["nbytes"] / moving_seconds(shape["nbytes"], bandwidth, e), bandwidth * e.memory[-1][1])
    dtype = {width: half if width == 2 else single for width in set(table.width.tolist())}
    peaks = {width: e.clock * accelerator.peak_flops(name) for width, name in dtype.items()}
    reached = {width: peaks[width] * (e.single if dtype[width] in ("fp32", "fp64") else e.matmul) for width in peaks}
    peak, rate = (np.array([by[width] for width in table.width.tolist()])[:, None] for by in (peaks, reached))
    if table.float8.any():
        eight = e.clock * accelerator.peak_flops("fp8")  # refused here by cards without
        rate = np.where(table.float8[:, None], eight * e.matmul * float8.reached(accelerator.id), rate)
    seconds = moving_seconds(shape["nbytes"], bandwidth, e) * table.slower(e.slower)[:, None]
    seconds = np.maximum(seconds, shape["nbytes"] / table.pace(e.pace)[:, None])
    if e.walk:
        clocks = (accelerator.sm_count or np.inf) * (accelerator.boost_clock or np.inf) * e.clock
        seconds = np.maximum(seconds, shape["elements"] / (table.walk(e.walk)[:, None] * clocks))
    if table.gemm.any():
        part = {name: shape[name][table.gemm] for name in COLUMNS}
        reach = rate[table.gemm]
        if sizes is not None and e.unaligned < 1:
            reach = reach * np.where(table.unaligned(sizes)[table.gemm], e.unaligned, 1.0)
        most = {name: np.where(of[table.gemm], imbalance, 1.0)[:, None] for name, of in table.grouped.items()}
        fixed = np.where(table.width[table.gemm] == HALF, e.fixed, 1.0)[:, None]
        processors = accelerator.sm_count or 1
        seconds[table.gemm] = matmul_seconds(part, reach, streaming[table.gemm], processors, e, most, fixed)
    if table.flash.any():
        part = {name: shape[name][table.flash] for name in COLUMNS}
        flash = e.flash[choose("attention kernel", kernel or e.attention, e.flash)]
        backward, masked = (of[table.flash][:, None] for of in (table.backward, table.masked))
        seconds[table.flash] = flash_seconds(part, backward, peak[table.flash], streaming[table.flash], flash, masked)
    return seconds


def in_a_rank(p: Plan, sizes: Mapping[str, Any]) -> Any:
    """Rows of the most loaded expert over the mean of those of its accelerator: all experts, or as many as it has.

    The other experts get the same each, so that its accelerator's mean is above that of all.
    """
    if p.expert_parallel == 1:
        return p.imbalance
    own, others = sizes["E"] // p.expert_parallel, sizes["E"] - 1
    return p.imbalance * own / (p.imbalance + (own - 1) * (sizes["E"] - p.imbalance) / others)


@dataclass(frozen=True, slots=True)
class Busy:
    """What an accelerator and its host do in a step, at each point (one, or as many as the sizes have).

    Attributes:
        kinds: device seconds by kind of kernel (`estimator.timing.kernels.KINDS`).
        phases: seconds by phase of the step, of what is slower in it: the device with the gaps between its kernels, or
            the host that launches them. Where the device does not run by itself, of both.
        launch: seconds of the phases in which no kernel runs.
    """

    kinds: Mapping[str, Array]
    phases: Mapping[Phase, Array]
    launch: Array


def busy(
    table: Table,
    shape: Mapping[str, Array],
    sizes: Mapping[str, Any],
    micro_batches: Any,
    accelerator: Accelerator,
    e: Efficiency,
    *,
    half: str = "bf16",
    single: str = "fp32",
    kernel: str | None = None,
    imbalance: float = 1.0,
) -> Busy:
    """Seconds of the kernels of one optimizer step.

    Args:
        table: the kernels.
        shape: what `table.at` the sizes is.
        sizes: the sizes; of blocks as many as they say.
        micro_batches: how many forward and backward passes.
        accelerator: what they run on.
        e: what they reach there.
        half: dtype of products of 16-bit factors.
        single: dtype of products of 32-bit factors.
        kernel: the attention kernel, if not the accelerator's own.
        imbalance: rows of the most loaded expert over the mean.

    Raises:
        ConfigError: the accelerator has no peak for a dtype that the step multiplies in.
    """
    seconds = kernel_seconds(
        table, shape, accelerator, e, sizes=sizes, half=half, single=single, kernel=kernel, imbalance=imbalance
    )
    times, turns, later = table.stretches(sizes, micro_batches)
    each = seconds * later
    spent = (times @ turns) * each
    kinds = {kind: spent[table.kind == kind].sum(0) for kind in KINDS}
    lists = shape["listed"]
    count = later * np.where(lists > 0, lists / LISTED, 1)
    checkpointed: Any = table.checkpoints
    if table.checkpoint_every is not None:
        checkpointed = (np.asarray(sizes["L"]) // table.checkpoint_every) * np.asarray(micro_batches)
    phases, launch = {}, np.zeros(1)
    working: tuple[Phase, ...] = (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER)
    for phase in working:
        here = table.phase == phase
        there = times[here].T
        kernels = there @ each[here]  # (stretches, points)
        device = kernels + e.gap * (there @ count[here])
        calls = there @ (count[here] * table.calls[here][:, None])
        host = e.host * calls
        if phase is Phase.BACKWARD:
            # Each checkpointed block costs the host as much; stretches have them as they have operators.
            host = host + e.checkpoint * checkpointed * calls / np.maximum((calls * turns).sum(0), 1)
        # Where the device runs by itself, each stretch takes what is slower of it and of the host that launches it.
        phases[phase] = ((np.maximum(device, host) if e.asynchronous else device + host) * turns).sum(0)
        launch = launch + phases[phase] - (kernels * turns).sum(0)
    return Busy(kinds, phases, launch)


def parts(work: Busy, exposed: Array) -> dict[str, Array]:
    """Seconds of a step by part (`PARTS`); they add up to the step."""
    return {**work.kinds, "communication": exposed, "launch": work.launch}


def efficiency(a: Accelerator) -> Efficiency:
    """What kernels reach on `a`: its own profile's figures, else the catalogue's for it or for its architecture.

    Raises:
        ConfigError: a profile's `calibration` table cannot be read.
    """
    if a.profile is not None:
        return _profiled(a.profile, Path(a.profile).stat().st_mtime_ns)
    return _catalogued(a.id, a.architecture)


@lru_cache(maxsize=256)
def _catalogued(id_: str, architecture: str) -> Efficiency:
    data = read_data("efficiency")
    entry = data["architecture"].get(architecture)
    if entry is None:
        entry = data["architecture"][data["default"]]
        origin = f"Nobody has published measurements of {architecture or id_}: {data['default']}'s efficiencies."
        return built({**entry, "origin": origin})
    return built({**entry, **data["accelerator"].get(id_, {})})


@lru_cache(maxsize=8)
def _profiled(path: str, written: int) -> Efficiency:  # noqa: ARG001 - a profile that is written again is read again
    with Path(path).open("rb") as file:
        table = tomllib.load(file).get("calibration")
    if not isinstance(table, dict):
        raise ConfigError(f"profile {path!r}: calibration is missing; `estimate calibrate` writes it, or give an mfu")
    try:
        return built(table)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"profile {path!r}: its calibration table is not what `estimate calibrate` writes ({error})"
        ) from None


def built(table: Mapping[str, Any]) -> Efficiency:
    """The Efficiency of a table of a data file.

    Raises:
        ConfigError: a fraction is not above 0, or above 1.
        KeyError, TypeError, ValueError: the table has other fields.
    """
    plain = dict(table)
    for name in ("matmul", "single", "within", "between", "unaligned"):
        number(name, plain.get(name, 1), above=True, most=1)
    for name in ("depth", "tile_cost", "quantised", "gap", "host", "checkpoint", "latency", "contention"):
        number(name, plain[name])
    for name in ("clock", "fixed"):
        number(name, plain.get(name, 1), above=True)
    flash: dict[str, Flash] = {}
    for name, kernel in plain.pop("flash").items():
        fields: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in kernel.items()}
        flash[name] = Flash(**fields)
        for fraction in (*flash[name].forward, *flash[name].backward):
            number("flash", fraction, above=True, most=1)
    for name in ("tiles", "memory"):
        plain[name] = tuple((x, y) for x, y in plain[name])
    for _, fraction in plain["memory"]:
        number("memory", fraction, above=True)
    return Efficiency(**plain, flash=flash)
