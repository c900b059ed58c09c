"""Thousands of configurations at once: memory, time and cost over a range of one or two inputs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.accounting.accounts import recipe_of, sizes_for, vectorised_peak
from estimator.accounting.vectorised import FOLLOWING, whole_numbers
from estimator.answers.estimates import max_batch_size
from estimator.describe.checks import POINTS, ConfigError, choose, shown
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import limits
from estimator.describe.units import JOULES_PER_KILOWATT_HOUR, SECONDS_PER_HOUR
from estimator.hardware.accelerators import accelerator
from estimator.memory.device import NCCL_BYTES
from estimator.pricing.money import cost
from estimator.timing.speed import times

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.answers.request import Request
    from estimator.timing.speed import Setup

    Array = NDArray[np.float64]

MODEL_AXES = ("num_layers", "d_model", "num_heads", "d_ff", "vocab_size")
PLAN_AXES = {"batch_size": "B", "seq_len": "T"}
RUN_AXES = ("count", "global_batch_size", "steps")
AXES = (*PLAN_AXES, *MODEL_AXES, *RUN_AXES)
TIMES, TRIED = 16, 100  # how far beyond the request's own value to look for the largest that fits, in how many points
LARGEST = 2**62  # bytes or FLOPs of a point: what 64-bit integers hold, with room for a sum


def spaced(least: int, most: int, points: int, *, logarithmic: bool = False) -> NDArray[np.int64]:
    """At most `points` different integers from `least` to `most`, both included.

    Raises:
        ConfigError: `least` is below 1 or above `most`, or there are fewer than two points.
    """
    if not 1 <= least <= most:
        raise ConfigError(
            f"range = {shown(least)} to {shown(most)}: must start at 1 or more and not end before it starts"
        )
    if most > limits(Run)["steps"]:
        raise ConfigError(f"range = {least} to {shown(most)}: must end at {limits(Run)['steps']:,} at most")
    if not 2 <= points <= POINTS:
        raise ConfigError(f"points = {shown(points)}: must be at least 2 and at most {POINTS:,}")
    space = np.geomspace if logarithmic else np.linspace
    return np.unique(np.rint(space(least, most, points)).astype(np.int64))


def axis_values(
    request: Request, axis: str, least: int, most: int, points: int, *, logarithmic: bool = False
) -> NDArray[np.int64]:
    """At most `points` of the values between `least` and `most` that `axis` can have, all else as in `request`.

    A width must be divided by the heads (twice, where rotary embeddings turn pairs), and heads divide a width.

    Raises:
        ConfigError: an unknown axis, a range as `spaced` refuses it, a sequence longer than the model's positions, or
            no value between them.
    """
    choose("axis", axis, AXES)
    wanted = spaced(least, most, points, logarithmic=logarithmic)
    m = request.model
    if axis == "seq_len":
        request.plan.replace(seq_len=most).tokens(m)
    if axis not in MODEL_AXES or axis in ("num_layers", "d_ff", "vocab_size"):
        return wanted
    if axis == "d_model":
        pairs = m.made_of.positions.kind == "rotary" and m.rotary_dim is None
        step = 1 if m.e * m.num_heads != m.d_model else m.num_heads * (2 if pairs else 1)
        wanted = np.unique(np.maximum(np.rint(wanted / step).astype(np.int64), 1) * step)
        found = wanted[(wanted >= least) & (wanted <= most)]
    else:
        most_heads = min(most, m.d_model, limits(ModelConfig)["num_heads"])
        divisors = [x for x in range(least, most_heads + 1) if _can_be(m, {axis: x})]
        found = np.asarray(divisors[:: max(1, -(-len(divisors) // points))], dtype=np.int64)
    if not len(found):
        raise ConfigError(f"{axis} = {least} to {most}: no value between them makes a model, all else the same")
    return found


def reach(request: Request, axis: str) -> int:
    """Where a range of `axis` from 1 ends that shows what matters: half as much again as the largest that fits.

    It holds the request's own value. A sequence ends at the model's positions; what says nothing of whether it fits
    (accelerators, global batch, steps) ends at four times the request's own.
    """
    choose("axis", axis, AXES)
    m, r = request.model, request.estimate()
    own = {"seq_len": r.plan.tokens(m), "batch_size": r.plan.batch_size}
    own |= {"count": request.count, "steps": request.steps or 1, "global_batch_size": r.flops.sequences}
    now = own[axis] if axis in own else int(getattr(m, axis) or 1)
    if axis in RUN_AXES:
        return min(max(8, 4 * now), limits(ModelConfig, Plan, Run)[axis])
    if axis == "num_heads":
        return max(now, min(64, m.d_model))
    if axis == "batch_size":
        largest = max_batch_size(m, request.plan, request.gpu, global_batch_size=request.global_batch_size)
        most = limits(ModelConfig, Plan, Run)[axis]
    else:
        most = m.context_length if axis == "seq_len" else min(limits(ModelConfig, Plan, Run)[axis], TIMES * now)
        values = axis_values(request, axis, 1, most, TRIED, logarithmic=True)
        fits = sweep(request, {axis: values})["needed"] <= (r.memory.capacity or 0)
        largest = int(values[fits].max(initial=0))
    end = max(1.5 * largest, 1.25 * now, 2)
    digits = 10 ** max(0, math.floor(math.log10(end)) - 1)
    return min(most, math.ceil(end / digits) * digits)


def sweep(
    request: Request, axes: Mapping[str, Sequence[int] | NDArray[np.int64]], price: float | None = None
) -> dict[str, Array]:
    """Figures over the grid of `axes` (one or two of `AXES`), by name, each of the grid's shape.

    "peak" is bytes of live tensors, exact below 2^53; "needed" adds what hardly varies: the cuBLAS workspace, the CUDA
    context, NCCL's buffers where there are several accelerators, and the allocator's rounding at the request's own
    sizes. "flops" are a step's model FLOPs. Where the request has a time, "seconds" are those of an optimizer step,
    "tokens_per_second" is the job's, "hours" the run's, and "dollars" and "kilowatt_hours" what it takes, if there is a
    price and a power.

    Args:
        request: what is the same at every point.
        axes: the values of each axis; see `axis_values`.
        price: US dollars for an hour of an accelerator; by default the median of those on file.

    Raises:
        ConfigError: no axis or more than two, an unknown one, a model that cannot be, or figures beyond 2^62.
    """
    if not 1 <= len(axes) <= 2:
        raise ConfigError(f"axes = {', '.join(axes) or 'none'}: must be one or two of {', '.join(AXES)}")
    for name in axes:
        choose("axis", name, AXES)
    for name in ("tensor_parallel", "context_parallel", "expert_parallel"):
        if (ranks := getattr(request.plan, name)) > 1:
            raise ConfigError(f"{name} = {ranks}: sweeps are of whole models and sequences; allowed: 1")
    given = {name: whole_numbers(name, values, limits(ModelConfig, Plan, Run)[name]) for name, values in axes.items()}
    if math.prod(map(len, given.values())) > POINTS:
        raise ConfigError(f"points = {math.prod(map(len, given.values()))}: must be at most {POINTS:,}")
    shape = tuple(len(values) for values in given.values())
    grid = dict(zip(given, (x.ravel() for x in np.meshgrid(*given.values(), indexing="ij")), strict=True))
    if "seq_len" in given:
        longest = request.plan.replace(seq_len=int(given["seq_len"].max()))
        recipe_of(request.model, longest, accelerator(request.gpu).device)  # what cannot be is refused here

    r = request.estimate()
    letters = _letters(request, grid, r.plan.data_parallel)
    varying = {name: x for name, x in letters.items() if x.ndim}
    sizes: dict[str, Any] = {name: int(x) for name, x in letters.items() if not x.ndim} | varying
    every = {**sizes, "n": r.memory.sizes["n"]}
    corner = {name: int(np.max(x)) for name, x in every.items()}
    for key in (("backward_flops",), *(("live", i) for i in range(len(r.account.pieces)))):
        if r.account.compiled.value(key, r.account.compiled.at(corner)) > LARGEST:
            raise ConfigError(f"axes = {', '.join(axes)}: the figures go beyond 2^62; take smaller ranges")

    points = len(next(iter(grid.values())))
    count = np.broadcast_to(grid.get("count", r.plan.data_parallel), points)
    at_once = np.broadcast_to(sizes["B"], points) * count
    sequences = np.maximum(grid.get("global_batch_size", np.asarray(r.flops.sequences)), at_once)
    turns = -(-sequences // at_once)
    if request.global_batch_size is None and "global_batch_size" not in grid:
        turns = np.full(points, r.plan.grad_accumulation)
        sequences = at_once * turns
    peak = _peak(request, r.account.device, sizes, count, turns)
    arrays = {name: x.astype(np.float64) if np.ndim(x) else int(x) for name, x in every.items()}
    flops = np.zeros(points)
    for form, sign in (("forward_flops", 1), ("backward_flops", 1), ("recompute_flops", -1)):
        flops = flops + sign * r.account.compiled.greatest([(form,)], arrays)
    flops = flops * sequences / sizes["B"]
    buffers = sum(r.memory.nccl) // 2
    shared = buffers or (sum(NCCL_BYTES) // 2 if r.account.device == "cuda" else 0)
    beside = r.memory.needed - r.memory.peak - buffers + np.where(count > 1, shared, 0)
    found = {"peak": peak, "needed": peak + beside, "flops": flops}
    if r.time is not None:
        steps = grid.get("steps", r.time.steps or 1)
        if r.time.predicted:
            seconds = _seconds(request, r.setup, every, turns, count)
        else:
            seconds = flops / (r.time.mfu * r.time.peak_flops * count)
        found["seconds"] = seconds
        found["tokens_per_second"] = sequences * sizes["T"] / seconds
        found["hours"] = seconds * steps / SECONDS_PER_HOUR
        one = cost(request.gpu, SECONDS_PER_HOUR, price=price)
        if one.dollars is not None:
            found["dollars"] = found["hours"] * count * one.dollars.median
        if one.energy_joules is not None:
            found["kilowatt_hours"] = found["hours"] * count * one.energy_joules / JOULES_PER_KILOWATT_HOUR
    return {name: np.broadcast_to(values, points).reshape(shape) for name, values in found.items()}


def _letters(request: Request, grid: Mapping[str, NDArray[np.int64]], count: int) -> dict[str, NDArray[np.int64]]:
    """The legend's letters that a user gives, each a number or an array over the points."""
    own = {name: grid[name] for name in MODEL_AXES if name in grid}
    combined = np.stack(list(own.values()), axis=1) if own else np.zeros((1, 0), dtype=np.int64)
    different, which = np.unique(combined, axis=0, return_inverse=True)
    models = [request.model.replace(**dict(zip(own, map(int, row), strict=True))) for row in different]
    p = request.plan
    sizes = [sizes_for(m, p) for m in models]
    letters = {}
    for letter in dict.fromkeys(letter for of in sizes for letter in of):
        column = np.array([of.get(letter, 0) for of in sizes], dtype=np.int64)  # turns of groups that another has not
        letters[letter] = column[which.ravel()] if np.ptp(column) else column[0]
    return letters | {
        "B": grid.get("batch_size", np.int64(p.batch_size)),
        "T": grid.get("seq_len", np.int64(p.tokens(request.model))),
        "D": grid.get("count", np.int64(count)) if p.sharding != "none" else np.int64(1),
    }


def _kinds(count: NDArray[np.int64], turns: NDArray[np.int64]) -> Iterator[tuple[dict[str, int], NDArray[np.intp]]]:
    """The plan's fields of each pair of (accelerators, micro-batches) that there is, and the points that have it."""
    pairs, which = np.unique(np.stack((count, turns)), axis=1, return_inverse=True)
    for at, (accelerators, micro_batches) in enumerate(pairs.T.tolist()):
        plan = {"data_parallel": accelerators, "grad_accumulation": micro_batches}
        yield plan, np.flatnonzero(which.ravel() == at)


def _peak(
    request: Request, device: str, sizes: Mapping[str, Any], count: NDArray[np.int64], turns: NDArray[np.int64]
) -> Array:
    """Peak bytes at each point: one accelerator executes other statements than several do, and so does accumulation."""
    out = np.empty(len(count))
    # Two of each are as good as many: the statements are the same.
    for plan, here in _kinds(np.minimum(count, 2), np.minimum(turns, 2)):
        account = vectorised_peak(recipe_of(request.model, request.plan.replace(**plan), device), device)
        needed = [name for name in account.recipe.letters if name not in FOLLOWING]
        given = {name: x for name, x in sizes.items() if name in (*needed, "D")}
        at = {name: x[here] if np.ndim(x) else x for name, x in given.items()}
        out[here] = account(sliding_window=request.model.sliding_window, **at)
    return out


def _seconds(
    request: Request, setup: Setup, sizes: Mapping[str, Any], turns: NDArray[np.int64], count: NDArray[np.int64]
) -> Array:
    """Predicted seconds of a step at each point: those with the same kernels and the same number of them at once."""
    device = accelerator(request.gpu)
    every = {name: np.broadcast_to(x, len(count)) for name, x in sizes.items()}
    out = np.empty(len(count))
    for changed, points in _kinds(count, turns):
        plan = request.plan.replace(**changed)
        steps = vectorised_peak(recipe_of(request.model, plan, device.device), device.device)
        here = {name: x[points] for name, x in every.items()}
        for form, alike in steps.accounts(here):
            some = {name: x[alike] for name, x in here.items()}
            out[points[alike]] = sum(times(form, some, plan, device, setup).values())
    return out


def _can_be(m: ModelConfig, changes: dict[str, int]) -> bool:
    try:
        m.replace(**changes)
    except ConfigError:
        return False
    return True


def point(request: Request, at: Mapping[str, int]) -> Request:
    """The request at one point of a sweep, by axis; its global batch is at least a micro-batch on each accelerator.

    Raises:
        ConfigError: an unknown axis, or a model or plan that cannot be.
    """
    for name in at:
        choose("axis", name, AXES)
    model = {name: x for name, x in at.items() if name in MODEL_AXES}
    plan = {name: x for name, x in at.items() if name in PLAN_AXES}
    run: dict[str, Any] = {name: x for name, x in at.items() if name in RUN_AXES}
    there = replace(request, model=request.model.replace(**model), plan=request.plan.replace(**plan), **run)
    if there.global_batch_size is None:
        return there
    at_once = there.plan.batch_size * max(there.count, there.plan.data_parallel)
    return replace(there, global_batch_size=max(there.global_batch_size, at_once))


def python(request: Request, axes: Mapping[str, tuple[int, int, int, bool]], price: float | None = None) -> str:
    """Python that computes `sweep`; an axis is (least, most, points, logarithmic)."""
    run = "".join(f", {name}={value!r}" for name, value in request.run.items())
    ranges = [
        f'    "{name}": axis_values(request, "{name}", {least}, {most}, {points}, logarithmic={logarithmic}),'
        for name, (least, most, points, logarithmic) in axes.items()
    ]
    return "\n".join(
        (
            "import estimator as est",
            "from estimator.answers.request import Request",
            "from estimator.answers.sweeps import axis_values, sweep",
            "",
            *request.python().splitlines()[2:4],
            f'request = Request("{request.name}", model, plan, {request.gpu!r}{run})',
            "axes = {",
            *ranges,
            "}",
            f"found = sweep(request, axes, price={price!r})",
            "print({name: float(values.max()) for name, values in found.items()})",
        )
    )
