"""How long messages take, and how long a step waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.hardware.accelerators import Cluster
    from estimator.timing.communication import Message
    from estimator.timing.roofline import Efficiency

    Array = NDArray[np.float64]

# Steps of a ring: an all-gather and a reduce-scatter each pass (n - 1) / n of the tensor, an all-reduce does both; so
# do the broadcasts of all accelerators, each of its part.
RINGS = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "broadcast": 1}
# NCCL's own model of its algorithms (src/graph/tuning.cc at 01afd20a: ncclTopoTuneModel, hwLat): a ring's step over the
# network takes 9.6 us where one over NVLink takes 3.4; a tree, which only an all-reduce has, reaches 0.9 of a ring's
# rate, in twice the steps of a node and of the logarithm of the nodes.
NETWORK_HOP = 9.6 / 3.4
TREE_RATE = 0.9


def seconds(message: Message, cluster: Cluster, e: Efficiency, latency: float | None = None) -> Array:
    """Seconds of a message on an idle cluster; `latency` is of a hop between nodes, if not `NETWORK_HOP` of one inside.

    A ring inside each node and one between nodes run at the same time, each as fast as its link: measured on 4 nodes of
    8 B200, an all-reduce of 4 GiB takes 22 ms, between 16 (fully overlapped at the nominal rate) and 26 (one after the
    other), which is what the fraction `between` of the network's rate is fitted to. Latency is that of NCCL's rings, a
    step for each accelerator; an all-reduce between nodes goes by a tree where that is faster, as NCCL picks.
    """
    n, g, k = cluster.count, cluster.per_node, cluster.nodes
    if n == 1:
        return np.zeros(np.broadcast_shapes(np.shape(message.nbytes), np.shape(message.pieces)))
    if message.collective == "all-to-all":
        return _all_to_all(message, cluster, e, NETWORK_HOP * e.latency if latency is None else latency)
    rings = RINGS[message.collective]
    inside = (g - 1) / g * message.nbytes / (cluster.within * e.within) if cluster.within is not None else 0.0
    # All g accelerators of a node send at once, each its share through its own part of the network.
    outside = (k - 1) / k * message.nbytes / g / (cluster.between * e.between) if cluster.between is not None else 0.0
    hop = NETWORK_HOP * e.latency if latency is None else latency
    ring = np.maximum(inside, outside) + message.pieces * ((n - k) * e.latency + (k - 1) * hop)
    if message.collective == "all-reduce" and k > 1:
        steps = (g - 1) * e.latency + np.log2(k) * hop
        ring = np.minimum(ring, np.maximum(inside, outside / TREE_RATE) + message.pieces * steps)
    return np.asarray(rings * ring)


def _all_to_all(message: Message, cluster: Cluster, e: Efficiency, hop: float) -> Array:
    """Seconds of an all-to-all: one group of a send to and a receive from each other accelerator.

    That is `all2all_single_unequal_split` of torch/csrc/cuda/nccl.cpp. Each accelerator keeps its own part and sends
    all others theirs directly, so that what leaves a node goes through its own part of the network; both links work at
    the same time.
    """
    n, g = cluster.count, cluster.per_node
    spent: Any = 0.0
    latency = e.latency if g > 1 else 0.0
    if cluster.within is not None:
        spent = (g - 1) / n * message.nbytes / (cluster.within * e.within)
    if cluster.between is not None and n > g:
        spent = np.maximum(spent, (n - g) / n * message.nbytes / (cluster.between * e.between))
        latency = hop
    return np.asarray(spent + message.pieces * latency)


def exposed(
    sent: Sequence[Message],
    clusters: Mapping[str, Cluster],
    e: Efficiency,
    compute: Mapping[str, Array],
    turns: Any = 1,
    *,
    overlap: bool = True,
    latency: float | None = None,
) -> Array:
    """Seconds of a step that its messages cost, `compute` being the seconds of kernels in each phase.

    `clusters` are the accelerators of each axis of the mesh. What the whole step waits for hides behind nothing. Of
    what runs beside kernels, the first piece has no kernel to run beside, and no more can hide than there are; what
    hides takes a part of the device from what hides it (`Efficiency.contention`). An all-reduce of gradients is sent
    once, in the last of `turns` micro-batches, so that only that one's backward hides it. Without `overlap` it is sent
    when backward is over, and waited for.
    """
    cost: Any = 0.0
    for phase, behind in compute.items():
        taken = [(m, seconds(m, clusters[m.axis], e, latency)) for m in sent if m.phase == phase]
        cost = cost + sum(took for m, took in taken if m.waits == "step")
        those = [m for m, _ in taken if m.waits != "step"]
        if not those:
            continue
        total = sum(took for m, took in taken if m.waits != "step")
        summed = all(m.collective == "all-reduce" for m in those)
        if not overlap and (summed or all(m.waits == "update" for m in those)):
            cost = cost + total
            continue
        first = sum(took / m.pieces for m, took in taken if m is those[-1])
        hidden = np.minimum(total - first, behind / turns if summed else behind)
        cost = cost + (total - hidden) + e.contention * hidden
    return np.atleast_1d(np.asarray(cost, dtype=np.float64))
