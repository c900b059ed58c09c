"""Data parallelism: DDP's buckets, and FSDP2's units, which hold shards and are whole only while they are needed.

The docstrings have the names of torch/distributed/fsdp/_fully_shard. The collectives are NCCL's, which allocate
nothing that PyTorch counts, or on the CPU gloo's, which do.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from estimator.eager.autograd import attach, record
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ZERO, D, ceiling
from estimator.eager.ops import python_number
from estimator.eager.tensor import FLOAT32, Tensor, op
from estimator.optim.updates import at_parameter, clip_gradients, gradient_norms, in_place, number_of, zero_grad

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.autograd import Context
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine

HELD = Category.COMMUNICATION


class Model(Protocol):
    """What is asked of a model here, `estimator.models`' Transformer: its parts, and a place for their units."""

    machine: Machine
    blocks: Any
    unit: Unit | None

    @property
    def buffers(self) -> list[Tensor]:
        """In PyTorch's order."""

    def parameters(self) -> Iterator[Tensor]:
        """In PyTorch's order."""


class Replica:
    """A model that runs alone: the optimizer updates its parameters.

    Attributes:
        updated: what the optimizer updates.
    """

    def __init__(self, model: Model, micro_batches: int) -> None:
        self.machine = model.machine
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.updated: Sequence[Tensor] = self.parameters
        self.last = micro_batches - 1

    def before_forward(self) -> None:
        """Before each micro-batch."""

    def before_update(self) -> None:
        """Before the optimizer's step."""

    def after_update(self) -> None:
        """After the optimizer's step: gradients become None."""
        zero_grad(self.updated)

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients of what the optimizer updates by their global norm."""
        clip_gradients(parameters)


class Buckets(Replica):
    """DDP: a second copy of the gradients, in which they are summed over the accelerators and copied back.

    `gradient_as_bucket_view` is False unless asked for, so the buckets live as long as the model. There is one here for
    each block and one for all else; PyTorch cuts the same bytes into 25 MiB (torch/csrc/distributed/c10d/reducer.cpp).
    """

    def __init__(self, model: Model, micro_batches: int) -> None:
        super().__init__(model, micro_batches)
        self.buffers = model.buffers
        self.buckets = []
        for block, part in by_block(self.parameters).items():
            with self.machine.ledger.at("" if block is None else f"blocks.{block}", block, "DDP bucket"):
                self.buckets.append(self.machine.empty((_elements(part),), part[0].dtype, category=HELD).hold())
        self.machine.on_gradient = self.gradient_ready
        self.machine.on_backward_end = self.after_backward

    @property
    def exchanges(self) -> bool:
        """Gradients are exchanged in the last micro-batch only (`no_sync`)."""
        return self.machine.ledger.micro_batch == self.last

    def before_forward(self) -> None:
        """`_sync_buffers`: once a step the model's buffers are broadcast, through a flat copy."""
        if self.buffers and self.machine.ledger.micro_batch == 0:
            with self.machine.ledger.at("", None, "broadcast_coalesced"):
                flat = self.machine.empty((_elements(self.buffers),), self.buffers[0].dtype, category=HELD).hold()
                flat.drop()

    def gradient_ready(self, p: Tensor) -> None:
        """`mark_variable_ready_dense`: the gradient, divided by D, goes into its bucket."""
        if self.exchanges:
            assert p.grad is not None
            with python_number(self.machine, p.dtype):
                self.machine.kernel("mul", (p.grad,), (p.grad,))

    def after_backward(self) -> None:
        """`finalize_backward`: the sums go back into the gradients."""
        if self.exchanges:
            for p in self.parameters:
                assert p.grad is not None
                with at_parameter(p, "finalize_bucket_dense"):
                    self.machine.kernel("copy_", (p.grad,), (p.grad,))


class ShardedUpdate(Buckets):
    """ZeRO-1: DDP, and each accelerator updates its rows of every parameter, then all broadcast theirs, in place."""

    def __init__(self, model: Model, micro_batches: int) -> None:
        super().__init__(model, micro_batches)
        self.updated = [_rows(p) for p in self.parameters]

    def before_update(self) -> None:
        """The rows' gradients are rows of the gradients, which they keep."""
        for rows, p in zip(self.updated, self.parameters, strict=True):
            assert p.grad is not None
            rows.grad = _rows(p.grad)
        zero_grad(self.parameters)

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Each accelerator has its rows' part of the norm."""
        clip_shards(parameters)


def _rows(x: Tensor) -> Tensor:
    """The first accelerator's rows of x, a view."""
    rows = ceiling(x.shape[0], D)
    return Tensor(x.machine, x.storage, (rows, *x.shape[1:]), x.stride, x.dtype).hold()


class Unit:
    """Parameters that are gathered together, `FSDPParamGroup`: those of a block, or all others (the root).

    Attributes:
        shards: this accelerator's rows of each parameter; the first accelerator's, which has the most.
        gathered: the buffer of an all-gather that has not been copied out yet.
        whole: whether the parameters are there.
    """

    def __init__(self, fsdp: FullySharded, parameters: Sequence[Tensor], *, root: bool) -> None:
        self.fsdp, self.parameters, self.root = fsdp, parameters, root
        self.machine = parameters[0].machine
        self.shards = [self._shard(p) for p in parameters]
        self.gathered: Tensor | None = None
        self.whole = False

    def _shard(self, p: Tensor) -> Tensor:
        """`FSDPParam._init_sharded_param`: the parameter's storage is emptied; full, it is as long as D shards."""
        machine, where = self.machine, p.storage.where
        with machine.ledger.at(where.module, where.block, "fully_shard"):
            rows = ceiling(p.shape[0], D)
            shard = machine.empty((rows, *p.shape[1:]), p.dtype, category=Category.PARAMETER).hold()
            machine.ledger.free(p.storage)
        p.storage.category = HELD
        p.storage.nbytes = D * shard.storage.nbytes
        return shard

    def gather(self) -> None:
        """`unshard`: all-gather into one buffer; nothing to do if that has been done."""
        if self.whole or self.gathered is not None:
            return
        with self._doing("all_gather"):
            self.gathered = self._buffer(D * _elements(self.shards)).hold()
            self.machine.kernel("all_gather_copy_in", self.shards, self.shards)
            if self.fsdp.gloo:  # it receives into a buffer of its own
                self._buffer(D * _elements(self.shards)).discard()

    def copy_out(self) -> None:
        """`wait_for_unshard`: from the buffer into each parameter's storage.

        In forward the buffer stays until the next unit has copied its own out, so that the two gathers may overlap.
        """
        gathered, self.gathered = self.gathered, None
        if gathered is None:
            return
        with self._doing("all_gather_copy_out"):
            for p in self.parameters:
                self.machine.ledger.refill(p.storage)
            self.machine.kernel("split_with_sizes_copy", self.parameters, self.parameters)
            self.whole = True
            if self.machine.ledger.phase is Phase.FORWARD:
                self.fsdp.keep(gathered)
            gathered.drop()

    def reshard(self) -> None:
        """`to_sharded`: empty the parameters' storages."""
        if self.whole:
            with self._doing("reshard"):
                for p in self.parameters:
                    self.machine.ledger.free(p.storage)
        self.whole = False

    def before_forward(self, args: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`pre_forward`; a node is put before the arguments that will have a gradient, behind which that is reduced."""
        self.gather()
        self.copy_out()
        return tuple(self._behind(x) if x is not None and x.requires_grad else x for x in args)

    def after_forward(self, out: Tensor) -> None:
        """`post_forward`; before the result's backward the unit will be whole."""
        if self.root:
            self.fsdp.keep(None)
        elif self.fsdp.reshards:
            self.reshard()
        assert out.grad_fn is not None
        out.grad_fn.hook = self.before_backward

    def before_backward(self) -> None:
        """`pre_backward`: whole, and the next one's all-gather is under way."""
        self.gather()
        self.copy_out()
        position = self.fsdp.units.index(self)
        if position > 0:
            self.fsdp.units[position - 1].gather()

    @op
    def _behind(self, x: Tensor) -> Tensor:
        """`RegisterPostBackwardFunction`."""

        def backward(_: Context, grad: Tensor) -> list[Tensor | None]:
            self.after_backward()
            return [grad]

        node = record("RegisterPostBackwardFunctionBackward", (x,), backward)
        return attach(node, x.view(x.shape, x.stride))

    def after_backward(self) -> None:
        """`post_backward`: empty the parameters, reduce-scatter the gradients, keep one's rows of the sums."""
        self.reshard()
        self.fsdp.reduced(None)
        with self._doing("reduce_scatter"):
            padded = [rows.numel for rows in self.shards]
            source = self._buffer(D * _elements(self.shards)).hold()
            self._copy_in()
            for p in self.parameters:
                assert p.grad is not None
                p.grad.drop()
                p.grad = None
            first = self.shards[0].grad is None
            rows = self.machine.empty(
                (sum(padded, ZERO),), self.shards[0].dtype, category=Category.GRADIENT if first else HELD
            ).hold()
            if self.fsdp.gloo:  # reduces all of it in a copy, and divides that
                copy = self._buffer(D * _elements(self.shards)).hold()
                with python_number(self.machine, FLOAT32):
                    pass
                copy.drop()
            for shard in self.shards:
                if first:
                    stride = self.machine.contiguous(shard.shape)
                    shard.grad = Tensor(self.machine, rows.storage, shard.shape, stride, rows.dtype).hold()
                    mine = shard.storage.where, shard.storage.nbytes
                    self.machine.ledger.gradients.setdefault(rows.storage, []).append(mine)
                else:
                    assert shard.grad is not None
                    self.machine.kernel("add_", (shard.grad,), (shard.grad,))
            rows.drop()
            self.fsdp.reduced(source)
            source.drop()

    def _copy_in(self) -> None:
        """`chunk_cat`: on the CPU through padded copies of those whose rows D does not divide."""
        machine = self.machine
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        machine.kernel("chunk_cat", gradients, gradients)
        padded = []
        for p, shard in zip(self.parameters, self.shards, strict=True):
            if machine.device == "cpu" and not machine.divides(D, p.shape[0]):
                padded.append(self._buffer(D * shard.numel).hold())
        for x in padded:
            x.drop()

    def _buffer(self, elements: Size) -> Tensor:
        return self.machine.empty((elements,), self.shards[0].dtype, category=HELD)

    @contextmanager
    def _doing(self, name: str) -> Iterator[None]:
        """What happens in this context is this unit's communication, and belongs to the place where the step is."""
        ledger = self.machine.ledger
        with ledger.at(ledger.module, ledger.block, f"FSDP {name}"):
            yield


class FullySharded(Replica):
    """FSDP2, `fully_shard` on each block and on the model.

    Attributes:
        units: the blocks' in order, and last the root's.
        reshards: the blocks' parameters are emptied after forward (ZeRO-3); else only after backward (ZeRO-2).
        gloo: the collectives are the CPU's.
    """

    reshards = True

    def __init__(self, model: Model, micro_batches: int) -> None:
        super().__init__(model, micro_batches)
        self.gloo = self.machine.device == "cpu"
        groups = by_block(self.parameters)
        rest = groups.pop(None)
        self.units = [Unit(self, part, root=False) for part in groups.values()]
        for block, unit in zip(model.blocks, self.units, strict=True):
            block.unit = unit
        model.unit = Unit(self, rest, root=True)
        self.units.append(model.unit)
        shard = {p: rows for unit in self.units for p, rows in zip(unit.parameters, unit.shards, strict=True)}
        self.updated = [shard[p] for p in self.parameters]
        self.machine.on_backward_end = self.after_backward
        self._gathered: Tensor | None = None
        self._reduced: Tensor | None = None

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
        """`_root_post_backward_final_callback`: no argument of the model has a gradient, so the root's turn is here."""
        self.units[-1].after_backward()
        self.reduced(None)

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Each accelerator has its shards' part of the norm."""
        clip_shards(parameters)


class ShardedGradients(FullySharded):
    """ZeRO-2: `fully_shard(reshard_after_forward=False)`, as FSDP1's SHARD_GRAD_OP."""

    reshards = False


REPLICAS: dict[str, type[Replica]] = {
    "alone": Replica,
    "ddp": Buckets,
    "zero1": ShardedUpdate,
    "zero2": ShardedGradients,
    "zero3": FullySharded,
}


def clip_shards(parameters: Sequence[Tensor]) -> None:
    """`trainer.parallel.distributed.Weights.clip`: norms, squared and summed over the accelerators; one factor."""
    machine, count = parameters[0].machine, number_of(parameters)
    with machine.ledger.at("clipping", None, "Weights.clip"):
        norms = gradient_norms(parameters)
        dtype = norms[0].dtype
        stacked = machine.empty((count,), dtype).hold()
        for p, norm in zip(parameters, norms, strict=True):
            with at_parameter(p, "vector_norm"):
                norm.drop()
        squares = machine.empty((count,), dtype).hold()
        stacked.drop()
        squares.drop()
        for p in parameters:
            assert p.grad is not None
            with at_parameter(p, "_foreach_mul_"):
                in_place("mul_", p.grad, arithmetic=1)


def by_block(parameters: Sequence[Tensor]) -> dict[int | None, list[Tensor]]:
    """The parameters of each block, and under None all others."""
    groups: dict[int | None, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(p.storage.where.block, []).append(p)
    return groups


def _elements(tensors: Sequence[Tensor]) -> Size:
    return sum((t.numel for t in tensors), ZERO)
