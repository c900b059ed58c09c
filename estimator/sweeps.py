"""Thousands of configurations at once: memory, time and cost over a range of one or two sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from estimator.config import ConfigError, choose

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.report import Request

# Sizes that may vary on their own: the letter of the legend, and which configuration the field belongs to.
LETTERS = {"batch_size": "B", "seq_len": "T", "num_layers": "L", "d_ff": "f", "vocab_size": "V"}


def spaced(least: int, most: int, points: int, *, logarithmic: bool = False) -> NDArray[np.int64]:
    """At most `points` different integers from `least` to `most`, both included.

    Raises:
        ConfigError: `least` is below 1 or above `most`, or there are fewer than two points.
    """
    if not 1 <= least <= most:
        raise ConfigError(f"range = {least} to {most}: must start at 1 or more and not end before it starts")
    if points < 2:
        raise ConfigError(f"points = {points}: must be at least 2")
    space = np.geomspace if logarithmic else np.linspace
    return np.unique(np.rint(space(least, most, points)).astype(np.int64))


def sweep(request: Request, axes: Mapping[str, Sequence[int] | NDArray[np.int64]]) -> dict[str, NDArray[np.float64]]:
    """Figures over the grid of `axes` (one or two of `LETTERS`), by name, each of the grid's shape.

    "peak" is bytes of live tensors, exact; "needed" adds what is the same at every point: the cuBLAS workspace, the
    CUDA context and the allocator's rounding at the request's own sizes (a few MiB, which hardly vary). "flops" are a
    micro-batch's model FLOPs; "seconds", of an optimizer step of the request's global batch at its MFU, if it has one.

    Raises:
        ConfigError: no axis or more than two, an unknown one, or a sequence longer than the model's positions.
    """
    if not 1 <= len(axes) <= 2:
        raise ConfigError(f"axes = {', '.join(axes) or 'none'}: must be one or two of {', '.join(LETTERS)}")
    for name in axes:
        choose("axis", name, LETTERS)
    if "seq_len" in axes and np.max(axes["seq_len"]) > request.model.context_length:
        raise ConfigError(
            f"seq_len = {np.max(axes['seq_len'])}: the model holds {request.model.context_length} positions "
            "(context_length)"
        )
    r = request.estimate()
    grid = np.meshgrid(*(np.asarray(values, dtype=np.int64) for values in axes.values()), indexing="ij")
    points = {LETTERS[name]: values.ravel() for name, values in zip(axes, grid, strict=True)}
    sizes = {letter: r.memory.sizes[letter] for letter in ("B", "T", "L", "d", "h", "k", "e", "f", "V", "C")}
    peak = np.asarray(r.account.lambdify()(**(sizes | points)), dtype=np.float64)
    arrays = dict(r.memory.sizes) | {letter: values.astype(np.float64) for letter, values in points.items()}
    compiled = r.account.compiled
    flops = np.zeros(peak.shape)
    for form, sign in (("forward_flops", 1), ("backward_flops", 1), ("recompute_flops", -1)):
        flops = flops + sign * compiled.greatest([(form,)], arrays)
    found = {"peak": peak, "needed": peak + (r.memory.needed - r.memory.peak), "flops": flops}
    if r.time is not None:
        batch = points.get("B", r.plan.batch_size)
        rate = r.time.mfu * r.time.peak_flops * request.count
        found["seconds"] = flops * r.flops.sequences / batch / rate
    return {name: values.reshape(grid[0].shape) for name, values in found.items()}
