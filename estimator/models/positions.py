"""Where a token stands; `trainer.model.positions`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE
from estimator.eager.tensor import Locals, Tensor, arguments
from estimator.eager.views import concatenate, narrow, slice_last, split, stack_last
from estimator.models.layers import Module

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine


class Positions(Module):
    """Learned positions."""

    def __init__(self, machine: Machine, name: str, rows: Size, width: Size) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(rows, width)

    def forward(self, v: Locals, length: Size) -> Tensor:
        return narrow(self.weight, length)


class Sinusoids(Module):
    """Fixed positions: a buffer."""

    def __init__(self, machine: Machine, name: str, rows: Size, width: Size) -> None:
        super().__init__(machine, name)
        with self.inside():
            self.table = machine.empty((rows, width), machine.dtype, category=Category.BUFFER).hold()

    def forward(self, v: Locals, length: Size) -> Tensor:
        return self.table.view((length, self.table.shape[1]), self.table.stride)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """`rotate` and `rotate_neighbours`."""
    with arguments((x, cos, sin)) as results, Locals() as v:
        half = x.shape[-1] / 2
        if pairs == "halves":
            v.a, v.b = split(x, (half, half))
        else:
            v.a, v.b = slice_last(x, half, step=2), slice_last(x, half, step=2)
        v.first = ops.sub(ops.mul(v.a, cos), ops.mul(v.b, sin))
        v.second = ops.add(ops.mul(v.a, sin), ops.mul(v.b, cos))
        both = v.take("first"), v.take("second")
        results.append(concatenate(both) if pairs == "halves" else stack_last(*both))
        return results[0]


def rotate_part(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """The first part of each head, which may be all of it."""
    width = 2 * cos.shape[-1]
    if width is x.shape[-1]:
        return rotate(x, cos, sin, pairs)
    with arguments((x, cos, sin)) as results, Locals() as v:
        v.turned = rotate(slice_last(x, width), cos, sin, pairs)
        v.rest = slice_last(x, x.shape[-1] - width)
        results.append(concatenate((v.take("turned"), v.take("rest"))))
        return results[0]


def alibi_bias(slopes: Tensor, length: Size, dtype: Dtype) -> Tensor:
    """What is added to the scores of each key, (h, 1, length)."""
    machine = slopes.machine
    with Locals() as v:
        v.position = machine.empty((length,), slopes.dtype)
        bias = machine.empty((slopes.shape[0], ONE, length), slopes.dtype)
        machine.kernel("mul", (slopes, v.position), (bias,))
        return ops.cast(bias, dtype)
