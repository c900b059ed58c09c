"""Who holds what: the rows of a parameter that a rank has, and into how many buckets DDP puts gradients.

A parameter's `placement` says which of its dimensions is cut along an axis of the device mesh: {"data": 0} is FSDP2's
`Shard(0)`. What is not named is whole on every rank of that axis.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager.letters import ONE, ZERO, D, Function, ceiling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor

DATA = "data"  # the axis of ranks that see different sequences and share what is sharded
REPLICATE = "replicate"  # under HSDP the axis of groups that each hold all shards
TENSOR = "tensor"  # the axis of ranks that each have a part of a block's matrices
CONTEXT = "context"  # the axis of ranks that each have a part of every sequence
EXPERT = "expert"  # the axis of ranks that each have a part of every layer's experts
PIPELINE = "pipeline"  # the axis of ranks that each have some blocks in a row
AXES = (DATA, REPLICATE, TENSOR, CONTEXT, EXPERT, PIPELINE)

FIRST_BUCKET = 2**20  # torch.distributed._DEFAULT_FIRST_BUCKET_BYTES
BUCKET = 25 * 2**20  # DistributedDataParallel's bucket_cap_mb

_LAST_ROWS = Function(
    lambda n, ranks, rank: np.clip(n - rank * -(-n // ranks), 0, -(-n // ranks)),
    "rows({0}/{1}, {2})",
    "rows of {0} that are left for rank {2} of {1}",
)


def rows_on(machine: Machine, rows: Size, rank: int) -> Size:
    """Rows of a dimension of `rows` that rank `rank` of D holds, as `torch.chunk` cuts it: the last may have none."""
    share = ceiling(rows, D)
    if rank == 0 or machine.at_most((rank + 1) * share, rows):
        return share
    return ZERO if machine.at_most(rows, rank * share) else _LAST_ROWS(rows, D, rank)


def counted_whole(p: Tensor, shape: Sequence[Size]) -> None:
    """Count `p`, of which a rank has a part, among the model's parameters with its whole shape."""
    machine = p.machine
    at = machine.ledger.parameters.index((p.storage.where, p.numel))
    machine.ledger.parameters[at] = (p.storage.where, machine.product(tuple(shape)))


def buckets(ready: Sequence[Tensor]) -> Size:
    """How many buckets DDP makes of gradients that become ready in this order, the blocks that repeat among them.

    `compute_bucket_assignment_by_size` (torch/csrc/distributed/c10d/reducer.cpp), in the order of the second step on: a
    bucket is closed by the gradient with which it reaches its size, the first one's being 1 MiB.
    """
    stack = ready[0].machine.stack
    stretches: list[tuple[Size, list[Size]]] = []  # (how often in a row, bytes of each gradient)
    for p in ready:
        times = stack.times(p.storage.where.block)
        if not stretches or stretches[-1][0] is not times:
            stretches.append((times, []))
        stretches[-1][1].append(p.dtype.itemsize * p.numel)
    arguments = [x for times, sizes in stretches for x in (times, *sizes)]
    return _bucket_count(tuple(len(sizes) for _, sizes in stretches))(*arguments)


@lru_cache(maxsize=1024)
def _bucket_count(lengths: tuple[int, ...]) -> Function:
    def compute(*values: Any) -> Any:
        points = np.broadcast_arrays(*values)  # np.vectorize takes no more than 64
        found = np.empty(points[0].shape, dtype=np.int64)
        for at in np.ndindex(found.shape):
            found[at] = one(*(point[at] for point in points))
        return found

    def one(*values: Any) -> int:
        at, closed, held, limit = 0, 0, 0, FIRST_BUCKET
        for length in lengths:
            times, *sizes = (int(x) for x in values[at : at + length + 1])
            at += length + 1
            for size in sizes * times:
                held += size
                if held >= limit:
                    closed, held, limit = closed + 1, 0, BUCKET
        return closed + (held > 0)

    count = sum(lengths) + len(lengths)
    slots = ", ".join(f"{{{i}}}" for i in range(count))
    shape = "+".join(map(str, lengths))
    return Function(compute, f"buckets[{shape}]({slots})", "buckets of DDP, of gradients of these bytes in this order")


def pieces(rows: Size) -> Size:
    """Into how many pieces that are not empty D ranks cut `rows`."""
    return ceiling(rows, ceiling(rows, D)) if rows is not ONE else ONE
