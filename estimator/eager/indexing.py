"""Operators that pick, sort and add rows by index: what a mixture of experts routes tokens with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autocast import fp32
from estimator.eager.autograd import Context, attach, record, summed
from estimator.eager.ledger import Gemm
from estimator.eager.letters import ONE, ceiling, constant
from estimator.eager.letters import n as threads
from estimator.eager.ops import elementwise, wrapped_again
from estimator.eager.pointwise import clamp, compared
from estimator.eager.tensor import BFLOAT16, FLOAT32, INT32, INT64, Locals, Tensor, empty_like, op
from estimator.eager.views import cast, contiguous, expand

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Shape

ROW_ALIGNMENT = 8  # elements of bfloat16: `trainer.model.grouped.ALIGNMENT`
EXPANDED_INDEX_WIDTH = 16  # threshold of can_use_expanded_index_path


@op
def index_select(x: Tensor, index: Tensor) -> Tensor:
    """x.index_select(0, index): backward adds the rows' gradients into zeros of x's shape."""
    before = x.shape

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.out = grad.machine.empty(before, grad.dtype)
        _index_add(c.out, grad, c.saved[0])
        return [c.take("out")]

    node = record("IndexSelectBackward0", (x,), backward, (index,))
    out = x.machine.empty((*index.shape, *x.shape[1:]), x.dtype)
    x.machine.kernel("index_select", (index, out), (out,))
    return attach(node, out)


@op
def pick(x: Tensor, dim: int) -> Tensor:
    """x[..., [i], ...], one of a dimension: a copy; the index is a tensor, which is saved."""
    machine, before = x.machine, x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        out = machine.empty(before, grad.dtype)
        machine.kernel("index_put_", (grad,), (out,))
        return [out]

    index = machine.empty((ONE,), INT64).hold()
    node = record("IndexBackward0", (x,), backward, (index,))
    out = machine.empty((*before[:dim], ONE, *before[dim + 1 :]), x.dtype)
    machine.kernel("index", (index, out), (out,))
    index.drop()
    return attach(node, out)


@op
def gather_last(x: Tensor, index: Tensor) -> Tensor:
    """x.gather(-1, index): saves x and the index; backward adds into zeros of x's shape.

    The CPU moves half precision through a buffer in fp32 as large as the result (`create_acc_buffer` in
    aten/src/ATen/native/cpu/ScatterGatherKernel.cpp).
    """

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, index = c.saved
        out = grad.machine.empty(x.shape, grad.dtype)
        moved_in_fp32(out)
        grad.machine.kernel("scatter_add_", (grad, index), (out,))
        return [out]

    node = record("GatherBackward0", (x,), backward, (x, index))
    out = x.machine.empty(index.shape, x.dtype)
    moved_in_fp32(out)
    x.machine.kernel("gather", (index, out), (out,))
    return attach(node, out)


def moved_in_fp32(out: Tensor) -> None:
    """The buffer of a CPU kernel that gathers or scatters half precision into `out`."""
    if out.machine.device == "cpu" and out.dtype.itemsize < FLOAT32.itemsize:
        out.machine.empty(out.shape, FLOAT32).discard()


@op
def scatter_last(x: Tensor, index: Tensor) -> Tensor:
    """x.scatter(-1, index, number): saves the index; backward puts zeros there."""

    def backward(_: Context, grad: Tensor) -> Gradients:
        return [elementwise("scatter", grad)]

    node = record("ScatterBackward1", (x,), backward, (index,))
    return attach(node, elementwise("scatter", x))


@op
def maximum_last(x: Tensor) -> Tensor:
    """x.amax(-1, keepdim=True), without a gradient."""
    out = x.machine.empty((*x.shape[:-1], ONE), x.dtype)
    x.machine.kernel("amax", (x,), (out,))
    return out


@op
def add_rows(rows: Tensor, index: Tensor, shape: Shape) -> Tensor:
    """rows.new_zeros(shape).index_add_(0, index, rows): saves index and rows."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        index, rows = c.saved
        out = grad.machine.empty(rows.shape, grad.dtype)
        grad.machine.kernel("index_select", (index, out), (out,))
        return [out]

    with Locals() as v:
        v.out = rows.machine.empty(shape, rows.dtype)
        node = record("IndexAddBackward0", (rows,), backward, (index, rows))
        _index_add(v.out, rows, index)
        return attach(node, v.take("out"))


def _index_add(out: Tensor, rows: Tensor, index: Tensor) -> None:
    """out.index_add_(0, index, rows); the CPU adds rows of half precision up in fp32.

    It takes one row a thread (`cpu_scatter_reduce_expanded_index` in aten/src/ATen/native/cpu/ScatterGatherKernel.cpp)
    where rows are wide enough (`can_use_expanded_index_path`), else a copy of all of `out` (`create_acc_buffer`).
    """
    machine = out.machine
    if machine.device == "cpu" and out.dtype.itemsize < FLOAT32.itemsize and len(out.shape) > 1:
        by_row = machine.at_most(constant(EXPANDED_INDEX_WIDTH), out.shape[1])
        machine.empty((threads if by_row else out.shape[0], *out.shape[1:]), FLOAT32).discard()
    machine.kernel("index_add_", (index, rows), (out,))


@op
def top_k(x: Tensor, count: Size) -> Tensor:
    """x.topk(count, -1).indices, of which autograd knows nothing; the values are gone when it returns."""
    machine, shape = x.machine, (*x.shape[:-1], count)
    values, indices = machine.empty(shape, x.dtype).hold(), machine.empty(shape, INT64)
    machine.kernel("topk", (x,), (values, indices))
    values.drop()
    return indices


@op
def top_k_values(x: Tensor, count: Size) -> Tensor:
    """x.topk(count, -1).values; the indices are gone when it returns."""
    machine, shape = x.machine, (*x.shape[:-1], count)
    values, indices = machine.empty(shape, x.dtype), machine.empty(shape, INT64).hold()
    machine.kernel("topk", (x,), (values, indices))
    indices.drop()
    return values


@op
def bincount(x: Tensor, bins: Size) -> Tensor:
    """torch.bincount(x, minlength=bins): min and max are tensors of their own."""
    machine = x.machine
    for _ in range(2):
        machine.empty((), INT64).discard()
    out = machine.empty((bins,), INT64)
    machine.kernel("bincount", (x,), (out,))
    return out


@op
def argsort(x: Tensor) -> Tensor:
    """x.argsort(stable=True): the sorted values are gone when it returns; the CPU has a scratch of their size."""
    values, order = empty_like(x).hold(), empty_like(x)
    if x.machine.device == "cpu":
        empty_like(x).discard()
    x.machine.kernel("sort", (x,), (values, order))
    values.drop()
    return order


@op
def whole_number_divided(x: Tensor) -> Tensor:
    """x // number, of int64: the number is a tensor of eight bytes on the CPU."""
    machine = x.machine
    number = machine.empty((), INT64).hold() if machine.wraps_scalars else None
    with wrapped_again(machine):
        out = elementwise("floor_divide", x)
    if number is not None:
        number.drop()
    return out


@op
def sum_last(x: Tensor) -> Tensor:
    """x.sum(-1, keepdim=True), under CUDA's autocast in fp32: backward expands."""
    shape = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        zero = 0 * ONE
        sizes = zip(grad.shape, shape, grad.stride, strict=True)
        stride = tuple(zero if n is ONE and m is not ONE else s for n, m, s in sizes)
        return [grad.view(shape, stride)]

    node = record("SumBackward1", (x,), backward)
    return attach(node, summed(x, (*x.shape[:-1], ONE), fp32(x.machine, "cuda")))


@op
def sum_all(x: Tensor) -> Tensor:
    """x.sum(): backward expands."""
    shape = x.shape
    node = record("SumBackward0", (x,), lambda _, grad: [grad.view(shape, (0 * ONE,) * len(shape))])
    return attach(node, summed(x, ()))


@op
def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x as it is; in backward the loss gets a gradient of 1 (`trainer.model.router._WithLoss`)."""
    node = record("_WithLossBackward", (x, loss), lambda _, grad: [grad, grad.machine.empty((), FLOAT32)])
    return attach(node, x.view(x.shape, x.stride))


@op
def div(a: Tensor, b: Tensor) -> Tensor:
    """a / b."""
    node = record("DivBackward0", (a, b), div_backward, (a if b.requires_grad else None, b))
    return attach(node, elementwise("div", a, b))


def div_backward(c: Context, grad: Tensor) -> Gradients:
    """Of a / b: the second operand's gradient, -grad * ((a / b) / b), comes first."""
    saved = iter(c.saved)
    a = next(saved) if c.needs[1] else None
    b = next(saved)
    c.grad_b = None
    if a is not None:
        c.quotient = elementwise("div", a, b)
        c.again = elementwise("div", c.quotient, b)
        c.negative = elementwise("neg", grad)
        c.grad_b = elementwise("mul", c.negative, c.again)
        del c.quotient, c.again, c.negative
    grad_a = elementwise("div", grad, b) if c.needs[0] else None
    return [grad_a, c.take("grad_b") if a is not None else None]


@op
def row_norms(x: Tensor) -> Tensor:
    """x.norm(dim=1, keepdim=True): saves its input and its result; backward is grad * (x / norm), 0 where norm is."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, norms = c.saved
        c.unit = elementwise("div", x, norms)
        c.none = compared("eq", norms)
        grad.machine.kernel("masked_fill_", (c.none,), (c.unit,))
        return [elementwise("mul", grad, c.unit)]

    node = record("LinalgVectorNormBackward0", (x,), backward, (x,))
    out = x.machine.empty((x.shape[0], ONE), x.dtype)
    x.machine.kernel("linalg_vector_norm", (x,), (out,), arithmetic=2 * x.numel)
    return attach(node, out, save=(out,))


def normalized_rows(x: Tensor) -> Tensor:
    """F.normalize: x / x.norm(dim=1, keepdim=True).clamp_min(eps).expand_as(x)."""
    with Locals() as v:
        v.norms = row_norms(x)
        v.norms = clamp(v.norms, both=False)
        v.norms = expand(v.norms, x.shape)
        return div(x, v.norms)


@op
def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """`trainer.model.grouped.grouped_product`: (S, d) rows by groups, (E, f, d) -> (S, f); both factors are saved.

    One product a group, of as many rows as it has: together as many FLOPs whatever the counts are. CUDA's kernel for
    it, in bfloat16 and for rows of a multiple of 16 bytes (`has_kernel` there), is told where each group ends, and
    saves that too.
    """
    machine = x.machine
    dtype = machine.autocast_dtype
    with Locals() as v:
        v.x = x if dtype is None else cast(x, dtype)
        v.weight = weight if dtype is None else cast(weight, dtype)
        aligned = all(machine.divides(constant(ROW_ALIGNMENT), n) for n in weight.shape[1:])
        if machine.device == "cuda" and v.x.dtype == v.weight.dtype == BFLOAT16 and aligned:
            v.ends = machine.empty(counts.shape, INT32)
            machine.kernel("cumsum", (counts,), (v.ends,))
            return _grouped_product(v.x, v.weight, counts, (v.x, v.weight, v.ends))
        return _grouped_product(v.x, v.weight, counts, (v.x, v.weight))


@op
def _grouped_product(x: Tensor, weight: Tensor, counts: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
    machine = x.machine
    (groups, wide, narrow), rows = weight.shape, x.shape[0]

    def product(reads: tuple[Tensor, ...], out: Tensor, m: Size, n: Size, k: Size, along: str = "m") -> None:
        flops = 2 * machine.product((rows, wide, narrow))
        machine.kernel("mm", reads, (out,), gemm=Gemm(groups, m, n, k, along), flops=flops)

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, weight, *_ = c.saved
        c.grad = contiguous(grad)
        c.grad_x, c.grad_weight = empty_like(x), empty_like(weight)
        product((c.grad, weight), c.grad_x, ceiling(rows, groups), narrow, wide)
        product((c.grad, x), c.grad_weight, wide, narrow, ceiling(rows, groups), "k")
        return [c.take("grad_x"), c.take("grad_weight")]

    node = record("_GroupedProductBackward", (x, weight), backward, saved)
    out = machine.empty((rows, wide), x.dtype)
    product((x, weight, counts), out, ceiling(rows, groups), wide, narrow)
    return attach(node, out)
