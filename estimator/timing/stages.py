"""How long a step takes that goes through the stages of a pipeline: kernels and messages of each, and the schedule.

All micro-batches but the first run the kernels of the second. Arrays have a point for each size of a micro-batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.accounting.accounts import sizes_for, stage_account
from estimator.describe import pipeline
from estimator.eager.letters import as_sizes
from estimator.hardware.accelerators import cluster
from estimator.hardware.networks import slowest
from estimator.parallel.placement import DATA
from estimator.timing.communication import messages
from estimator.timing.kernels import table
from estimator.timing.mesh import axes, between, leaves_node
from estimator.timing.pipeline import StageTime, finished, simulated, simulated_parts
from estimator.timing.roofline import busy, efficiency
from estimator.timing.waiting import NETWORK_HOP, exposed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator, Cluster
    from estimator.timing.pipeline import Bar
    from estimator.timing.roofline import Efficiency
    from estimator.timing.speed import Setup

    Array = NDArray[np.float64]


class Work(NamedTuple):
    """What a stage does in a step, (points,) each.

    Attributes:
        forward, backward: seconds of a micro-batch, with the messages that its kernels wait for.
        update: seconds of the optimizer, and of the gradients' messages that no backward hides.
        nbytes: what is sent to a stage beside it.
        kinds: device seconds of the step by kind of kernel.
        launch: seconds of the step in which no kernel runs and no message is waited for.
    """

    forward: Array
    backward: Array
    update: Array
    nbytes: Array
    kinds: Mapping[str, Array]
    launch: Array


def work(
    form: Account, sizes: Mapping[str, Any], turns: Any, p: Plan, a: Accelerator, group: Cluster, setup: Setup,
    e: Efficiency,
) -> Work:  # fmt: skip
    """The work of the stages whose account is `form`, of `turns` micro-batches; arguments as for `figures`."""
    kernels, fused = table(form, setup.variant), form.fused_kernel
    found = busy(
        kernels, kernels.at(sizes), sizes, turns, a, e,
        half=setup.dtype or (p.product_dtype if p.product_dtype == "fp16" else "bf16"),
        single="tf32" if p.product_dtype == "tf32" else "fp32",
        kernel=setup.kernel(fused, e),
        imbalance=p.imbalance,
    )  # fmt: skip
    phases = {phase.value: x for phase, x in found.phases.items()}
    forward, backward, update = phases["forward"] / turns, phases["backward"] / turns, phases["optimizer"]
    sent = messages(form, sizes, 1, setup.parameter_width, setup.gradient_width)
    beside, clusters = [x for x in sent if x.axis != DATA], axes(group, p)
    onwards = exposed(beside, clusters, e, {"forward": forward}, latency=setup.latency)
    back = exposed(beside, clusters, e, {"backward": backward}, latency=setup.latency)
    gradients = [x for x in sent if x.axis == DATA]
    behind = {"backward": backward + back, "optimizer": update}
    summed = exposed(gradients, clusters, e, behind, overlap=setup.overlap, latency=setup.latency)
    passed = next((x.nbytes for x in form.traced.ledger.messages if x.kind == "send"), None)
    nbytes = np.atleast_1d(np.asarray(0 if passed is None else as_sizes(sizes).value(passed), dtype=np.float64))
    own = sum(phases.values()) - sum(found.kinds.values())
    return Work(forward + onwards, backward + back, update + summed, nbytes, found.kinds, np.asarray(own))


def works(
    m: ModelConfig, p: Plan, a: Accelerator, setup: Setup, e: Efficiency | None = None,
    given: Mapping[str, Any] | None = None, turns: Any = None,
) -> tuple[list[Work], list[tuple[Array, Array]]]:  # fmt: skip
    """(the work of each stage, the seconds that it takes to send to the next one and to the one before).

    `given` are sizes in place of the plan's, numbers or arrays of one length, of so many `turns` each.

    Raises:
        ConfigError: as for `estimator.timing.speed.step_times`.
    """
    e, turns = setup.clocked(e or efficiency(a), a), p.grad_accumulation if turns is None else turns
    group = cluster(a, p.accelerators, between=between(a, setup.network))
    known: dict[int, Work] = {}
    found = []
    for stage in range(p.pipeline_parallel):
        form = stage_account(m, p, a.device, stage)
        if id(form) not in known:
            sizes = {**sizes_for(m, p, threads=1, stage=stage), **(given or {})}
            known[id(form)] = work(form, sizes, turns, p, a, group, setup, e)
        found.append(known[id(form)])
    latency = NETWORK_HOP * e.latency if setup.latency is None else setup.latency
    sends = []
    for stage, own in enumerate(found):

        def seconds(border: int, nbytes: Array = own.nbytes) -> Array:
            if not 0 <= border < len(found) - 1:
                return np.zeros_like(nbytes)
            if leaves_node(group, p, border) and group.between is not None:
                return np.asarray(nbytes / (group.between * e.between) + latency)
            return np.asarray(nbytes / ((group.within or np.inf) * e.within) + e.latency)

        sends.append((seconds(stage), seconds(stage - 1)))
    return found, sends


def pipeline_times(
    m: ModelConfig, p: Plan, a: Accelerator, setup: Setup, e: Efficiency | None = None,
    given: Mapping[str, Any] | None = None, turns: Any = None,
) -> dict[str, Array]:  # fmt: skip
    """Seconds of one optimizer step by part (`PARTS`), (points,) each, of the stage that ends last.

    What it waits for, other stages and messages, is communication. Arguments as for `works`.

    Raises:
        ConfigError: as for `estimator.timing.speed.step_times`.
    """
    each, sends = works(m, p, a, setup, e, given, turns)
    counts = np.atleast_1d(np.asarray(p.grad_accumulation if turns is None else turns))
    points = max(np.broadcast_shapes(counts.shape, each[0].forward.shape, each[0].nbytes.shape))

    def stacked(arrays: Sequence[Array]) -> Array:
        return np.stack([np.broadcast_to(x, points) for x in arrays])

    spent = StageTime(
        stacked([w.forward for w in each]),
        stacked([w.backward for w in each]),
        stacked([onwards for onwards, _ in sends]),
        stacked([w.update for w in each]),
        stacked([back for _, back in sends]),
    )
    kind = "interleaved" if p.virtual_stages > 1 else p.pipeline_schedule
    ends = finished(kind, np.broadcast_to(counts, points), spent, p.virtual_stages, in_rounds=p.interleaves)
    last, at = ends.argmax(0), np.arange(points)
    kinds = {name: stacked([w.kinds[name] for w in each])[last, at] for name in each[0].kinds}
    launch = stacked([w.launch for w in each])[last, at]
    waited = ends[last, at] - sum(kinds.values()) - launch
    group = cluster(a, p.accelerators, between=between(a, setup.network))
    if group.count > 1:  # the slowest is waited for
        waited = waited + slowest(group.count, setup.deviation) * (sum(kinds.values()) + launch)
    return {**kinds, "communication": waited, "launch": launch}


def bars(m: ModelConfig, p: Plan, a: Accelerator, setup: Setup) -> list[Bar]:
    """Every move of every stage in time.

    Raises:
        ConfigError: as for `estimator.timing.speed.step_times`.
    """
    each, sends = works(m, p, a, setup)
    times = [
        StageTime(*(float(x[0]) for x in (w.forward, w.backward, onwards, w.update, back)))
        for w, (onwards, back) in zip(each, sends, strict=True)
    ]
    if p.virtual_stages > 1:
        return simulated_parts(p.grad_accumulation, p.virtual_stages, times, in_rounds=p.interleaves)
    return simulated([pipeline.schedule(p, stage) for stage in range(p.pipeline_parallel)], times)
