"""`fully_shard`, FSDP2: units that hold shards and are whole only while they are needed, on a mesh of one or two axes.

The docstrings have the names of torch/distributed/fsdp/_fully_shard. The collectives are NCCL's, which allocate nothing
that PyTorch counts, or on the CPU gloo's, which do.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from estimator.parallel.data import (
    Buckets,
    MainGradients,
    Replica,
    ShardedUpdate,
    by_block,
    clip_parts,
)
from estimator.parallel.placement import DATA, EXPERT
from estimator.parallel.unit import Unit, units_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.tensor import Shape, Tensor
    from estimator.parallel.data import Model, Sharing


BEFORE = ("embedding", "positions", "project_in", "embedding_norm")  # what the first block's input comes through


class FullySharded(Replica):
    """FSDP2, `fully_shard` on each block and on the model.

    Attributes:
        units: the blocks' in order, and last the root's.
        reshards: the blocks' parameters are emptied after forward (ZeRO-3); else only after backward (ZeRO-2).
        gloo: the collectives are the CPU's.
        defers: gradients are added up whole, and not reduced in this backward (`set_requires_gradient_sync(False)`).
    """

    reshards = True

    def __init__(self, model: Model, sharing: Sharing) -> None:
        super().__init__(model, sharing)
        self.experts = []  # their units divide their gradients
        self.gloo, self.defers = self.machine.device == "cpu", sharing.staged
        groups = by_block(list(model.parameters()))
        rest = groups.pop(None, [])
        self.units: list[Unit] = []
        reached = any(p.requires_grad and p.storage.where.module.partition(".")[0] in BEFORE for p in rest)
        for block, parameters in zip(model.blocks, groups.values(), strict=True):
            own = units_of(self, parameters)
            self.units += own
            block.unit = own[-1]
            reached = reached or any(p.requires_grad for p in parameters)
            if sharing.reshard is not None and not reached:
                block.unit.leave(sharing.reshard)
            if len(own) > 1:
                block.ffn.experts.unit = own[0]
        model.unit = Unit(self, rest, root=True)
        self.units.append(model.unit)
        of = {p: at for unit in self.units for p, at in zip(unit.parameters, _shards(unit), strict=True)}
        self.updated = [of[p][0] for p in self.parameters]
        self.padded = [of[p][1] for p in self.parameters]
        self.machine.on_backward_end = self.after_backward
        self._gathered: Tensor | None = None
        self._reduced: Tensor | None = None

    @contextmanager
    def on_shards(self) -> Iterator[None]:
        """What is done to shards is done where they are: with `CPUOffloadPolicy` on the host."""
        with self.machine.on_host() if self.sharing.offload else nullcontext():
            yield

    def keep(self, gathered: Tensor | None) -> None:
        """Hold on to the buffer of the last all-gather in forward in place of the one before."""
        before, self._gathered = self._gathered, gathered.hold() if gathered is not None else None
        if before is not None:
            before.drop()

    def reduced(self, source: Tensor | None) -> None:
        """Hold on to the input of the last reduce-scatter in place of the one before."""
        before, self._reduced = self._reduced, source.hold() if source is not None else None
        if before is not None:
            before.drop()

    def after_backward(self) -> None:
        """`_root_post_backward_final_callback`: the turn of those without an argument that has a gradient.

        That is the root, which comes first, and below what is trained the blocks.
        """
        ledger = self.machine.ledger
        for unit in (self.units[-1], *self.units[:-1]):
            block = unit.block
            with ledger.at(ledger.module if block is None else f"blocks.{block}", block, "root_post_backward"):
                if not unit.done:
                    unit.after_backward()
                if self.defers:
                    unit.done = False
                else:
                    unit.end_backward()
        self.reduced(None)

    def after_schedule(self) -> None:
        """`_PipelineStageBase.perform_reduce_grad`: each unit's turn, the root's first."""
        self.defers = False
        self.after_backward()
        self.defers = True

    def agree_on_overflow(self, found: Tensor) -> None:
        """Ask the others."""
        self.machine.collective("all-reduce", DATA, found, waits="step")

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Each accelerator has its shards' part of the norm."""
        with self.on_shards():
            clip_parts(parameters, (*(axis for axis in self.sharing.apart if axis != EXPERT), DATA))


def _shards(unit: Unit) -> Iterator[tuple[Tensor, Shape]]:
    yield from zip(unit.shards, unit.padded, strict=True)


class ShardedGradients(FullySharded):
    """ZeRO-2: `fully_shard(reshard_after_forward=False)`, as FSDP1's SHARD_GRAD_OP."""

    reshards = False


REPLICAS: dict[str, type[Replica]] = {
    "alone": Replica,
    "ddp": Buckets,
    "ddp-fp32": MainGradients,
    "zero1": ShardedUpdate,
    "zero2": ShardedGradients,
    "zero3": FullySharded,
}
