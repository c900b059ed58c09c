"""Elementwise operators of activations, caps and clamps: each as PyTorch's derivatives.yaml has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import autocast
from estimator.eager.autograd import Context, attach, record
from estimator.eager.ops import (
    activation,
    add,
    add_number,
    cast,
    div_number,
    elementwise,
    mul,
    mul_number,
    python_number,
    with_number,
)
from estimator.eager.tensor import BOOL, Locals, Tensor, empty_like, op

if TYPE_CHECKING:
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
    """x.clamp(min, max), or with one bound alone: saves its input.

    Backward (`clamp_backward`) is where(within, grad, 0), the zero a tensor of its own.
    """

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, machine = c.saved[0], grad.machine
        c.zero = machine.empty((), grad.dtype)
        c.within = compared("ge", x)
        if both:
            c.below = compared("le", x)
            machine.kernel("logical_and_", (c.within, c.below), (c.within,))
            del c.below
        return [elementwise("where", grad, c.within)]

    node = record("ClampBackward1", (x,), backward, (x,))
    return attach(node, elementwise("clamp", x))


def compared(name: str, x: Tensor) -> Tensor:
    """A comparison with a Python number: bools."""
    with python_number(x.machine, x.dtype):
        out = empty_like(x, BOOL)
        x.machine.kernel(name, (x,), (out,))
        return out


def soft_cap(x: Tensor) -> Tensor:
    """`trainer.model.layers.soft_cap`."""
    return mul_number(tanh(div_number(x)))


def gelu_written_out(x: Tensor) -> Tensor:
    """`trainer.model.feed_forward.gelu_written_out`."""
    with Locals() as v:
        v.x = x
        v.half = mul_number(x)
        inner = add(x, mul_number(power(x)))
        return mul(v.half, add_number(tanh(mul_number(inner))))


def relu_squared(x: Tensor) -> Tensor:
    """`trainer.model.feed_forward.relu_squared`."""
    return power(relu(x))


ACTIVATIONS = {
    "silu": lambda x: activation("silu", x),
    "gelu": lambda x: activation("gelu", x),
    "gelu_tanh": lambda x: activation("gelu", x),
    "gelu_new": gelu_written_out,
    "relu": relu,
    "relu2": relu_squared,
}
