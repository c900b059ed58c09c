"""Norms over the last dimension; `trainer.model.norms`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.pointwise import power
from estimator.models.layers import Module

if TYPE_CHECKING:
    from estimator.describe.parts import Norm
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor


class ScaleAndShift(Module):
    """A weight and a bias, where the norm has them."""

    def __init__(self, machine: Machine, name: str, norm: Norm, *shape: Size) -> None:
        super().__init__(machine, name)
        self.plus_one = norm.weight == "plus-one"
        self.weight = self.parameter(*shape) if norm.weight != "none" else None
        self.bias = self.parameter(*shape) if norm.bias else None


class LayerNorm(ScaleAndShift):
    """Ba et al. 2016."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        if self.weight is not None and self.plus_one:
            return ops.layer_norm(x, ops.add_number(self.weight), self.bias)
        return ops.layer_norm(x, self.weight, self.bias)


class LayerNormOfHeads(ScaleAndShift):
    """LayerNorm with weights for each head."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.x = ops.layer_norm(x, None, None)
        if self.weight is not None:
            v.x = ops.mul(ops.add_number(self.weight) if self.plus_one else self.weight, v.x)
        return v.x if self.bias is None else ops.add(v.x, self.bias)


class RMSNorm(ScaleAndShift):
    """Zhang and Sennrich 2019, in separate operators."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.scale = ops.rsqrt(ops.add_number(ops.mean_last(power(x))))
        if self.weight is None:
            return ops.mul(x, v.scale)
        if self.plus_one:
            v.weight = ops.add_number(self.weight)  # made first, and gone with the expression
            return ops.mul(v.weight, ops.mul(x, v.scale))
        return ops.mul(self.weight, ops.mul(x, v.scale))


def build_norm(machine: Machine, name: str, norm: Norm, *shape: Size) -> ScaleAndShift:
    """The module of a declared norm over the last dimension, its weight of this shape."""
    if norm.kind == "rms":
        return RMSNorm(machine, name, norm, *shape)
    return (LayerNorm if len(shape) == 1 else LayerNormOfHeads)(machine, name, norm, *shape)
