"""Adapters on the stacked matrices of experts; `trainer.model.expert_adapters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.linalg import baddbmm
from estimator.eager.tensor import FLOAT32, Locals, Tensor
from estimator.eager.views import cast, reshape, transpose
from estimator.models.layers import Linear, Module

if TYPE_CHECKING:
    from estimator.models.experts import Experts
    from estimator.models.layers import Recipe


class ExpertsLoRA(Module):
    """Experts whose matrices are W + s B A, A and B in fp32."""

    def __init__(self, base: Experts, recipe: Recipe) -> None:
        super().__init__(base.machine, base.name)
        machine, rank, before = base.machine, base.machine.shapes.letters["r"], base.machine.dtype
        where = base.where
        self.scales, self.gate_up_bias, self.E = recipe.adapter_scales, base.gate_up_bias, base.E
        self.base = self.child(base)
        shapes = {"gate_up": base.gate_up.shape, "down": base.down.shape}
        machine.dtype = FLOAT32  # peft's autocast_adapter_dtype
        with machine.ledger.at(where.module, where.block, where.op):
            wide = machine.product((rank, base.E))
            self.a = {name: self.child(Linear(machine, "a", s[2], wide, bias=False)) for name, s in shapes.items()}
            self.b = {name: self.child(Linear(machine, "b", wide, s[1], bias=False)) for name, s in shapes.items()}
        machine.dtype, base.name = before, "base"
        base.adapted = self
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.made: dict[str, Tensor] = {}

    def forward(self, v: Locals, x: Tensor, count: Tensor, expert: Tensor | None) -> Tensor:
        for name in ("down", "gate_up"):
            v.lhs, v.rhs = self._factors(name)
            setattr(v, f"{name}_lhs", v.lhs)
            setattr(v, f"{name}_rhs", v.rhs)
            self.factors[name] = v.lhs, v.rhs
            del v.lhs, v.rhs
            self._fold(name).discard()  # register_parametrization looks at its shape
        try:
            out: Tensor = self.base(x, count, expert)
        finally:  # also where a recomputation has seen enough
            for made in self.made.values():
                made.drop()
            self.made.clear()
            self.factors.clear()
        return out

    def matrix(self, name: str) -> Tensor:
        """The sum, made once in a forward."""
        if name not in self.made:
            self.made[name] = self._fold(name).hold()
        return self.made[name]

    def _fold(self, name: str) -> Tensor:
        lhs, rhs = self.factors[name]
        return baddbmm(getattr(self.base, name), lhs, rhs, scales=self.scales)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        weight, a, b = getattr(self.base, name), self.a[name].weight, self.b[name].weight
        rank = self.machine.shapes.letters["r"]
        with Locals() as v:
            v.rhs = reshape(a, (self.E, rank, a.shape[1]))
            v.lhs = reshape(b, (b.shape[0], rank, self.E))
            v.lhs = transpose(transpose(v.take("lhs"), 0, 2), 1, 2)
            v.lhs = cast(v.take("lhs"), weight.dtype)
            v.rhs = cast(v.take("rhs"), weight.dtype)
            return v.take("lhs"), v.take("rhs")
