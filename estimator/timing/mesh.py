"""How the axes of a mesh are laid on nodes: which of its accelerators share a node, and how fast what leaves it is."""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.hardware.networks import network
from estimator.parallel.placement import CONTEXT, DATA, EXPERT, REPLICATE, TENSOR

if TYPE_CHECKING:
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator, Cluster


def axes(group: Cluster, p: Plan) -> dict[str, Cluster]:
    """The accelerators of each axis of the mesh: those that share shards lie side by side, in as few nodes as can be.

    Raises:
        ConfigError: a group of them does not come out even with the nodes.
    """
    if p.tensor_parallel > 1 or p.runs_stages:
        return _beside_tensors(group, p)
    if p.replicas == 1 or p.sharding == "none":
        return {DATA: group, EXPERT: group} | _of_context(group, p)
    inner = min(p.shards, group.per_node)
    if group.per_node % inner or p.shards % inner:
        raise ConfigError(
            f"shard_group = {p.shard_group}: must divide the {group.per_node} accelerators of a node, or be a multiple "
            "of them"
        )
    here = group.per_node // inner  # groups inside one node
    nodes = p.replicas // here
    return _of_context(group, p) | {
        DATA: replace(group, nodes=p.shards // inner, per_node=inner),
        REPLICATE: replace(group, nodes=nodes, per_node=here),
    }


def _of_context(group: Cluster, p: Plan) -> dict[str, Cluster]:
    """Those that share a sequence, side by side."""
    inner = min(p.context_parallel, group.per_node)
    if group.per_node % inner or p.context_parallel % inner:
        raise ConfigError(
            f"context_parallel = {p.context_parallel}: must divide the {group.per_node} accelerators of a node, or be "
            "a multiple of them"
        )
    return {CONTEXT: replace(group, nodes=p.context_parallel // inner, per_node=inner)}


def _beside_tensors(group: Cluster, p: Plan) -> dict[str, Cluster]:
    """Those that share a block's matrices lie side by side, beside them their replicas, and then a pipeline's stages.

    Under HSDP those that share shards come before the groups that replicate them. Replicas
    that would lie across the border of a node count as in nodes of their own.
    """
    inner = min(p.tensor_parallel, group.per_node)
    if group.per_node % inner or p.tensor_parallel % inner:
        raise ConfigError(
            f"tensor_parallel = {p.tensor_parallel}: must divide the {group.per_node} accelerators of a node, or be a "
            "multiple of them"
        )
    room, groups = group.per_node // inner, p.replicas if p.shards > 1 else 1  # (HSDP)
    each = p.data_parallel // groups
    here = gcd(each, room)
    found = {
        TENSOR: replace(group, nodes=p.tensor_parallel // inner, per_node=inner),
        DATA: replace(group, nodes=each // here, per_node=here),
    }
    if groups > 1:
        beside = gcd(groups, room // here)
        found[REPLICATE] = replace(group, nodes=groups // beside, per_node=beside)
    return found


def leaves_node(group: Cluster, p: Plan, stage: int) -> bool:
    """Whether what a stage sends to the next one leaves the node."""
    apart = p.tensor_parallel * p.data_parallel
    return stage * apart // group.per_node != (stage + 1) * apart // group.per_node


def between(a: Accelerator, given: str | float | None = None) -> float | None:
    """Bytes/s of one accelerator to another node: as given, else what is assumed, or its own typical network's if less.

    None where the catalogue has no network for it and none is given.
    """
    if given is None and a.inter_node_bandwidth is not None:
        return min(network().bandwidth, a.inter_node_bandwidth)
    return None if given is None else network(given).bandwidth
