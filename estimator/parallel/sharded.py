"""`fully_shard`, FSDP2: units that hold shards and are whole only while they are needed, on a mesh of one or two axes.

The docstrings have the names of torch/distributed/fsdp/_fully_shard. The collectives are NCCL's, which allocate nothing
that PyTorch counts, or on the CPU gloo's, which do.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from estimator.eager.autograd import add_wider, attach, record
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ZERO, D
from estimator.eager.ops import python_number
from estimator.eager.tensor import UINT8, Tensor, converted, op
from estimator.eager.views import cast
from estimator.parallel.data import (
    HELD,
    Buckets,
    MainGradients,
    Replica,
    ShardedUpdate,
    by_block,
    clip_parts,
    elements,
)
from estimator.parallel.placement import DATA, REPLICATE, rows_on
from estimator.parallel.tensor import place_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.autograd import Context
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Shape
    from estimator.parallel.data import Model, Sharing


class Unit:
    """Parameters that are gathered together, `FSDPParamGroup`: those of a block, or all others (the root).

    The root of a stage of a pipeline that is neither the first nor the last has none of its own, and only casts.
    Frozen parameters are shared, gathered and let go as the others are; only what has a gradient is reduced.

    Attributes:
        block: the index of its block; None for the root.
        shards: this accelerator's rows of each parameter.
        padded: the shapes of full shards, which is what every accelerator's storages hold.
        gathered: the buffer of an all-gather that has not been copied out yet.
        kept: what is held of each parameter from forward to backward where that is more than the shard.
        accumulated: the gradients of whole parameters in the dtype in which they will be summed, if not their own.
        whole: whether the parameters are there.
        done: whether backward is over for it.
    """

    def __init__(self, fsdp: FullySharded, parameters: Sequence[Tensor], *, root: bool) -> None:
        self.fsdp, self.parameters, self.root = fsdp, parameters, root
        self.machine, self.block = fsdp.machine, parameters[0].storage.where.block if parameters else None
        self.padded: list[Shape] = [(rows_on(self.machine, p.shape[0], 0), *p.shape[1:]) for p in parameters]
        self.shards = [self._shard(p, shape) for p, shape in zip(parameters, self.padded, strict=True)]
        self.gathered: Tensor | None = None
        self.kept: list[Tensor] = []
        self.summed: Tensor | None = None
        self.accumulated: dict[Tensor, Tensor] = {}
        self.whole = self.done = False

    def _shard(self, p: Tensor, padded: Shape) -> Tensor:
        """`FSDPParam._init_sharded_param`: the parameter's storage is emptied; full, it is as long as D shards."""
        machine, where = self.machine, p.storage.where
        with machine.ledger.at(where.module, where.block, "fully_shard"):
            with self.fsdp.on_shards():
                full = machine.empty(padded, p.dtype, category=Category.PARAMETER)
            rows = rows_on(machine, p.shape[0], self.fsdp.sharing.rank)
            shard = Tensor(machine, full.storage, (rows, *padded[1:]), full.stride, p.dtype).hold()
            full.discard()
            machine.ledger.free(p.storage)
        p.placement = shard.placement = {**p.placement, DATA: 0}
        p.dtype = self.fsdp.sharing.param_dtype or p.dtype
        p.storage.category, p.storage.itemsize = HELD, p.dtype.itemsize
        p.storage.nbytes = p.dtype.itemsize * D * machine.product(padded)
        return shard

    def _elements(self, parameters: Sequence[Tensor]) -> Size:
        """Of full shards of these parameters."""
        padded = dict(zip(self.parameters, self.padded, strict=True))
        return sum((self.machine.product(padded[p]) for p in parameters), ZERO)

    def _whole_buffer(self) -> Tensor:
        """A buffer for all parameters, whole: of their dtype or, where they differ in it, of bytes."""
        dtypes = {p.dtype for p in self.parameters}
        if len(dtypes) == 1:
            return self._buffer(D * self._elements(self.parameters), dtypes.pop())
        nbytes = sum((p.dtype.itemsize * self._elements([p]) for p in self.parameters), ZERO)
        return self._buffer(D * nbytes, UINT8)

    def gather(self) -> None:
        """`unshard`: all-gather into one buffer, through a flat cast; nothing to do if that has been done."""
        if self.whole or self.gathered is not None:
            return
        with self._doing("all_gather"):
            held = self.kept or self.shards
            flat = None
            if self.fsdp.sharing.offload:
                inputs = self._fetched()
                self._all_gather(inputs)
                for x in inputs:
                    x.drop()
                return
            cast_ = [p for p, shard in zip(self.parameters, self.shards, strict=True) if p.dtype != shard.dtype]
            if cast_:  # `foreach_all_gather` holds it until it returns
                flat = self._buffer(elements(self.kept) if self.kept else self._elements(cast_), cast_[0].dtype).hold()
                self.machine.kernel("_foreach_copy_", held, held)
            self._all_gather(held)
            if flat is not None:
                flat.drop()

    def _all_gather(self, held: Sequence[Tensor]) -> None:
        """Of these inputs."""
        self.gathered = self._whole_buffer().hold()
        self.machine.kernel("all_gather_copy_in", held, held)
        self.machine.collective("all-gather", DATA, self.gathered, waits="unit")
        if self.fsdp.gloo:  # it receives into a buffer of its own
            self._whole_buffer().discard()

    def _fetched(self) -> list[Tensor]:
        """`FSDPParam.all_gather_inputs` of offloaded shards, held: each is copied from the host, then cast."""
        if self.kept:
            return [x.hold() for x in self.kept]
        found = []
        for p, shard, padded in zip(self.parameters, self.shards, self.padded, strict=True):
            count = self.machine.product(padded)
            x = shard.hold() if self.machine.device == "cpu" else self._buffer(count, shard.dtype).hold()
            if p.dtype != shard.dtype:
                wide, x = x, self._buffer(count, p.dtype).hold()
                self.machine.kernel("copy_", (wide,), (x,))
                wide.drop()
            found.append(x)
        return found

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
            self._drop_kept()
            self.whole = True
            if self.machine.ledger.phase is Phase.FORWARD:
                self.fsdp.keep(gathered)
            gathered.drop()

    def _drop_kept(self) -> None:
        for piece in self.kept:
            piece.drop()
        self.kept = []

    def reshard(self) -> None:
        """`to_sharded`: empty the parameters' storages."""
        if self.whole:
            with self._doing("reshard"):
                for p in self.parameters:
                    self.machine.ledger.free(p.storage)
        self._drop_kept()
        self.whole = False

    def reshard_to(self, size: int) -> None:
        """`to_sharded_post_forward`: each of `size` accelerators keeps its part of every parameter until backward."""
        with self._doing("reshard"):
            for p, shape in zip(self.parameters, self.padded, strict=True):
                self.kept.append(self._buffer(D * self.machine.product(shape) / size, p.dtype).hold())
                self.machine.kernel("clone", (p,), (self.kept[-1],))
                self.machine.ledger.free(p.storage)
        self.whole = False

    def cast_inputs(self, args: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`cast_forward_inputs`: floating arguments come in the dtype of the whole parameters."""
        dtype = self.fsdp.sharing.param_dtype
        if dtype is None:
            return args
        return tuple(cast(x, dtype) if x is not None and x.dtype.is_floating else x for x in args)

    def before_forward(self, args: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`pre_forward`; a node is put before the arguments that will have a gradient, behind which that is reduced."""
        if not self.parameters:
            return args
        self.gather()
        self.copy_out()
        return tuple(self._behind(x) if x is not None and x.requires_grad else x for x in args)

    def after_forward(self, out: Tensor) -> None:
        """`post_forward`; before the result's backward the unit will be whole."""
        if self.root:
            self.fsdp.keep(None)
        elif self.fsdp.reshards and self.fsdp.sharing.reshard is not None:
            self.reshard_to(self.fsdp.sharing.reshard)
        elif self.fsdp.reshards:
            self.reshard()
        if out.grad_fn is not None and self.parameters:
            out.grad_fn.hook = self.before_backward

    def before_backward(self) -> None:
        """`pre_backward`: whole, and the next one's all-gather is under way, whether that has a backward or not."""
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
        self.done = True
        self.accumulate()
        if self.fsdp.defers:
            return
        for p, gradient in self.accumulated.items():
            p.grad = gradient
        self.accumulated.clear()
        place_gradients(self.parameters)  # `unsharded_grad_data`
        self.reshard()
        self.fsdp.reduced(None)
        having = [p for p in self.parameters if p.grad is not None]
        if not having:
            return
        with self._doing("reduce_scatter"):
            dtype = self.fsdp.sharing.reduce_dtype or having[0].dtype
            source = self._buffer(D * self._elements(having), dtype).hold()
            self._copy_in(having, source)
            last = having[-1].grad
            assert last is not None
            last.hold()  # by the name of a loop in `foreach_reduce`, until that returns
            for p in having:
                assert p.grad is not None
                p.grad.drop()
                p.grad = None
            rows = self._buffer(self._elements(having), dtype).hold()
            self.machine.collective("reduce-scatter", DATA, source, waits="update")
            if self.fsdp.gloo:  # reduces all of it in a copy, and divides that
                copy = self._buffer(D * self._elements(having), dtype).hold()
                self._divide(dtype)
                copy.drop()
            if self.fsdp.sharing.replicated:
                self.machine.collective("all-reduce", REPLICATE, rows, waits="update")
                if self.fsdp.gloo:
                    self._divide(dtype)
                self.summed = rows.hold()  # `_all_reduce_state`, until backward is over
            kept = next(shard.dtype for p, shard in zip(self.parameters, self.shards, strict=True) if p is having[0])
            if dtype != kept:
                wide = converted(rows, kept).hold()
                rows.drop()
                rows = wide
            self._take(having, rows)
            rows.drop()
            last.drop()
            self.fsdp.reduced(source)
            source.drop()

    def accumulate(self) -> None:
        """`accumulate_unsharded_grad_if_needed`, and for a later backward `to_accumulated_grad_if_needed`."""
        for p, total in self.accumulated.items():
            if p.grad is not None:
                with self._doing("accumulate_unsharded_grad_if_needed"):
                    add_wider(total, p.grad)
                p.grad.drop()
                p.grad = None
        dtype = self.fsdp.sharing.reduce_dtype
        if dtype is None or not self.fsdp.defers:
            return
        for p in self.parameters:
            if p.grad is not None and p.grad.dtype != dtype:
                gradient, p.grad = p.grad, None
                with self._doing("to_accumulated_grad_if_needed"):
                    self.accumulated[p] = converted(gradient, dtype).hold()
                gradient.drop()

    def _divide(self, dtype: Dtype) -> None:
        """gloo's mean: the sum, divided in place by a number."""
        with python_number(self.machine, dtype):
            pass

    def _take(self, having: Sequence[Tensor], rows: Tensor) -> None:
        """The sums become the shards' gradients, or are added to them."""
        shards = [
            (shard, padded)
            for p, shard, padded in zip(self.parameters, self.shards, self.padded, strict=True)
            if any(p is x for x in having)
        ]
        first = shards[0][0].grad is None
        moves = self.fsdp.sharing.offload and self.machine.device != "cpu"
        rows.storage.category = Category.GRADIENT if first and not moves else HELD
        for shard, padded in shards:
            if moves:
                self._take_to_host(shard, rows.dtype, first=first)
            elif first:
                stride = self.machine.contiguous(shard.shape)
                shard.grad = Tensor(self.machine, rows.storage, shard.shape, stride, rows.dtype).hold()
                mine = shard.storage.where, rows.dtype.itemsize * self.machine.product(padded)
                self.machine.ledger.gradients.setdefault(rows.storage, []).append(mine)
            else:
                assert shard.grad is not None
                self.machine.kernel("add_", (shard.grad,), (shard.grad,))
            if shard.after_accumulation is not None:
                with self.fsdp.on_shards():
                    shard.after_accumulation(shard)

    def _take_to_host(self, shard: Tensor, dtype: Dtype, *, first: bool) -> None:
        """A shard's part of the sums, copied to the host."""
        with self.machine.on_host():
            copy = self.machine.empty(shard.shape, dtype, category=Category.GRADIENT if first else HELD).hold()
            if first:
                shard.grad = copy
                self.machine.ledger.gradients[copy.storage] = [(shard.storage.where, copy.storage.nbytes)]
                return
            assert shard.grad is not None
            self.machine.kernel("add_", (shard.grad, copy), (shard.grad,))
            copy.drop()

    def end_backward(self) -> None:
        """`finalize_backward`; what was gathered for a backward that there is not is let go."""
        for held in (self.summed, self.gathered):
            if held is not None:
                held.drop()
        self.summed = self.gathered = None
        self.done = False

    def _copy_in(self, having: Sequence[Tensor], source: Tensor) -> None:
        """`chunk_cat`: on the CPU through padded copies of those whose rows D does not divide.

        Where the source has another dtype, the CPU's cat takes each of them through one more copy, one after the other.
        """
        machine = self.machine
        gradients = [p.grad for p in having if p.grad is not None]
        machine.kernel("chunk_cat", gradients, gradients)
        if machine.device != "cpu":
            return
        dtype = gradients[0].dtype
        padded = [
            self._buffer(D * self._elements([p]), dtype).hold() for p in having if not machine.divides(D, p.shape[0])
        ]
        if source.dtype != dtype:
            for p in having:
                self._buffer(D * self._elements([p]), dtype).discard()
        for x in padded:
            x.drop()

    def _buffer(self, count: Size, dtype: Dtype) -> Tensor:
        return self.machine.empty((count,), dtype, category=HELD)

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
        defers: gradients are added up whole, and not reduced in this backward (`set_requires_gradient_sync(False)`).
    """

    reshards = True

    def __init__(self, model: Model, sharing: Sharing) -> None:
        super().__init__(model, sharing)
        self.gloo, self.defers = self.machine.device == "cpu", sharing.staged
        groups = by_block(list(model.parameters()))
        rest = groups.pop(None, [])
        self.units = [Unit(self, part, root=False) for part in groups.values()]
        for block, unit in zip(model.blocks, self.units, strict=True):
            block.unit = unit
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
            clip_parts(parameters, (*self.sharing.apart, DATA))


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
