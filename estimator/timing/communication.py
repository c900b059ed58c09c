"""Data parallelism: what each accelerator holds, which messages a step sends, and how long they keep it waiting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from estimator.hardware.accelerators import Cluster
    from estimator.timing.roofline import Efficiency

    Array = NDArray[np.float64]

# Steps of a ring: an all-gather and a reduce-scatter each pass (n - 1) / n of the tensor, an all-reduce does both.
RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}


@dataclass(frozen=True, slots=True)
class Message:
    """A collective of a step over all data-parallel accelerators.

    Attributes:
        collective: one of `RINGS`.
        phase: "forward", "backward" (hidden behind that phase's kernels) or "optimizer" (waited for).
        nbytes: bytes of the whole tensor, all of its messages in the phase together.
        pieces: into how many messages they are cut; the first has nothing to hide behind, nor has the last.
    """

    collective: str
    phase: str
    nbytes: Any
    pieces: Any


def messages(
    sharding: str, parameter_bytes: Any, gradient_bytes: Any, units: Any, micro_batches: Any
) -> tuple[Message, ...]:
    """The collectives of one optimizer step.

    They are those of the implementations whose memory is accounted (`estimator.parallel.data`). DDP sums the gradients
    in the last backward. ZeRO-1 does too, and gathers the updated parameters after the step. FSDP gathers each unit's
    parameters before its forward and scatters its gradients, in every micro-batch; as ZeRO-3 it gathers them again
    before backward, as ZeRO-2 it has kept them.

    Args:
        sharding: as in `Plan`.
        parameter_bytes: of the whole model, as they are sent.
        gradient_bytes: likewise.
        units: parts of the model that are sent as one (blocks, and one for all else).
        micro_batches: forward and backward passes in a step.
    """
    summed = Message("all-reduce", "backward", gradient_bytes, units)
    if sharding == "none":
        return (summed,)
    if sharding == "zero1":
        return (summed, Message("all-gather", "optimizer", parameter_bytes, units))
    pieces = units * micro_batches
    phases = ("forward", "backward") if sharding == "zero3" else ("forward",)
    gathers = (Message("all-gather", phase, parameter_bytes * micro_batches, pieces) for phase in phases)
    return (*gathers, Message("reduce-scatter", "backward", gradient_bytes * micro_batches, pieces))


def seconds(message: Message, cluster: Cluster, e: Efficiency) -> Array:
    """Seconds of a message on an idle cluster.

    A ring inside each node and one between nodes run at the same time, each as fast as its link: measured on 4 nodes of
        8
    B200, an all-reduce of 4 GiB takes 22 ms, between 16 (fully overlapped at the nominal rate) and 26 (one after the
    other), which is what the fraction `between` of the network's rate is fitted to.
    """
    n, g, k = cluster.count, cluster.per_node, cluster.nodes
    if n == 1:
        return np.zeros(np.broadcast_shapes(np.shape(message.nbytes), np.shape(message.pieces)))
    rings = RINGS[message.collective]
    inside = (g - 1) / g * message.nbytes / (cluster.within * e.within) if cluster.within is not None else 0.0
    # All g accelerators of a node send at once, each its share through its own part of the network.
    outside = (k - 1) / k * message.nbytes / g / (cluster.between * e.between) if cluster.between is not None else 0.0
    hops = (g - 1) + (k - 1)
    return np.asarray(rings * (np.maximum(inside, outside) + message.pieces * hops * e.latency))


def exposed(sent: tuple[Message, ...], cluster: Cluster, e: Efficiency, compute: dict[str, Array]) -> Array:
    """Seconds of a step that its messages cost, `compute` being the seconds of kernels in each phase.

    Of what runs beside kernels, the first piece has no kernel to run beside, and no more can hide than there are; what
    hides takes a part of the device from what hides it (`Efficiency.contention`).
    """
    cost: Any = 0.0
    for phase, behind in compute.items():
        those = [m for m in sent if m.phase == phase]
        if not those or cluster.count == 1:
            continue
        total = sum(seconds(m, cluster, e) for m in those)
        if phase == "optimizer":
            cost = cost + total
            continue
        first = sum(seconds(m, cluster, e) / m.pieces for m in those[-1:])
        hidden = np.minimum(total - first, behind)
        cost = cost + (total - hidden) + e.contention * hidden
    return np.atleast_1d(np.asarray(cost, dtype=np.float64))
