"""Operators that `grouped_mm_experts_forward` of transformers (integrations/moe.py) and its routers are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autocast import fp32
from estimator.eager.autograd import Context, attach, record, summed
from estimator.eager.indexing import ROW_ALIGNMENT, div_backward, moved_in_fp32
from estimator.eager.ledger import Gemm
from estimator.eager.letters import ONE, ZERO, ceiling, constant
from estimator.eager.letters import n as threads
from estimator.eager.ops import elementwise
from estimator.eager.tensor import BFLOAT16, BOOL, INT32, INT64, Locals, empty_like, op
from estimator.eager.views import cast

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Shape, Tensor


def top_k_with_values(x: Tensor, count: Size) -> tuple[Tensor, Tensor]:
    """x.topk(count, -1): values and indices."""
    return _chosen("topk", x, count)


def greatest_last(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.max(-1, keepdim=True): values and indices."""
    return _chosen("max", x, ONE)


@op
def _chosen(name: str, x: Tensor, count: Size) -> tuple[Tensor, Tensor]:
    """Backward scatters into zeros of x's shape."""
    machine, before, shape = x.machine, x.shape, (*x.shape[:-1], count)

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [scattered(before, grad, c.saved[0])]

    node = record(f"{name.capitalize()}Backward0", (x,), backward)
    values, indices = machine.empty(shape, x.dtype), machine.empty(shape, INT64)
    machine.kernel(name, (x,), (values, indices))
    if node is not None:
        node.save((indices.alias(),))
    attach(node, values)
    return values, indices


def scattered(shape: Shape, source: Tensor, index: Tensor) -> Tensor:
    """zeros(shape).scatter_(-1, index, source)."""
    machine = source.machine
    out = machine.empty(shape, source.dtype)
    moved_in_fp32(out)
    machine.kernel("scatter_", (source, index), (out,))
    return out


@op
def put_number(x: Tensor, index: Tensor) -> None:
    """x.scatter_(-1, index, number), of what wants no gradient."""
    moved_in_fp32(x)
    x.machine.kernel("scatter_", (index,), (x,))


@op
def opposite(x: Tensor) -> Tensor:
    """~x.bool(), of what wants no gradient."""
    with Locals() as v:
        v.bools = empty_like(x, BOOL)
        x.machine.kernel("_to_copy", (x,), (v.bools,))
        return elementwise("bitwise_not", v.bools)


@op
def index_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index]: saves the index; backward adds the rows' gradients into zeros of x's shape."""
    before = x.shape

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.out = grad.machine.empty(before, grad.dtype)
        grad.machine.kernel("_index_put_impl_", (grad, c.saved[0]), (c.out,))
        return [c.take("out")]

    node = record("IndexBackward0", (x,), backward, (index,))
    out = x.machine.empty((*index.shape, *x.shape[1:]), x.dtype)
    x.machine.kernel("index", (index, out), (out,))
    return attach(node, out)


@op
def sort(x: Tensor) -> tuple[Tensor, Tensor]:
    """x.sort() of integers: values and order; the CPU has a scratch of their size."""
    values, order = empty_like(x), empty_like(x, INT64)
    if x.machine.device == "cpu":
        empty_like(x).discard()
    x.machine.kernel("sort", (x,), (values, order))
    return values, order


@op
def histogram(x: Tensor, bins: Size) -> Tensor:
    """torch.histc(x, bins): the CPU has the bins' edges, and counts of each thread's own."""
    machine = x.machine
    out = machine.empty((bins,), x.dtype)
    if machine.device == "cpu":
        edges = machine.empty((bins + 1,), x.dtype).hold()
        machine.empty((threads, bins), x.dtype).discard()
        edges.drop()
    machine.kernel("histc", (x,), (out,))
    return out


@op
def running_sum(x: Tensor) -> Tensor:
    """torch.cumsum(x, 0, dtype=torch.int32), of a copy in that dtype."""
    out = x.machine.empty(x.shape, INT32)
    if x.dtype != INT32:
        x.machine.empty(x.shape, INT32).discard()
    x.machine.kernel("cumsum", (x,), (out,))
    return out


def inverse(order: Tensor) -> Tensor:
    """inv = empty_like(order); inv[order] = arange."""
    machine = order.machine
    with Locals() as v:
        v.inverse = empty_like(order)
        places = machine.empty(order.shape, INT64).hold()
        machine.kernel("arange", (), (places,))
        machine.kernel("index_put_", (order, places), (v.inverse,))
        places.drop()
        return v.take("inverse")


@op
def sum_over(x: Tensor, dim: int) -> Tensor:
    """x.sum(dim), under CUDA's autocast in fp32: backward expands."""
    shape = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        return [grad.view(shape, (*grad.stride[:dim], ZERO, *grad.stride[dim:]))]

    node = record("SumBackward1", (x,), backward)
    kept = summed(x, (*shape[:dim], ONE, *shape[dim + 1 :]), fp32(x.machine, "cuda")).hold()
    out = kept.alias()
    out.shape = (*shape[:dim], *shape[dim + 1 :])
    out.stride = (*kept.stride[:dim], *kept.stride[dim + 1 :])
    kept.drop()
    return attach(node, out)


@op
def divide_in_place(a: Tensor, b: Tensor) -> None:
    """a.div_(b): saves b and, where b wants a gradient, a copy of what a was; a becomes the result of a new node."""
    original = empty_like(a).hold() if b.requires_grad and a.machine.grad_enabled else None
    node = record("DivBackward0", (a, b), div_backward, (original, b))
    if original is not None:
        original.drop()
    a.machine.kernel("div_", (a, b), (a,))
    if node is not None and a.grad_fn is not None:
        a.grad_fn.drop()
    attach(node, a)


def aligned_rows(x: Tensor, wide: Size) -> Size:
    """Elements from row to row of a grouped product's result: a multiple of 16 bytes.

    `create_grouped_gemm_output_tensor` of aten/src/ATen/native/GroupedMMUtils.h.
    """
    unit = constant(ROW_ALIGNMENT * BFLOAT16.itemsize // x.dtype.itemsize)
    return wide if x.machine.divides(unit, wide) else x.machine.product((unit, ceiling(wide, unit)))


@op
def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`torch.nn.functional.grouped_mm(x.to(weight.dtype), weight, offs=ends)`: (S, d), (E, d, f) -> (S, f).

    Autocast leaves it alone. Saves both factors and the groups' ends; the second factor's gradient, in its layout,
    comes first.
    """
    return _grouped_mm(cast(x, weight.dtype), weight, ends)


@op
def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    machine = x.machine
    (groups, narrow, wide), rows = weight.shape, x.shape[0]
    flops = 2 * machine.product((rows, wide, narrow))
    size = ceiling(rows, groups)

    def like_rows(shape: Shape) -> Tensor:
        row = aligned_rows(x, shape[1])
        if row is shape[1]:
            return machine.empty(shape, x.dtype)
        whole = machine.empty((shape[0], row), x.dtype).hold()
        out = whole.alias()
        out.shape = shape
        whole.drop()
        return out

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, weight, ends = c.saved
        if c.needs[1]:
            c.grad_weight = machine.empty(weight.shape, weight.dtype, stride=weight.stride)
            gemm = Gemm(groups, narrow, wide, size, "k")
            machine.kernel("mm", (x, grad, ends), (c.grad_weight,), gemm=gemm, flops=flops)
        grad_x = None
        if c.needs[0]:
            grad_x = like_rows(x.shape)
            gemm = Gemm(groups, size, narrow, wide, "m")
            machine.kernel("mm", (grad, weight, ends), (grad_x,), gemm=gemm, flops=flops)
        return [grad_x, c.take("grad_weight") if c.needs[1] else None]

    node = record("GroupedMmBackward0", (x, weight), backward, (x, weight, ends))
    out = like_rows((rows, wide))
    machine.kernel("mm", (x, weight, ends), (out,), gemm=Gemm(groups, size, wide, narrow, "m"), flops=flops)
    return attach(node, out)
