"""Feed-forward networks of two or three matrices; `trainer.model.feed_forward`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.parts import Norm
from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.pointwise import ACTIVATIONS, clamp, compared, expm1, sigmoid, softplus, where
from estimator.eager.tensor import Locals, arguments
from estimator.eager.views import split
from estimator.models.layers import Linear, Module, dropout
from estimator.models.norms import build_norm
from estimator.parallel.tensor import share

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class XIELU(Module):
    """Quadratic above 0, an integral of ELU below, both with a learned curvature."""

    def __init__(self, machine: Machine, name: str) -> None:
        super().__init__(machine, name)
        self.alpha_p, self.alpha_n = self.parameter(ONE), self.parameter(ONE)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.square = ops.mul(ops.mul(softplus(self.alpha_p), x), x)
        v.above = ops.add(v.square, ops.mul_number(x))
        del v.square
        v.difference = ops.sub(expm1(clamp(x, both=False)), x)
        v.bent = ops.mul(v.difference, ops.add_number(softplus(self.alpha_n)))
        del v.difference
        v.below = ops.add(v.bent, ops.mul_number(x))
        del v.bent
        return where(compared("gt", x), v.above, v.below)


def build_activation(parent: Module, name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name, a module of its own where it learns."""
    if name != "xielu":
        return ACTIVATIONS[name]
    found: XIELU = parent.child(XIELU(parent.machine, "activation"))
    return found


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up."""
    if activation != "clamped-swiglu":
        with arguments((gate, up)) as results:
            results.append(ops.mul(ACTIVATIONS[activation](gate), up))
        return results[0]
    with arguments((gate, up)) as results, Locals() as v:
        v.gate, v.up = clamp(gate, both=False), clamp(up, both=True)
        v.first = ops.add_number(v.up)
        second = ops.mul(v.gate, sigmoid(ops.mul_number(v.gate)))
        results.append(ops.mul(v.first, second))
        return results[0]


class PlainFeedForward(Module):
    """down(f(up(x)))."""

    linear = Linear

    def __init__(
        self, machine: Machine, name: str, part: MLP, d: Size, f: Size, recipe: Recipe, *, drops: bool = True
    ) -> None:
        super().__init__(machine, name)
        self.recipe, self.drops = recipe, drops
        with self.inside():
            self.activation = build_activation(self, part.activation)
            self.up = self.child(self.linear(machine, "up", d, f, bias=part.bias))
            self.down_norm = self.child(
                build_norm(machine, recipe, "down_norm", Norm("rms"), f) if part.down_norm else None
            )
            self.down = self.child(self.linear(machine, "down", f, d, bias=part.bias))

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        y = self.activation(self.up(x))
        y = self.down(y if self.down_norm is None else self.down_norm(y))
        return dropout(y, self.recipe) if self.drops else y


class GatedFeedForward(Module):
    """down(f(gate(x)) * up(x))."""

    def __init__(
        self, machine: Machine, name: str, part: MLP, d: Size, f: Size, recipe: Recipe, *, drops: bool = True
    ) -> None:
        super().__init__(machine, name)
        self.recipe, self.part, self.f, self.drops = recipe, part, f, drops
        with self.inside():
            self.activation = build_activation(self, part.activation)
            if part.fused:
                self.gate_up = self.child(Linear(machine, "gate_up", d, 2 * f, bias=part.bias))
            else:
                self.gate = self.child(Linear(machine, "gate", d, f, bias=part.bias))
                self.up = self.child(Linear(machine, "up", d, f, bias=part.bias))
            self.down_norm = self.child(
                build_norm(machine, recipe, "down_norm", Norm("rms"), f) if part.down_norm else None
            )
            self.down = self.child(Linear(machine, "down", f, d, bias=part.bias))

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        if self.part.fused:
            v.gate, v.up = split(self.gate_up(x), (self.f, self.f))
            y = ops.mul(self.activation(v.gate), v.up)
        else:
            y = ops.mul(self.activation(self.gate(x)), self.up(x))
        y = self.down(y if self.down_norm is None else self.down_norm(y))
        return dropout(y, self.recipe) if self.drops else y


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> Module:
    """The module of a declared feed-forward; under tensor parallelism with a rank's part of the columns between."""
    own = share(machine, f) if recipe.tensor_parallel else f
    ffn = (GatedFeedForward if part.gated else PlainFeedForward)(machine, "ffn", part, d, own, recipe)
    if recipe.tensor_parallel:
        for layer in (x for x in ffn.owned if isinstance(x, Linear)):
            if layer is ffn.down:
                layer.cut_by("input", f, sequence=recipe.sequence_parallel)
            else:
                wide = 2 * f if part.gated and part.fused else f
                layer.cut_by("output", wide, sequence=recipe.sequence_parallel)
    return ffn
