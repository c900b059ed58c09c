"""The figures of many micro-batches of a layout with a pipeline: memory of the stage with the most, and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from estimator.accounting.accounts import recipe_of, sizes_for, vectorised_peak
from estimator.describe import pipeline
from estimator.memory.device import needed
from estimator.timing.stages import pipeline_times

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account, Values
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator
    from estimator.timing.speed import Setup

    Counts = NDArray[np.int64]


def figures(
    m: ModelConfig, way: Plan, a: Accelerator, setup: Setup, batches: Counts, turns: Counts
) -> Iterator[tuple[NDArray[np.intp], Counts, dict[str, NDArray[np.float64]]]]:
    """(points, bytes needed, seconds by part) of the steps of `turns` micro-batches of `batches` sequences that fit.

    Points whose stages are executed alike come together; of those that do not fit there are no seconds.

    Raises:
        ConfigError: as for `estimator.estimate`.
    """
    memory, alike = _needed(m, way, a, batches, turns)
    crowded = np.flatnonzero(memory > a.memory_bytes)
    if len(crowded):
        yield crowded, memory[crowded], {}
    for points in alike:
        here = points[memory[points] <= a.memory_bytes]
        if len(here):
            first = here[0]
            plan = way.replace(batch_size=int(batches[first]), grad_accumulation=int(turns[first]))
            spent = pipeline_times(m, plan, a, setup, given={"B": batches[here]}, turns=turns[here])
            yield here, memory[here], spent


def needed_by(m: ModelConfig, way: Plan, a: Accelerator, batches: Counts, turns: Counts) -> Counts:
    """(points,): `Memory.needed` of the stage that needs the most."""
    return _needed(m, way, a, batches, turns)[0]


def _needed(
    m: ModelConfig, way: Plan, a: Accelerator, batches: Counts, turns: Counts
) -> tuple[Counts, list[NDArray[np.intp]]]:
    """(`needed_by`, the points whose stages have the same accounts)."""
    found = np.zeros(len(turns), dtype=np.int64)
    accounts: list[list[Account]] = [[] for _ in turns]
    for stage in pipeline.telling_stages(way):
        for points in _alike(way, turns, stage):
            plan = way.replace(grad_accumulation=int(turns[points[0]]))
            flying = [pipeline.in_flight(way.replace(grad_accumulation=int(n)), stage) for n in turns[points]]
            sizes = dict(sizes_for(m, plan, stage=stage)) | {"B": batches[points]}
            if way.is_pipeline:
                sizes |= {"M": turns[points], "w": np.array(flying)}
            for form, at in vectorised_peak(recipe_of(m, plan, a.device, stage), a.device).accounts(sizes):
                here = {name: x[at] if np.ndim(x) else x for name, x in sizes.items()}
                found[points[at]] = np.maximum(found[points[at]], needed(form, here, a))
                for point in points[at]:
                    accounts[point].append(form)
    groups: dict[tuple[int, ...], list[int]] = {}
    for point, forms in enumerate(accounts):
        groups.setdefault(tuple(map(id, forms)), []).append(point)
    return found, [np.array(points) for points in groups.values()]


def least_bytes(m: ModelConfig, way: Plan, whole: Values, itemsize: int, sequences: int) -> int:
    """Less than any step of this layout needs on the accelerator that needs the most: the mean over the stages.

    That is of parameters, gradients and states, of which `whole` are those of one accelerator alone, and of what is
    received (`itemsize` bytes an element), for which there is room for all micro-batches.
    """
    stages = way.pipeline_parallel
    shared = way.data_parallel if way.sharding == "zero1" else 1
    states = whole.parameter_bytes + whole.gradient_bytes + whole.optimizer_bytes // shared
    received = 2 * (stages - 1) * -(-sequences // way.data_parallel) * way.tokens(m) * m.d_model * itemsize
    if way.implementation == "megatron":  # which receives when it needs it
        received = 0
    return int(states // (way.tensor_parallel * stages) + received // stages)


def _alike(way: Plan, turns: Counts, stage: int) -> Iterator[NDArray[np.intp]]:
    """The points whose steps execute the same schedule in a stage."""
    groups: dict[object, list[int]] = {}
    for at, count in enumerate(turns.tolist()):
        plan = way.replace(grad_accumulation=count)
        moves = pipeline.executed(plan, stage), pipeline.executed_parts(plan, stage)
        groups.setdefault(moves, []).append(at)
    for points in groups.values():
        yield np.array(points)
