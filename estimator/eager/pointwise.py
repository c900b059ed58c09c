"""Elementwise operators of activations, caps and clamps: each as PyTorch's derivatives.yaml has it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from estimator.eager import autocast
from estimator.eager.autograd import Context, attach, record
from estimator.eager.ops import (
    activation,
    add,
    add_number,
    cast_number,
    div_number,
    elementwise,
    mul,
    mul_number,
    python_number,
    with_number,
)
from estimator.eager.tensor import BOOL, Locals, Tensor, arguments, empty_like, op
from estimator.eager.views import cast

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from estimator.eager.autograd import Backward
    from estimator.eager.ops import Gradients


@op
def tanh(x: Tensor) -> Tensor:
    """torch.tanh: saves its result."""
    return _of_its_result("tanh", x)


@op
def sigmoid(x: Tensor) -> Tensor:
    """torch.sigmoid: saves its result."""
    return _of_its_result("sigmoid", x)


@op
def relu(x: Tensor) -> Tensor:
    """F.relu: saves its result."""
    return _of_its_result("relu", x)


@op
def _of_its_result(name: str, x: Tensor) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise(f"{name}_backward", grad, c.saved[0])]

    node = record(f"{name.capitalize()}Backward0", (x,), backward)
    out = elementwise(name, x)
    return attach(node, out, save=(out,))


@op
def neg(x: Tensor) -> Tensor:
    """-x."""
    node = record("NegBackward0", (x,), lambda _, grad: [elementwise("neg", grad)])
    return attach(node, elementwise("neg", x))


@op
def power(x: Tensor) -> Tensor:
    """x.pow(number): saves its input. On CUDA it is among the operators that autocast runs in fp32."""
    wide = autocast.fp32(x.machine, "cuda")
    return _power(cast(x, wide) if wide is not None else x)


@op
def _power(x: Tensor) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:  # grad * (exponent * self.pow(exponent - 1))
        c.power = elementwise("pow", c.saved[0])
        c.scaled = with_number("mul", c.power)
        return [elementwise("mul", grad, c.scaled)]

    node = record("PowBackward0", (x,), backward, (x,))
    return attach(node, elementwise("pow", x))


@op
def clamp(x: Tensor, *, both: bool) -> Tensor:
    """x.clamp(min, max), or with one bound alone: saves its input."""
    node = record("ClampBackward1", (x,), clamp_backward(both=both), (x,))
    return attach(node, elementwise("clamp", x))


def clamp_backward(*, both: bool) -> Backward:
    """`clamp_backward`: where(within, grad, 0), the zero a tensor of its own."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, machine = c.saved[0], grad.machine
        c.zero = machine.empty((), grad.dtype)
        c.within = compared("ge", x)
        if both:
            c.below = compared("le", x)
            machine.kernel("logical_and_", (c.within, c.below), (c.within,))
        return [elementwise("where", c.within, grad)]

    return backward


def clamp_in_place(x: Tensor) -> None:
    """x.clamp_(min, max): saves a copy of what x was (`original_self` of VariableType), and x is the new node's."""
    original = empty_like(x).hold() if x.requires_grad and x.machine.grad_enabled else None
    node = record("ClampBackward1", (x,), clamp_backward(both=True), (original,))
    if original is not None:
        original.drop()
    x.machine.kernel("clamp_", (x,), (x,))
    if node is not None and x.grad_fn is not None:
        x.grad_fn.drop()
    attach(node, x)


@op
def maximum(x: Tensor, least: Tensor) -> Tensor:
    """torch.max(x, a number in a tensor), which wants no gradient: saves both."""
    machine = x.machine

    def read() -> AbstractContextManager[None]:
        return cast_number(machine, x.dtype) if least.dtype != x.dtype else nullcontext()

    def against(name: str, x: Tensor) -> Tensor:
        with read():
            out = empty_like(x, BOOL)
            machine.kernel(name, (x,), (out,))
            return out

    def backward(
        c: Context, grad: Tensor
    ) -> Gradients:  # where(self == other, grad / 2, grad).masked_fill_(self < other, 0)
        x = c.saved[1]
        c.half = with_number("div", grad)
        c.same = against("eq", x)
        c.out = elementwise("where", c.same, c.half, grad)
        c.less = against("lt", x)
        machine.kernel("masked_fill_", (c.less,), (c.out,))
        return [c.take("out"), None]

    node = record("MaximumBackward0", (x, least), backward, (least, x))
    with read():
        return attach(node, elementwise("maximum", x))


def compared(name: str, x: Tensor) -> Tensor:
    """A comparison with a Python number: bools."""
    with python_number(x.machine, x.dtype):
        out = empty_like(x, BOOL)
        x.machine.kernel(name, (x,), (out,))
        return out


@op
def softplus(x: Tensor) -> Tensor:
    """F.softplus: saves its input."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise("softplus_backward", grad, c.saved[0])]

    node = record("SoftplusBackward0", (x,), backward, (x,))
    return attach(node, elementwise("softplus", x))


@op
def expm1(x: Tensor) -> Tensor:
    """torch.expm1: saves its result; in fp32 under CUDA's autocast."""
    return _expm1(cast(x, autocast.fp32(x.machine, "cuda") or x.dtype))


@op
def _expm1(x: Tensor) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:  # grad * (result + 1)
        c.more = with_number("add", c.saved[0])
        return [elementwise("mul", grad, c.more)]

    node = record("Expm1Backward0", (x,), backward)
    out = elementwise("expm1", x)
    return attach(node, out, save=(out,))


@op
def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """torch.where: saves the condition; in backward the zeros are tensors of their own, the second gradient first."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        def chosen(wanted: bool) -> Tensor | None:
            if not wanted:
                return None
            with Locals() as v:
                v.zero = grad.machine.empty((), grad.dtype)
                return elementwise("where", c.saved[0], grad)

        c.grad_b = chosen(c.needs[1])
        grad_a = chosen(c.needs[0])
        return [grad_a, c.take("grad_b") if c.needs[1] else None]

    node = record("WhereBackward0", (a, b), backward, (condition,))
    return attach(node, elementwise("where", condition, a, b))


def soft_cap(x: Tensor) -> Tensor:
    """`trainer.model.layers.soft_cap`."""
    with arguments((x,)) as results:
        results.append(mul_number(tanh(div_number(x))))
    return results[0]


def gelu_written_out(x: Tensor) -> Tensor:
    """`trainer.model.feed_forward.gelu_written_out`."""
    with arguments((x,)) as results, Locals() as v:
        v.half = mul_number(x)
        inner = add(x, mul_number(power(x)))
        results.append(mul(v.half, add_number(tanh(mul_number(inner)))))
    return results[0]


def relu_squared(x: Tensor) -> Tensor:
    """`trainer.model.feed_forward.relu_squared`."""
    with arguments((x,)) as results:
        results.append(power(relu(x)))
    return results[0]


ACTIVATIONS = {
    "silu": lambda x: activation("silu", x),
    "gelu": lambda x: activation("gelu", x),
    "gelu_tanh": lambda x: activation("gelu", x),
    "gelu_new": gelu_written_out,
    "relu": relu,
    "relu2": relu_squared,
}
