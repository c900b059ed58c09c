"""Symbolic tensors, who owns them, and the machine that they live on.

Ownership is counted, as CPython and libtorch count it, but by hand: `owners` is the number of names, argument lists,
saved variables, views and gradient slots that hold a tensor. An operator's result is born *floating* (no owner): an
operator that takes a floating tensor as its argument is its last user and discards it on return, which is what Python
does to the temporaries of an expression. `Locals` are the names of a function's frame.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar, cast

from estimator.eager.ledger import Category, Gemm, Kernel, Ledger, Message, Operand, Phase, Storage
from estimator.eager.letters import ONE, ZERO, Size, as_sizes, constant
from estimator.eager.sizes import Fact, ShapeClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from estimator.eager.autograd import Node
    from estimator.eager.checkpointing import Frame
    from estimator.eager.repetition import Stack

Shape = tuple[Size, ...]


class Dtype(NamedTuple):
    """A torch dtype: its name and its bytes an element."""

    name: str
    itemsize: int

    @property
    def is_floating(self) -> bool:
        """Not an integer, nor a bool."""
        return self.name.startswith(("float", "bfloat"))


FLOAT32 = Dtype("float32", 4)
BFLOAT16 = Dtype("bfloat16", 2)
FLOAT16 = Dtype("float16", 2)
FLOAT64 = Dtype("float64", 8)
COMPLEX64 = Dtype("complex64", 8)
INT64 = Dtype("int64", 8)
UINT64 = Dtype("uint64", 8)
INT32 = Dtype("int32", 4)
BOOL = Dtype("bool", 1)
UINT8 = Dtype("uint8", 1)
INT8 = Dtype("int8", 1)


class Walked(Protocol):
    """What a kernel goes over: a `Tensor`, or what was recorded of one."""

    @property
    def shape(self) -> Shape:
        """The number of elements in each dimension."""

    @property
    def stride(self) -> Shape:
        """Elements from one to the next in each dimension."""

    @property
    def dtype(self) -> Dtype:
        """Of its elements."""


class Machine:
    """What executes a step: a device's rules, a shape class, the autograd mode and the ledger.

    The differences between devices are these properties, each used in the one place that it speaks of.
    """

    def __init__(
        self, shapes: ShapeClass, device: str, stack: Stack, sizes: Mapping[str, int], dtype: Dtype = FLOAT32
    ) -> None:
        self.shapes, self.stack = shapes, stack
        self.device = device
        self.sizes = as_sizes(sizes)  # the numbers of this step, which answer what is asked of sizes
        self.dtype = dtype  # of parameters and buffers
        self.ledger = Ledger()
        self.grad_enabled = True
        self.sequence = 0
        self.frames: list[Frame] = []
        self.saves_on_host = False  # what is saved for backward is copied there
        self.makes_dtensors = False
        self.unwaited: dict[Storage, Callable[[], object]] = {}  # what ends with the wait for an asynchronous message
        self.below_dispatch = False  # an operator's own kernel runs, of whose products no dispatch mode is told
        self.on_gradient: Callable[[Tensor], None] | None = None  # after each AccumulateGrad
        self.on_backward_end: Callable[[], None] | None = None
        self.autocast_dtype: Dtype | None = None
        self.autocast_cache: dict[Tensor, Tensor] = {}
        self._sums: dict[Shape, Size] = {}
        self._products: dict[Shape, Size] = {}
        self._strides: dict[Shape, Shape] = {}
        self._widths: dict[Size, int] = {}
        self.layouts: dict[tuple[Any, ...], Shape] = {}

    @property
    def wraps_scalars(self) -> bool:
        """A Python number in an expression becomes a tensor in the memory that we count (it is always CPU memory)."""
        return self.device == "cpu"

    @property
    def casts_operands(self) -> bool:
        """CPU kernels read a copy of an operand in the dtype of the computation; CUDA kernels cast on the fly."""
        return self.device == "cpu"

    @property
    def dispatches_to_python(self) -> bool:
        """A TorchDispatchMode is on, as in a selective checkpoint: composite operators then leave in-place writes."""
        return bool(self.frames) and self.frames[-1].selective and not self.below_dispatch

    def divides(self, a: Size, b: Size) -> bool:
        """Whether a divides b in this step: a fact that its account depends on."""
        return self._fact("divides", a, b)

    def at_most(self, a: Size, b: Size | int) -> bool:
        """Whether a is at most b in this step: a fact that its account depends on."""
        return self._fact("at most", a, b if isinstance(b, Size) else constant(b))

    def _fact(self, kind: str, a: Size, b: Size) -> bool:
        fact = Fact(kind, a, b)
        known = self.ledger.facts.get(fact)
        if known is None:
            known = bool(fact.answer(self.sizes))
            if a.number is None or b.number is None:
                self.ledger.facts[fact] = known
        return known

    def width(self, stride: Size) -> int:
        """The number behind a stride, to put strides in order: in one shape class all sizes give the same order."""
        found = self._widths.get(stride)
        if found is None:
            found = self._widths[stride] = int(self.sizes.value(stride))
        return found

    def product(self, sizes: Shape) -> Size:
        """The number of elements of a shape, in normal form."""
        found = self._products.get(sizes)
        if found is None:
            found = self._products[sizes] = self.shapes.product(sizes)
        return found

    def contiguous(self, shape: Shape) -> Shape:
        """Row-major strides."""
        found = self._strides.get(shape)
        if found is None:
            found = self._strides[shape] = tuple(self.product(shape[i + 1 :]) for i in range(len(shape)))
        return found

    def empty(
        self,
        shape: Sequence[Size],
        dtype: Dtype = FLOAT32,
        *,
        category: Category = Category.TEMPORARY,
        stride: Shape | None = None,
    ) -> Tensor:
        """A new tensor with a storage of its own, floating."""
        shape = tuple(shape)
        storage = self.ledger.allocate(self.product(shape), dtype.itemsize, category)
        return Tensor(self, storage, shape, stride or self.contiguous(shape), dtype)

    def kernel(
        self,
        name: str,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        *,
        gemm: Gemm | None = None,
        arithmetic: Size = ZERO,
        repeated: Size = ZERO,
        flops: Size | None = None,
    ) -> None:
        """Record a launch; its bytes are those of its operands, once each; `repeated` of its FLOPs repeat forward's.

        `flops` are those of its products, in place of what `gemm` comes to (groups of rows that are not alike).
        """
        ledger = self.ledger
        operands = [Operand(t.storage, t.dtype.itemsize * t.numel, written=False) for t in reads]
        operands += [Operand(t.storage, t.dtype.itemsize * t.numel, written=True) for t in writes]
        moved = tuple(operand.nbytes for operand in operands)
        nbytes = self._sums.get(moved)
        if nbytes is None:
            nbytes = self._sums[moved] = sum(moved, ZERO)
        if flops is None:
            flops = ZERO if gemm is None else 2 * self.product((gemm.b, gemm.m, gemm.n, gemm.k))
        here, recompute, turn = ledger.here, ledger.recompute, ledger.micro_batch
        repeated = flops if recompute else repeated
        if ledger.updates:
            here = here._replace(phase=Phase.OPTIMIZER)
        (ledger.host_kernels if ledger.host else ledger.kernels).append(
            Kernel(
                name, here, flops, arithmetic, nbytes, gemm, recompute, turn, repeated, tuple(operands),
                "plain" if gemm is not None else access_of(reads, writes),
                leading_of(reads[:2], writes[:1]) if gemm is not None else (),
            )
        )  # fmt: skip

    def collective(
        self, kind: str, axis: str, tensor: Tensor, *, waits: str, elements: Size | None = None, count: Size = ONE
    ) -> None:
        """Record a message of `tensor`, or of so many `elements` of its dtype in `count` messages."""
        nbytes = tensor.dtype.itemsize * (tensor.numel if elements is None else elements)
        ledger = self.ledger
        ledger.messages.append(
            Message(kind, axis, nbytes, count, *tensor.dtype, waits, ledger.here, ledger.micro_batch)
        )

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """What runs in this context is the host's, by the CPU's rules and in its memory; a CPU is its own host."""
        if self.device == "cpu":
            yield
            return
        before, self.device, self.ledger.host = self.device, "cpu", True
        try:
            yield
        finally:
            self.device, self.ledger.host = before, False

    @contextmanager
    def dtensors(self) -> Iterator[None]:
        """What operators make in this context are DTensors, whose gradients autograd never adds up in place."""
        before, self.makes_dtensors = self.makes_dtensors, True
        try:
            yield
        finally:
            self.makes_dtensors = before

    @contextmanager
    def no_grad(self) -> Iterator[None]:
        """Nothing is recorded for backward in this context."""
        before, self.grad_enabled = self.grad_enabled, False
        try:
            yield
        finally:
            self.grad_enabled = before

    @contextmanager
    def kernel_of(self) -> Iterator[None]:
        """What runs in this context is the kernel of one operator, whatever it is made of.

        Where Python dispatches, what it is made of is below autocast too.
        """
        casts = None if self.dispatches_to_python else self.autocast_dtype
        before, self.below_dispatch = self.below_dispatch, True
        try:
            with self.no_grad(), self.autocast(casts):
                yield
        finally:
            self.below_dispatch = before

    @contextmanager
    def autocast(self, dtype: Dtype | None) -> Iterator[None]:
        """`torch.autocast`: operators cast as `estimator.eager.autocast` says; the outermost ends weights' casts."""
        before, self.autocast_dtype = self.autocast_dtype, dtype
        try:
            yield
        finally:
            self.autocast_dtype = before
            ended = self.autocast_cache if before is None else {}
            for weight, kept in ended.items():
                with self.ledger.at(weight.storage.where.module, weight.storage.where.block, "autocast"):
                    kept.drop()
            ended.clear()


class Tensor:
    """A tensor: a window (shape, stride) on a storage, and its place in the autograd graph."""

    __slots__ = (
        "accumulator",
        "after_accumulation",
        "base",
        "dtype",
        "grad",
        "grad_fn",
        "is_wrapped_number",
        "machine",
        "output_nr",
        "owners",
        "partial",
        "placement",
        "requires_grad",
        "shape",
        "storage",
        "stride",
        "whole_gradient",
    )

    def __init__(
        self,
        machine: Machine,
        storage: Storage,
        shape: Shape,
        stride: Shape,
        dtype: Dtype,
        base: Tensor | None = None,
    ) -> None:
        self.machine, self.storage, self.shape, self.stride, self.dtype = machine, storage, shape, stride, dtype
        self.base = base
        self.owners = 0
        self.grad_fn: Node | None = None
        self.output_nr = 0
        self.requires_grad = False
        self.grad: Tensor | None = None
        self.after_accumulation: Callable[[Tensor], None] | None = None  # `register_post_accumulate_grad_hook`
        self.placement: dict[str, int] = {}  # of a parameter, which dimension each axis of the mesh cuts
        self.partial = False  # of a parameter: each rank has its part of the sum that is the gradient
        self.whole_gradient = False  # of a parameter of which a rank has a part, whose gradient each rank makes whole
        self.accumulator: Node | None = None
        self.is_wrapped_number = False
        storage.owners += 1
        if base is not None:
            base.owners += 1

    @property
    def numel(self) -> Size:
        """The number of elements."""
        return self.machine.product(self.shape)

    @property
    def is_leaf(self) -> bool:
        """A parameter: it wants a gradient, and no operator made it."""
        return self.requires_grad and self.grad_fn is None

    @property
    def is_contiguous(self) -> bool:
        """Row-major; the stride of a dimension of 1 does not matter."""
        want = self.machine.contiguous(self.shape)
        return self.stride is want or all(
            n == ONE or s == w for n, s, w in zip(self.shape, self.stride, want, strict=True)
        )

    def view(self, shape: Shape, stride: Shape) -> Tensor:
        """A view; it holds its base, as autograd's views do."""
        return Tensor(self.machine, self.storage, shape, stride, self.dtype, base=self.base or self)

    def alias(self) -> Tensor:
        """Another handle on the same storage that does not hold this one (`detach`, a saved output)."""
        return Tensor(self.machine, self.storage, self.shape, self.stride, self.dtype)

    def hold(self) -> Tensor:
        """One more owner."""
        self.owners += 1
        return self

    def drop(self) -> None:
        """One owner less; the last one takes the tensor with it."""
        self.owners -= 1
        self.discard()

    def discard(self) -> None:
        """The end of a tensor that nothing owns; one that has owners is left alone."""
        if self.owners > 0:
            return
        assert self.owners == 0, "dropped more often than held"
        self.owners = -1
        if self.grad_fn is not None:
            self.grad_fn.drop()
        self.storage.owners -= 1
        if self.storage.owners == 0:
            self.machine.ledger.free(self.storage)
        if self.base is not None:
            self.base.drop()


def leading_of(reads: Sequence[Walked], writes: Sequence[Walked]) -> tuple[Size, ...]:
    """The steps from row to row of a product's matrices: of its two inner strides the one that is not 1."""
    inner = {t.stride[-2] if t.stride[-1] == ONE else t.stride[-1] for t in (*reads, *writes) if len(t.shape) > 1}
    return tuple(sorted(inner, key=hash))


def access_of(reads: Sequence[Walked], writes: Sequence[Walked]) -> str:
    """How an elementwise kernel walks its operands (`ACCESSES`).

    aten/src/ATen/native/cuda/CUDALoops.cuh, `gpu_kernel_impl_nocast` and `gpu_kernel_impl`: several elements at a time
    where all operands are dense and alike, through an offset calculator where not, one at a time where a dtype has to
    be converted.
    """
    if not writes:
        return "plain"
    out = writes[0]
    strided = any(t.shape != out.shape or t.stride != out.stride for t in reads)
    floating = {t.dtype for t in (*reads, out) if t.dtype.name.startswith(("float", "bfloat"))}
    cast = "cast" if len(floating) > 1 else ""
    return "-".join(word for word in (cast, "strided" if strided else "") if word) or "plain"


def empty_like(x: Tensor, dtype: Dtype | None = None) -> Tensor:
    """torch.empty_like: a dense tensor of x's shape, its dimensions nested in the order of x's strides."""
    return x.machine.empty(x.shape, dtype or x.dtype, stride=dense_strides(x.shape, (x,)))


TRANSPOSED_BLOCK = 60  # BLOCK_SZ of copy_same_type_transpose_ in aten/src/ATen/native/Copy.cpp


def is_transposed(x: Tensor) -> bool:
    """Whether x is a matrix whose columns lie one after the other."""
    return len(x.shape) == 2 and x.stride[0] == ONE and x.stride[1] == x.shape[0]


def transposing_copy(machine: Machine, elements: Size, dtype: Dtype) -> None:
    """What the CPU needs to copy a transposed matrix to a contiguous one of its dtype: a block, from one's size on."""
    block = constant(TRANSPOSED_BLOCK)
    if machine.device == "cpu" and machine.at_most(block * block, elements):
        machine.empty((block, block), dtype).discard()


def dense_strides(shape: Shape, operands: Sequence[Tensor]) -> Shape:
    """Strides of the dense result of `shape` of an elementwise kernel: its dimensions nested as its operands' are.

    TensorIterator's `reorder_dimensions`, from the narrowest dimension outwards: an insertion sort in which the first
    operand whose strides differ decides; a dimension that an operand does not have, or has broadcast, compares to none.
    Dimensions of size 1 stay where they stand. (`infer_dense_strides`, of `empty_like`, is the same of one operand.)
    """
    machine = operands[0].machine
    if all(x.is_contiguous for x in operands):
        return machine.contiguous(shape)
    key = (shape, tuple((x.shape, x.stride) for x in operands))
    found = machine.layouts.get(key)
    if found is None:
        found = machine.layouts[key] = _nested(machine, shape, operands)
    return found


def _nested(machine: Machine, shape: Shape, operands: Sequence[Tensor]) -> Shape:
    dims = [i for i, n in enumerate(shape) if n is not ONE]
    widths = []
    for x in operands:
        missing = len(shape) - len(x.shape)
        has = [i - missing >= 0 and x.shape[i - missing] is not ONE for i in range(len(shape))]
        widths.append([machine.width(x.stride[i - missing]) if has[i] else 0 for i in range(len(shape))])

    def compared(near: int, far: int) -> int:
        for width in widths:
            if 0 < width[near] < width[far]:
                return -1
            if 0 < width[far] < width[near]:
                return 1
        return 0

    narrow_first = dims[::-1]
    for end in range(1, len(dims)):
        at = end
        for before in range(end - 1, -1, -1):
            which = compared(narrow_first[before], narrow_first[at])
            if which > 0:
                narrow_first[before], narrow_first[at] = narrow_first[at], narrow_first[before]
                at = before
            elif which < 0:
                break
    spots = iter(narrow_first[::-1])
    order = tuple(i if n is ONE else next(spots) for i, n in enumerate(shape))
    stride: list[Size] = [ONE] * len(order)
    for position, dim in enumerate(order):
        stride[dim] = machine.product(tuple(shape[i] for i in order[position + 1 :]))
    return tuple(stride)


def converted(x: Tensor, dtype: Dtype) -> Tensor:
    """A copy of x in another dtype, with x's layout, of which autograd knows nothing."""
    out = empty_like(x, dtype)
    x.machine.kernel("_to_copy", (x,), (out,))
    return out


class Locals:
    """The names of a frame: binding holds a tensor, rebinding drops the one before, leaving the frame drops all."""

    def __init__(self) -> None:
        object.__setattr__(self, "_names", {})

    def __setattr__(self, name: str, value: Any) -> None:
        names = self.__dict__["_names"]
        if isinstance(value, Tensor):
            value.hold()
        before = names.get(name)
        names[name] = value
        if isinstance(before, Tensor):
            before.drop()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_names"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __delattr__(self, name: str) -> None:
        value = self.__dict__["_names"].pop(name)
        if isinstance(value, Tensor):
            value.drop()

    def take(self, name: str) -> Tensor:
        """Unbind `name` and hand its tensor on, floating if nothing else holds it (`return name`)."""
        value = cast("Tensor", self.__dict__["_names"].pop(name))
        value.owners -= 1
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        names = self.__dict__["_names"]
        for value in names.values():
            if isinstance(value, Tensor):
                value.drop()
        names.clear()


F = TypeVar("F", bound="Callable[..., Any]")


@contextmanager
def arguments(args: Sequence[object]) -> Iterator[list[Any]]:
    """A call: what is passed lives until the call returns, what it returns (put into the list) outlives it."""
    tensors = [t for a in args for t in (a if isinstance(a, (tuple, list)) else (a,)) if isinstance(t, Tensor)]
    results: list[Any] = []
    for t in tensors:
        t.owners += 1
    try:
        yield results
    finally:
        out = [t for r in results for t in (r if isinstance(r, (tuple, list)) else (r,)) if isinstance(t, Tensor)]
        for t in out:
            t.owners += 1
        for t in tensors:
            t.drop()
        for t in out:
            t.owners -= 1


def op(function: F) -> F:
    """Declare an operator: its arguments live until it returns, and it discards those that were floating."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with arguments(args) as results:
            results.append(function(*args, **kwargs))
        return results[0]

    return cast("F", call)
