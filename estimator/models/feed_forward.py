"""Feed-forward networks of two or three matrices; `trainer.model.feed_forward`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.parts import Norm
from estimator.eager import ops
from estimator.eager.pointwise import ACTIVATIONS, clamp, sigmoid
from estimator.eager.tensor import Locals, arguments
from estimator.eager.views import split
from estimator.models.layers import Linear, Module, dropout
from estimator.models.norms import build_norm

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


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

    def __init__(self, machine: Machine, name: str, part: MLP, d: Size, f: Size, recipe: Recipe) -> None:
        super().__init__(machine, name)
        self.recipe, self.activation = recipe, ACTIVATIONS[part.activation]
        with self.inside():
            self.up = self.child(Linear(machine, "up", d, f, bias=part.bias))
            self.down = self.child(Linear(machine, "down", f, d, bias=part.bias))
            self.down_norm = self.child(build_norm(machine, "down_norm", Norm("rms"), f) if part.down_norm else None)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        y = self.activation(self.up(x))
        return dropout(self.down(y if self.down_norm is None else self.down_norm(y)), self.recipe)


class GatedFeedForward(Module):
    """down(f(gate(x)) * up(x))."""

    def __init__(
        self, machine: Machine, name: str, part: MLP, d: Size, f: Size, recipe: Recipe, *, drops: bool = True
    ) -> None:
        super().__init__(machine, name)
        self.recipe, self.part, self.f, self.drops = recipe, part, f, drops
        with self.inside():
            if part.fused:
                self.gate_up = self.child(Linear(machine, "gate_up", d, 2 * f, bias=part.bias))
            else:
                self.gate = self.child(Linear(machine, "gate", d, f, bias=part.bias))
                self.up = self.child(Linear(machine, "up", d, f, bias=part.bias))
            self.down = self.child(Linear(machine, "down", f, d, bias=part.bias))
            self.down_norm = self.child(build_norm(machine, "down_norm", Norm("rms"), f) if part.down_norm else None)

    def hidden(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., f)."""
        activation = ACTIVATIONS[self.part.activation]
        if not self.part.fused:
            return ops.mul(activation(self.gate(x)), self.up(x))
        with Locals() as v:
            v.gate, v.up = split(self.gate_up(x), (self.f, self.f))
            return ops.mul(activation(v.gate), v.up)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        y = self.hidden(x)
        y = self.down(y if self.down_norm is None else self.down_norm(y))
        return dropout(y, self.recipe) if self.drops else y


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> Module:
    """The module of a declared feed-forward."""
    return (GatedFeedForward if part.gated else PlainFeedForward)(machine, "ffn", part, d, f, recipe)
