"""Adapters beside linear layers; `trainer.model.adapters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.adapters import check_targets, is_target
from estimator.eager import ops
from estimator.eager.letters import letter
from estimator.eager.tensor import FLOAT32
from estimator.eager.views import cast
from estimator.models.layers import Linear, Module, dropout_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.eager.tensor import Locals, Tensor
    from estimator.models.layers import Recipe

letter("r", "rank of the adapters' matrices")


class LoRA(Module):
    """x W^T + s (x A^T) B^T, A and B in fp32."""

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        super().__init__(base.machine, base.name)
        rank, where = base.machine.shapes.letters["r"], base.where
        (d_out, d_in), before = base.weight.shape, base.machine.dtype
        self.drops = recipe.adapter_dropout
        self.base = self.child(base)
        base.machine.dtype = FLOAT32  # peft's autocast_adapter_dtype
        with base.machine.ledger.at(where.module, where.block, where.op):
            self.a = self.child(Linear(base.machine, "a", d_in, rank, bias=False))
            self.b = self.child(Linear(base.machine, "b", rank, d_out, bias=False))
        base.machine.dtype, base.name = before, "base"

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.result = self.base(x)
        before = v.result.dtype
        v.x = cast(x, self.a.weight.dtype)
        v.result = ops.add(v.result, ops.mul_number(self.b(self.a(dropout_at(v.x, drops=self.drops)))))
        return cast(v.take("result"), before)


def linear_layers(module: Module) -> Iterator[tuple[Module, str, Linear]]:
    """(owner, attribute, layer) of every linear layer below a module."""
    for name, inner in list(vars(module).items()):
        if isinstance(inner, Linear) and any(inner is x for x in module.owned):
            yield module, name, inner
    for inner in module.owned:
        if isinstance(inner, Module):
            yield from linear_layers(inner)


def adapt(model: Module, recipe: Recipe) -> None:
    """Put an adapter beside every linear layer that the recipe names; all else is frozen."""
    layers = list(linear_layers(model))
    check_targets(recipe.adapter_targets, (name for _, name, _ in layers))
    for p in model.parameters():
        p.requires_grad = False
    for owner, name, base in layers:
        if is_target(recipe.adapter_targets, name):
            adapted = LoRA(base, recipe)
            setattr(owner, name, adapted)
            owner.owned = [adapted if x is base else x for x in owner.owned]
