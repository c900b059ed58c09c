"""Elementwise operators, reductions, embedding, normalization: each declared once, with all that is true of it.

A forward says, in PyTorch's order, what autograd saves (`record`), what is allocated, which kernel runs, and what its
node's backward does, in terms of other operators. Names of nodes are PyTorch's. In backward formulas the names on `c`
are C++ temporaries, which live to the end of their expression.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from estimator.eager.autograd import Context, add_wider, attach, record
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE
from estimator.eager.letters import n as threads
from estimator.eager.tensor import (
    BOOL,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    Dtype,
    Locals,
    Machine,
    Tensor,
    converted,
    dense_strides,
    empty_like,
    op,
)
from estimator.eager.views import cast, contiguous

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.autograd import Backward
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Shape

Gradients = list[Tensor | None]


# ---- how an elementwise kernel allocates


def broadcast(a: Shape, b: Shape) -> Shape:
    """The shape of an elementwise result."""
    wide, narrow = (a, b) if len(a) >= len(b) else (b, a)
    narrow = (ONE,) * (len(wide) - len(narrow)) + narrow
    return tuple(y if x == ONE else x for x, y in zip(wide, narrow, strict=True))


@op
def elementwise(name: str, *operands: Tensor) -> Tensor:
    """TensorIterator: one output of the broadcast shape, laid out in the order of its operands' strides.

    Operands of different dtypes meet in the widest floating one, or the widest; a mask is read as it is.
    """
    machine = operands[0].machine
    shape: Shape = ()
    for x in operands:
        shape = broadcast(shape, x.shape)
    dtype = max((x.dtype for x in operands), key=lambda dtype: (dtype.is_floating, dtype.itemsize))
    read = [
        x.hold() if x.dtype in (dtype, BOOL) or not machine.casts_operands else converted(x, dtype).hold()
        for x in operands
    ]
    out = machine.empty(shape, dtype, stride=dense_strides(shape, read))
    machine.kernel(name, read, (out,))
    for x in read:
        x.drop()
    return out


def wrapped_number(machine: Machine) -> Tensor | None:
    """The tensor that a Python number becomes, a double in CPU memory, held; None where that is not counted."""
    if not machine.wraps_scalars:
        return None
    number = machine.empty((), FLOAT64)
    number.is_wrapped_number = True
    return number.hold()


@contextmanager
def cast_number(machine: Machine, dtype: Dtype) -> Iterator[None]:
    """A CPU kernel reads a wrapped number through a copy in its own dtype, which lives as long as the kernel."""
    copy = machine.empty((), dtype).hold() if machine.casts_operands else None
    yield
    if copy is not None:
        copy.drop()


@contextmanager
def wrapped_again(machine: Machine) -> Iterator[None]:
    """Where Python dispatches, the number of an expression in Python has been one again, and is wrapped anew."""
    again = wrapped_number(machine) if machine.dispatches_to_python else None
    yield
    if again is not None:
        again.drop()


@contextmanager
def python_number(machine: Machine, dtype: Dtype) -> Iterator[None]:
    """Inside, a kernel works with a Python number that nothing saves."""
    number = wrapped_number(machine)
    with cast_number(machine, dtype):
        yield
    if number is not None:
        number.drop()


def with_number(name: str, x: Tensor, *more: Tensor) -> Tensor:
    """An elementwise kernel one of whose operands is a Python number."""
    with python_number(x.machine, x.dtype):
        return elementwise(name, x, *more)


@op
def in_place_with_number(name: str, x: Tensor, *more: Tensor) -> None:
    """`x.name_(..., number)`."""
    with python_number(x.machine, x.dtype):
        x.machine.kernel(name, (x, *more), (x,))


# ---- arithmetic


@op
def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [grad if c.needs[0] else None, grad if c.needs[1] else None]

    node = record("AddBackward0", (a, b), backward)
    return attach(node, elementwise("add", a, b))


def add_in_place(a: Tensor, b: Tensor) -> None:
    """a.add_(b): a becomes the result of a new node."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [grad, grad if c.needs[1] else None]

    node = record("AddBackward0", (a, b), backward)
    add_wider(a, b)
    if node is not None and a.grad_fn is not None:
        a.grad_fn.drop()
    attach(node, a)


def added(a: Tensor, b: Tensor) -> Tensor:
    """a.add_(b) in a composite operator; where `isTensorSubclassLike` says that Python dispatches, it is a + b."""
    if a.machine.dispatches_to_python:
        return add(a, b)
    add_in_place(a, b)
    return a


@op
def sub(a: Tensor, b: Tensor) -> Tensor:
    """a - b."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [grad if c.needs[0] else None, elementwise("neg", grad) if c.needs[1] else None]

    node = record("SubBackward0", (a, b), backward)
    return attach(node, elementwise("sub", a, b))


@op
def mul(a: Tensor, b: Tensor) -> Tensor:
    """a * b; saves an operand only if the other wants a gradient. The second operand's gradient comes first."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        saved = iter(c.saved)  # other before self, by their names
        y = next(saved) if c.needs[0] else None
        x = next(saved) if c.needs[1] else None
        c.grad_b = elementwise("mul", grad, x) if x is not None else None
        grad_a = elementwise("mul", grad, y) if y is not None else None
        return [grad_a, c.take("grad_b") if x is not None else None]

    save = (b if a.requires_grad else None, a if b.requires_grad else None)
    node = record("MulBackward0", (a, b), backward, save)
    return attach(node, elementwise("mul", a, b))


@op
def add_number(a: Tensor) -> Tensor:
    """A + number."""
    node = record("AddBackward0", (a,), lambda _, grad: [grad])
    with wrapped_again(a.machine):
        out = with_number("add", a)
    return attach(node, out)


@op
def mul_number(a: Tensor) -> Tensor:
    """A * number; the wrapped number is saved, out of sight of saved_tensors_hooks."""

    def backward(_: Context, grad: Tensor) -> Gradients:
        with cast_number(grad.machine, grad.dtype):
            return [elementwise("mul", grad)]

    return _with_saved_number("MulBackward0", "mul", a, backward)


def _with_saved_number(node_name: str, name: str, a: Tensor, backward: Backward) -> Tensor:
    number = wrapped_number(a.machine)
    node = record(node_name, (a,), backward, (number,))
    with wrapped_again(a.machine), cast_number(a.machine, a.dtype):
        out = elementwise(name, a)
    if number is not None:
        number.drop()
    return attach(node, out)


@op
def div_number(a: Tensor) -> Tensor:
    """A / number; backward divides too, and the wrapped number is saved as in `mul_number`."""

    def backward(_: Context, grad: Tensor) -> Gradients:
        with cast_number(grad.machine, grad.dtype):
            return [elementwise("div", grad)]

    return _with_saved_number("DivBackward0", "div", a, backward)


def scale_in_place(a: Tensor, name: str) -> None:
    """a *= number or a /= number: a becomes the result of a new node, which saves the wrapped number."""

    def backward(_: Context, grad: Tensor) -> Gradients:
        with cast_number(grad.machine, grad.dtype):
            return [elementwise(name, grad)]

    number = wrapped_number(a.machine)
    node = record(f"{name.capitalize()}Backward0", (a,), backward, (number,))
    with cast_number(a.machine, a.dtype):
        a.machine.kernel(f"{name}_", (a,), (a,))
    if number is not None:
        number.drop()
    if node is not None and a.grad_fn is not None:
        a.grad_fn.drop()
    attach(node, a)


@op
def rsqrt(x: Tensor) -> Tensor:
    """1 / sqrt(x)."""

    def backward(c: Context, grad: Tensor) -> Gradients:  # -0.5 * grad * result.pow(3)
        c.power = elementwise("pow", c.saved[0])
        c.scaled = with_number("mul", grad)
        return [elementwise("mul", c.scaled, c.power)]

    node = record("RsqrtBackward0", (x,), backward)
    out = elementwise("rsqrt", x)
    return attach(node, out, save=(out,))


@op
def activation(name: str, x: Tensor) -> Tensor:
    """F.gelu or F.silu: saves its input, one fused kernel each way."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise(f"{name}_backward", grad, c.saved[0])]

    node = record(f"{name.capitalize()}Backward0", (x,), backward, (x,))
    return attach(node, elementwise(name, x))


@op
def masked_fill(x: Tensor, mask: Tensor) -> Tensor:
    """x.masked_fill(mask, number)."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise("masked_fill", grad, c.saved[0])]

    node = record("MaskedFillBackward0", (x,), backward, (mask,))
    return attach(node, elementwise("masked_fill", x, mask))


def softmax(x: Tensor, dtype: Dtype | None = None) -> Tensor:
    """torch.softmax(x, -1, dtype): saves its result."""
    return _exponents_over_sum("softmax", x, dtype)


def log_softmax(x: Tensor, dtype: Dtype | None = None) -> Tensor:
    """torch.log_softmax(x, -1, dtype): saves its result."""
    return _exponents_over_sum("log_softmax", x, dtype)


@op
def _exponents_over_sum(name: str, x: Tensor, dtype: Dtype | None) -> Tensor:
    """Of a wider dtype: of a copy of x, save that a CUDA kernel reads float16 itself (aten/native/SoftMax.cpp)."""
    if dtype is None or (x.machine.device, x.dtype) == ("cuda", FLOAT16):
        return _over_sum(name, x, dtype or x.dtype)
    return _over_sum(name, cast(x, dtype), dtype)


@op
def _over_sum(name: str, x: Tensor, dtype: Dtype) -> Tensor:
    before = x.dtype

    def backward(c: Context, grad: Tensor) -> Gradients:
        out = empty_like(grad, before)
        grad.machine.kernel(f"_{name}_backward_data", (grad, c.saved[0]), (out,))
        return [out]

    node = record(f"{'Log' if name == 'log_softmax' else ''}SoftmaxBackward0", (x,), backward)
    out = empty_like(x, dtype)
    x.machine.kernel(f"_{name}", (x,), (out,))
    return attach(node, out, save=(out,))


@op
def dropout(x: Tensor) -> Tensor:
    """F.dropout: on the CPU noise in x's dtype, divided and multiplied with; on CUDA one kernel and a mask of bools."""
    machine = x.machine
    if machine.device == "cpu":
        with Locals() as v:
            v.noise = empty_like(x)
            in_place_with_number("div_", v.noise)
            return mul(x, v.noise)

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise("native_dropout_backward", grad, c.saved[0])]

    node = record("NativeDropoutBackward0", (x,), backward)
    out, mask = empty_like(x), machine.empty(x.shape, BOOL)
    machine.kernel("native_dropout", (x,), (out, mask))
    attach(node, out, mask, save=(mask,))
    mask.discard()
    return out


# ---- reductions


@op
def mean_last(x: Tensor) -> Tensor:
    """x.mean(-1, keepdim=True)."""
    shape = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        with python_number(grad.machine, grad.dtype):
            out = grad.machine.empty(shape, grad.dtype)
            grad.machine.kernel("div", (grad,), (out,))
            return [out]

    node = record("MeanBackward1", (x,), backward)
    return attach(node, mean(x, (*x.shape[:-1], ONE)))


def mean(x: Tensor, shape: Shape) -> Tensor:
    """at::mean to `shape`, nothing recorded: on CUDA one kernel, on the CPU a sum and a division in place.

    The CPU sums half precision as a copy in fp32, with a result in fp32 that is copied back.
    """
    machine = x.machine
    out = machine.empty(shape, x.dtype)
    if machine.device != "cpu":
        machine.kernel("sum", (x,), (out,))
        return out
    half = x.dtype.itemsize < FLOAT32.itemsize
    total = machine.empty(shape).hold() if half else out.hold()
    wide = cast(x, FLOAT32).hold() if half else x.hold()
    machine.kernel("sum", (wide,), (total,))
    wide.drop()
    with python_number(machine, total.dtype):
        machine.kernel("div_", (total,), (total,))
    total.owners -= 1
    if total is not out:
        total.discard()
    return out


# ---- tables and norms


@op
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """F.embedding: rows by index; backward is a dense gradient of the whole table."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        out = grad.machine.empty(weight.shape, grad.dtype)
        grad.machine.kernel("embedding_dense_backward", (grad, c.saved[0]), (out,))
        return [out]

    node = record("EmbeddingBackward0", (weight,), backward, (ids,))
    out = weight.machine.empty((*ids.shape, *weight.shape[1:]), weight.dtype)
    weight.machine.kernel("embedding", (ids, out), (out,))
    return attach(node, out)


@op
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """F.layer_norm over the last dimension: saves its input, and mean and 1 / std a row; works on a contiguous copy.

    CUDA's autocast runs it in fp32, and CUDA's mean and 1 / std are in fp32 whatever x is; the CPU's are in fp32 where
    the weight is (`is_mixed_type`, `toAccumulateType`). The CPU's backward sums the gradients of weight and bias in a
    scratch of two rows a thread.
    """
    wide = FLOAT32 if x.machine.autocast_dtype is not None and x.machine.device == "cuda" else x.dtype
    return _layer_norm(cast(x, wide), weight, bias)


@op
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:
        x = c.x = contiguous(c.saved[0 if bias is None else 1])
        machine = grad.machine
        made = []
        for wanted, name, like in zip(c.needs, ("dx", "dw", "db"), (x, weight, bias), strict=True):  # grad_input_mask
            if wanted and like is not None:
                setattr(c, name, machine.empty(like.shape, like.dtype))
                made.append(name)
        c.dy = contiguous(grad)
        if machine.device == "cpu" and weight is not None and any(c.needs[1:]):
            c.scratch = machine.empty((2 * threads, *weight.shape), x.dtype)
        reads = (c.dy, x) if weight is None else (c.dy, x, weight)
        machine.kernel("native_layer_norm_backward", reads, [getattr(c, name) for name in made])
        return [c.take(name) if name in made else None for name in ("dx", "dw", "db")]

    node = record("NativeLayerNormBackward0", (x, weight, bias), backward, (bias, x, weight))
    machine = x.machine
    rows = (*x.shape[:-1], ONE)
    x = contiguous(x).hold()
    out = machine.empty(x.shape, x.dtype)
    statistics = FLOAT32 if machine.device == "cuda" else x.dtype if weight is None else weight.dtype
    mean, rstd = machine.empty(rows, statistics), machine.empty(rows, statistics)
    reads = [t for t in (x, weight, bias) if t is not None]
    machine.kernel("native_layer_norm", reads, (out, mean, rstd))
    x.drop()
    attach(node, out, mean, rstd, save=(mean, rstd))
    mean.discard()
    rstd.discard()
    return out


@op
def causal_mask(ids: Tensor, length: Size, keys: Size | None = None) -> Tensor:
    """torch.ones(T, T, dtype=bool).triu(1), or of other `keys` than queries."""
    machine = ids.machine
    ones = machine.empty((length, keys or length), BOOL).hold()
    machine.kernel("fill_", (), (ones,))
    mask = elementwise("triu", ones)
    ones.drop()
    return mask


@op
def window_mask(ids: Tensor, length: Size, keys: Size, *, seen: bool, window: bool = True) -> Tensor:
    """torch.ones(T, keys, dtype=bool).tril_().triu_(1 - window), and unless it is of what is `seen`, logical_not_().

    Without a window, what is seen is causal.
    """
    machine = ids.machine
    mask = machine.empty((length, keys), BOOL)
    for name in ("fill_", "tril_", *(("triu_",) if window else ()), *(() if seen else ("logical_not_",))):
        machine.kernel(name, () if name == "fill_" else (mask,), (mask,))
    return mask


@op
def additive_mask(seen: Tensor, dtype: Dtype) -> Tensor:
    """torch.where(seen, 0, -inf): both numbers are tensors of their own."""
    machine = seen.machine
    zero, infinity = machine.empty((), dtype).hold(), machine.empty((), dtype).hold()
    mask = machine.empty(seen.shape, dtype)
    machine.kernel("where", (seen,), (mask,))
    zero.drop()
    infinity.drop()
    return mask


def parameter(machine: Machine, shape: Sequence[Size], dtype: Dtype) -> Tensor:
    """A leaf that wants a gradient, held by its module."""
    p = machine.empty(shape, dtype, category=Category.PARAMETER).hold()
    machine.ledger.parameters.append((p.storage.where, p.numel))
    p.requires_grad = True
    return p
