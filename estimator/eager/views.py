"""Operators that look at a storage through another window, and those that copy when no window will do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import Context, attach, record, summed
from estimator.eager.letters import ONE, ZERO, constant
from estimator.eager.tensor import INT64, Locals, Tensor, converted, is_transposed, op, transposing_copy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Dtype, Machine, Shape


def view_stride(x: Tensor, shape: Shape) -> Shape | None:
    """Strides under which x's elements have `shape`, or None if it takes a copy (ATen's `computeStride`).

    From the right, dimensions of x that are contiguous with one another are merged, and each merged one must be an
    exact product of new dimensions.
    """
    machine = x.machine
    if x.is_contiguous:
        return machine.contiguous(shape)
    old = [(n, s) for n, s in zip(x.shape, x.stride, strict=True) if n != ONE]
    stride: list[Size] = [ONE] * len(shape)
    new = len(shape) - 1
    while old:
        size, step = old.pop()
        inner = step
        while old and old[-1][1] == machine.product((step, size)):
            size = machine.product((size, old.pop()[0]))
        covered = ONE
        while new >= 0 and (covered != size or shape[new] == ONE):
            stride[new] = machine.product((inner, covered))
            covered = machine.product((covered, shape[new]))
            new -= 1
        if covered != size:
            return None
    return tuple(stride)


@op
def view(x: Tensor, shape: Sequence[Size]) -> Tensor:
    """x.view(shape); the caller knows that no copy is needed."""
    stride = view_stride(x, tuple(shape))
    assert stride is not None, f"view of {x.shape} with strides {x.stride} as {shape}"
    before = x.shape
    node = record("ViewBackward0", (x,), lambda _, grad: [reshape(grad, before)])
    return attach(node, x.view(tuple(shape), stride))


@op
def reshape(x: Tensor, shape: Sequence[Size]) -> Tensor:
    """x.reshape(shape): a view, or a contiguous clone."""
    if view_stride(x, tuple(shape)) is not None:
        return view(x, shape)
    return unsafe_view(clone(x), shape)


@op
def clone(x: Tensor) -> Tensor:
    """x.clone(memory_format=contiguous)."""
    node = record("CloneBackward0", (x,), lambda _, grad: [grad])
    out = x.machine.empty(x.shape, x.dtype)
    if is_transposed(x):
        transposing_copy(x.machine, x.numel, x.dtype)
    x.machine.kernel("clone", (x,), (out,))
    return attach(node, out)


@op
def unsafe_view(x: Tensor, shape: Sequence[Size]) -> Tensor:
    """A view of a temporary of which autograd need not know that it is one: it does not hold its base."""
    before, shape = x.shape, tuple(shape)
    node = record("UnsafeViewBackward0", (x,), lambda _, grad: [reshape(grad, before)])
    return attach(node, Tensor(x.machine, x.storage, shape, x.machine.contiguous(shape), x.dtype))


@op
def transpose(x: Tensor, a: int, b: int) -> Tensor:
    """x.transpose(a, b)."""
    shape, stride = list(x.shape), list(x.stride)
    shape[a], shape[b] = shape[b], shape[a]
    stride[a], stride[b] = stride[b], stride[a]
    node = record("TransposeBackward0", (x,), lambda _, grad: [transpose(grad, a, b)])
    return attach(node, x.view(tuple(shape), tuple(stride)))


@op
def split(x: Tensor, sizes: Sequence[Size]) -> tuple[Tensor, ...]:
    """x.split(sizes, -1) or x.chunk(n, -1): views; backward concatenates their gradients."""

    def backward(_: Context, *grads: Tensor) -> Gradients:
        return [concatenate(grads)]

    node = record("SplitBackward0", (x,), backward)
    outs = tuple(x.view((*x.shape[:-1], size), x.stride) for size in sizes)
    attach(node, *outs)
    return outs


@op
def concatenate(xs: Sequence[Tensor], width: Size | None = None) -> Tensor:
    """torch.cat(xs, -1), whose `width` may be known by a letter.

    The CPU's autocast casts all to the widest of their dtypes; CUDA's leaves them (`AT_FORALL_PROMOTE` of
    aten/src/ATen/autocast_mode.h).
    """
    machine = xs[0].machine
    if machine.autocast_dtype is None or machine.device != "cpu":
        return _concatenate(xs, width)
    widest = max((x.dtype for x in xs), key=lambda dtype: dtype.itemsize)
    return _concatenate([x if x.dtype == widest else cast(x, widest) for x in xs], width)


@op
def cast(x: Tensor, dtype: Dtype) -> Tensor:
    """x.to(dtype): x itself where it has that dtype, else a copy with x's layout; its gradient is cast back."""
    before = x.dtype
    if dtype == before:
        return x
    node = record("ToCopyBackward0", (x,), lambda _, grad: [cast(grad, before)])
    return attach(node, converted(x, dtype))


@op
def _concatenate(xs: Sequence[Tensor], width: Size | None = None) -> Tensor:
    """Backward gives views of the gradient.

    The CPU writes one of another dtype than the result's through a copy of it, one after the other (`cat_out_cpu` of
    aten/src/ATen/native/TensorShape.cpp).
    """
    sizes, machine = [x.shape[-1] for x in xs], xs[0].machine

    def backward(_: Context, grad: Tensor) -> Gradients:
        return [grad.view((*grad.shape[:-1], size), grad.stride) for size in sizes]

    node = record("CatBackward0", tuple(xs), backward)
    dtype = max((x.dtype for x in xs), key=lambda dtype: dtype.itemsize)
    shape = (*xs[0].shape[:-1], width or sum(sizes, ZERO))
    stride = channels_last(machine, shape) if all(is_channels_last(x) for x in xs) else None
    out = machine.empty(shape, dtype, stride=stride)
    for x in xs if machine.device == "cpu" else ():
        if x.dtype != dtype:
            machine.empty(x.shape, x.dtype).discard()
    machine.kernel("cat", xs, (out,))
    return attach(node, out)


def is_channels_last(x: Tensor) -> bool:
    """c10's `is_channels_last_strides_2d`: a tensor of four dimensions is taken for an image, the second its channels.

    So the gradient of keys, (B, T, h, e) with T innermost, is one, and what `cat` makes of it is laid out likewise.
    """
    if len(x.shape) != 4:
        return False
    width, least = [x.machine.width(stride) for stride in x.stride], 0
    if width[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if width[dim] < least or (dim == 0 and least == width[1]):
            return False
        least = width[dim] * x.machine.width(x.shape[dim])
    return True


def channels_last(machine: Machine, shape: Shape) -> Shape:
    """Strides of a dense tensor whose second dimension is innermost."""
    _, c, h, w = shape
    return machine.product((c, h, w)), ONE, machine.product((c, w)), c


@op
def stack_last(a: Tensor, b: Tensor) -> Tensor:
    """torch.stack((a, b), -1).flatten(-2); backward gives strided views of the gradient."""
    machine = a.machine
    shape = (*a.shape, 2 * ONE)

    def backward(_: Context, grad: Tensor) -> Gradients:
        return [grad.view(shape[:-1], grad.stride[:-1]) for _ in range(2)]

    node = record("StackBackward0", (a, b), backward)
    out = machine.empty(shape, a.dtype)
    machine.kernel("cat", (a, b), (out,))
    return view(attach(node, out), (*a.shape[:-1], 2 * a.shape[-1]))


@op
def alias(x: Tensor) -> Tensor:
    """x[:], what a slice of all of it is."""
    node = record("AliasBackward0", (x,), lambda _, grad: [grad])
    return attach(node, x.view(x.shape, x.stride))


@op
def slice_last(x: Tensor, length: Size, step: int = 1) -> Tensor:
    """x[..., start : end : step], of `length`: a view; backward is the gradient in a tensor of zeros."""
    before = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        out = grad.machine.empty(before, grad.dtype)
        grad.machine.kernel("slice_backward", (grad,), (out,))
        return [out]

    node = record("SliceBackward0", (x,), backward)
    return attach(node, x.view((*x.shape[:-1], length), (*x.stride[:-1], step * x.stride[-1])))


@op
def copy_into_last(base: Tensor, source: Tensor) -> None:
    """base[..., start : start + n].copy_(source), as wide as the source: base becomes the result of `CopySlices`.

    Backward (torch/csrc/autograd/functions/tensor.cpp) copies the gradient, and the slice out of it; where what base
    was wants a gradient, zeros take the slice's place.
    """
    shape, before = source.shape, source.dtype

    def backward(c: Context, grad: Tensor) -> Gradients:
        machine = grad.machine
        c.whole = machine.empty(base_shape, dtype)
        machine.kernel("copy_", (grad,), (c.whole,))
        c.part = machine.empty(shape, dtype)
        machine.kernel("clone", (c.part,), (c.part,))
        if c.needs[0]:
            c.zeros = machine.empty(shape, dtype)
            machine.kernel("copy_", (c.zeros,), (c.part,))
        if before != dtype:
            c.part = converted(c.part, before)
        return [c.take("whole") if c.needs[0] else None, c.take("part")]

    base_shape, dtype = base.shape, base.dtype
    node = record("CopySlices", (base, source), backward)
    base.machine.kernel("copy_", (source,), (base,))
    if node is not None and base.grad_fn is not None:
        base.grad_fn.drop()
    attach(node, base)


@op
def narrow(x: Tensor, length: Size, dim: int = 0) -> Tensor:
    """x.narrow(dim, start, length): a view; backward is the gradient in a tensor of zeros."""
    before = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        out = grad.machine.empty(before, grad.dtype)
        grad.machine.kernel("slice_backward", (grad,), (out,))
        return [out]

    node = record("SliceBackward0", (x,), backward)
    return attach(node, x.view((*x.shape[:dim], length, *x.shape[dim + 1 :]), x.stride))


@op
def select(x: Tensor, dim: int) -> Tensor:
    """x.select(dim, i): a view; backward is the gradient in a tensor of zeros."""
    before = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        out = grad.machine.empty(before, grad.dtype)
        grad.machine.kernel("select_backward", (grad,), (out,))
        return [out]

    node = record("SelectBackward0", (x,), backward)
    return attach(node, _squeeze(x, dim))


@op
def contiguous(x: Tensor) -> Tensor:
    """x.contiguous(), of which autograd knows nothing."""
    if x.is_contiguous:
        return x
    out = x.machine.empty(x.shape, x.dtype)
    x.machine.kernel("clone", (x,), (out,))
    return out


@op
def contiguous_of(x: Tensor) -> Tensor:
    """x.contiguous() of a model: x itself, or a clone."""
    return x if x.is_contiguous else clone(x)


@op
def unsqueeze(x: Tensor, dim: int) -> Tensor:
    """x.unsqueeze(dim)."""
    after = x.machine.product((x.shape[dim], x.stride[dim])) if dim < len(x.shape) else ONE
    shape, stride = (*x.shape[:dim], ONE, *x.shape[dim:]), (*x.stride[:dim], after, *x.stride[dim:])
    node = record("UnsqueezeBackward0", (x,), lambda _, grad: [_squeeze(grad, dim)])
    return attach(node, x.view(shape, stride))


def _squeeze(x: Tensor, dim: int) -> Tensor:
    return x.view((*x.shape[:dim], *x.shape[dim + 1 :]), (*x.stride[:dim], *x.stride[dim + 1 :]))


@op
def expand(x: Tensor, shape: Sequence[Size]) -> Tensor:
    """x.expand(shape): dimensions of 1 get a stride of 0; the engine sums their gradients."""
    zero = 0 * ONE
    stride = tuple(zero if n == ONE and m != ONE else s for n, m, s in zip(x.shape, shape, x.stride, strict=True))
    node = record("ExpandBackward0", (x,), lambda _, grad: [grad])
    return attach(node, x.view(tuple(shape), stride))


@op
def repeat_all(x: Tensor, dim: int, times: Size) -> Tensor:
    """x.repeat, so many times along `dim`: a copy even of one; backward is one sum (`repeat_backward`).

    The order of the dimensions of the copy, each beside its repetition, is made of tensors in CPU memory.
    """
    machine, before = x.machine, x.shape

    def backward(c: Context, grad: Tensor) -> Gradients:
        if times is ONE:
            return [reshape(grad, before)]
        apart = (*before[:dim], times, *before[dim:])
        c.apart = reshape(grad, apart)
        total = summed(c.apart, (*before[:dim], ONE, *before[dim:]))
        return [_squeeze(total, dim)]

    node = record("RepeatBackward0", (x,), backward)
    out = machine.empty((*before[:dim], machine.product((times, before[dim])), *before[dim + 1 :]), x.dtype)
    if machine.wraps_scalars:
        dims = (constant(len(before)),)
        order, number = machine.empty(dims, INT64).hold(), machine.empty((), INT64).hold()
        repetitions = machine.empty(dims, INT64).hold()
        number.drop()
        machine.empty((2 * dims[0],), INT64).discard()
        order.drop()
        repetitions.drop()
    machine.kernel("repeat", (x,), (out,))
    return attach(node, out)


@op
def repeat_heads(x: Tensor, groups: Size) -> Tensor:
    """(B, k, T, e) -> (B, k groups, T, e), as `trainer.model.decoder.repeat_heads`; `groups` is a number if 1."""
    if groups == ONE:
        return x
    b, k, t, e = x.shape
    with Locals() as v:
        v.wide = expand(unsqueeze(x, 2), (b, k, groups, t, e))
        return reshape(v.wide, (b, x.machine.product((k, groups)), t, e))
