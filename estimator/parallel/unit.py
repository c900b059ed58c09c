"""What `fully_shard` gathers together: parameters of which each accelerator has a shard, whole while they are needed.

The docstrings have the names of torch/distributed/fsdp/_fully_shard.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from estimator.eager.autograd import add_wider, attach, record
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ONE, ZERO, D
from estimator.eager.ops import python_number
from estimator.eager.tensor import UINT8, Tensor, converted, op
from estimator.eager.views import cast
from estimator.parallel.data import HELD, elements
from estimator.parallel.placement import DATA, EXPERT, REPLICATE, rows_on
from estimator.parallel.tensor import place_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from estimator.eager.autograd import Context
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Shape
    from estimator.parallel.data import Sharing


class Fsdp(Protocol):
    """What units ask of the whole, `estimator.parallel.sharded.FullySharded`."""

    machine: Machine
    sharing: Sharing
    units: list[Unit]
    reshards: bool
    gloo: bool
    defers: bool

    def on_shards(self) -> AbstractContextManager[None]:
        """Where shards are."""

    def keep(self, gathered: Tensor | None) -> None:
        """In place of the last all-gather's buffer in forward."""

    def reduced(self, source: Tensor | None) -> None:
        """In place of the last reduce-scatter's input."""


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
        left: the same of the step before, where no backward has let it go.
        accumulated: the gradients of whole parameters in the dtype in which they will be summed, if not their own.
        whole: whether the parameters are there.
        done: whether backward is over for it.
    """

    ranks: Size = D
    cut: Mapping[str, int] = {DATA: 0}

    def __init__(self, fsdp: Fsdp, parameters: Sequence[Tensor], *, root: bool) -> None:
        self.fsdp, self.parameters, self.root = fsdp, parameters, root
        self.machine, self.block = fsdp.machine, parameters[0].storage.where.block if parameters else None
        self.padded: list[Shape] = [(self._rows(p, 0), *p.shape[1:]) for p in parameters]
        self.shards = [self._shard(p, shape) for p, shape in zip(parameters, self.padded, strict=True)]
        self.gathered: Tensor | None = None
        self.kept: list[Tensor] = []
        self.left: list[Tensor] = []
        self.summed: Tensor | None = None
        self.accumulated: dict[Tensor, Tensor] = {}
        self.whole = self.done = False

    def _shard(self, p: Tensor, padded: Shape) -> Tensor:
        """`FSDPParam._init_sharded_param`: the parameter's storage is emptied; full, it is as long as D shards."""
        machine, where = self.machine, p.storage.where
        with machine.ledger.at(where.module, where.block, "fully_shard"):
            with self.fsdp.on_shards():
                full = machine.empty(padded, p.dtype, category=Category.PARAMETER)
            rows = self._rows(p, self.fsdp.sharing.rank)
            shard = Tensor(machine, full.storage, (rows, *padded[1:]), full.stride, p.dtype).hold()
            full.discard()
            machine.ledger.free(p.storage)
        p.placement = shard.placement = {**p.placement, **self.cut}
        p.dtype = self.fsdp.sharing.param_dtype or p.dtype
        p.storage.category, p.storage.itemsize = HELD, p.dtype.itemsize
        p.storage.nbytes = p.dtype.itemsize * self.ranks * machine.product(padded)
        return shard

    def _rows(self, p: Tensor, rank: int) -> Size:
        """Rows of `p` that an accelerator has."""
        return rows_on(self.machine, p.shape[0], rank)

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
        self.left += self.kept
        self.kept = []
        self.whole = False

    def reshard_to(self, size: int) -> None:
        """`to_sharded_post_forward`: each of `size` accelerators keeps its part of every parameter until backward.

        Only `to_unsharded` lets go of it: without a backward it is there until the next step's takes its name.
        """
        with self._doing("reshard"):
            for p, shape in zip(self.parameters, self.padded, strict=True):
                self.kept.append(self._part(p, shape, size))
                self.machine.kernel("clone", (p,), (self.kept[-1],))
                if self.left:
                    self.left.pop(0).drop()
                self.machine.ledger.free(p.storage)
        self.whole = False

    def leave(self, size: int) -> None:
        """What a step before has left, of a unit without a backward."""
        for p, shape in zip(self.parameters, self.padded, strict=True):
            where = p.storage.where
            with self.machine.ledger.at(where.module, where.block, "FSDP reshard"):
                self.left.append(self._part(p, shape, size))

    def _part(self, p: Tensor, padded: Shape, size: int) -> Tensor:
        return self._buffer(D * self.machine.product(padded) / size, p.dtype).hold()

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

    def before_recomputation(self) -> None:
        """`pre_forward` in a checkpoint's second forward: a block's unit is in its backward already, and whole."""

    def after_forward(self, out: Tensor | tuple[Tensor, Tensor | None]) -> None:
        """`post_forward`; before the result's backward the unit will be whole, and of several the first's."""
        out = out[0] if isinstance(out, tuple) else out
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
            self._reduce(having)

    def _reduce(self, having: Sequence[Tensor]) -> None:
        """`foreach_reduce`."""
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
        self._hand_out(having, rows)
        last.drop()
        self.fsdp.reduced(source)
        source.drop()

    def _hand_out(self, having: Sequence[Tensor], rows: Tensor) -> None:
        """The summed rows, in the dtype in which shards are kept, become the shards' gradients."""
        kept = next(shard.dtype for p, shard in zip(self.parameters, self.shards, strict=True) if p is having[0])
        if rows.dtype != kept:
            wide = converted(rows, kept).hold()
            rows.drop()
            rows = wide
        self._take(having, rows)
        rows.drop()

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
            self._buffer(self.ranks * self._elements([p]), dtype).hold()
            for p in having
            if self.ranks is not ONE and not machine.divides(D, p.shape[0])
        ]
        if source.dtype != dtype:
            for p in having:
                self._buffer(self.ranks * self._elements([p]), dtype).discard()
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


class OwnUnit(Unit):
    """Experts of which an accelerator has the only copy: `fully_shard` on a mesh of one, which sends nothing.

    Parameters are still emptied, copied (and cast) when they are needed, and their gradients copied once more, divided
    by the accelerators whose tokens are in them (`set_gradient_divide_factor`), as torchtitan shards experts.
    """

    ranks = ONE
    cut: Mapping[str, int] = {}

    def _rows(self, p: Tensor, rank: int) -> Size:  # noqa: ARG002 - all of them on each
        return p.shape[0]

    def gather(self) -> None:
        """`unshard` with a world size of 1 gathers nothing."""

    def copy_out(self) -> None:
        """`wait_for_unshard` with a world size of 1: one parameter after the other, through a cast."""
        if self.whole:
            return
        with self._doing("copy_out"):
            before: Tensor | None = None
            for p, shard in zip(self.parameters, self.shards, strict=True):
                x = shard if p.dtype == shard.dtype else converted(shard, p.dtype)
                x.hold()
                if before is not None:
                    before.drop()
                self.machine.ledger.refill(p.storage)
                self.machine.kernel("copy_", (x,), (p,))
                before = x
            if before is not None:
                before.drop()
            self.whole = True
            if self.machine.ledger.phase is Phase.FORWARD:
                self.fsdp.keep(None)

    def before_recomputation(self) -> None:
        """That of a part of a block, whose own backward has not begun."""
        self.copy_out()

    def _reduce(self, having: Sequence[Tensor]) -> None:
        """`foreach_reduce` with a world size of 1."""
        dtype = self.fsdp.sharing.reduce_dtype or having[0].dtype
        source = self._buffer(self._elements(having), dtype).hold()
        self._copy_in(having, source)
        for p in having:
            assert p.grad is not None
            p.grad.drop()
            p.grad = None
        rows = self._buffer(self._elements(having), dtype).hold()
        with python_number(self.machine, dtype):
            divided = self._buffer(self._elements(having), dtype).hold()
            self.machine.kernel("div", (source,), (divided,))
        self.machine.kernel("copy_", (divided,), (rows,))
        divided.drop()
        self._hand_out(having, rows)
        self.fsdp.reduced(source)
        source.drop()


def units_of(fsdp: Fsdp, parameters: Sequence[Tensor]) -> list[Unit]:
    """A block's units in the order in which their forwards end: that of experts that are shared out, and its own."""
    experts = [p for p in parameters if EXPERT in p.placement]
    rest = [p for p in parameters if EXPERT not in p.placement]
    return [*([OwnUnit(fsdp, experts, root=False)] if experts else []), Unit(fsdp, rest, root=False)]
