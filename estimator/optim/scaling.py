"""`torch.amp.GradScaler`: the scale that keeps small gradients in float16 from being 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.ledger import Category
from estimator.eager.ops import mul, with_number
from estimator.eager.tensor import FLOAT32, FLOAT64, INT32, Locals, Tensor
from estimator.optim.updates import at_parameter, in_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.tensor import Machine
    from estimator.optim.updates import Optimizer


class GradScaler:
    """The scale and the count of steps since it last fell, from step to step; whether a gradient overflowed, in one."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        with machine.ledger.at("loss", None, "GradScaler"):
            self._scale = machine.empty((), FLOAT32, category=Category.BUFFER).hold()
            self._growth_tracker = machine.empty((), INT32, category=Category.BUFFER).hold()

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        return mul(loss, self._scale)

    def unscale_(self, parameters: Sequence[Tensor]) -> None:
        """All gradients divided by the scale, in place; each device gets copies of the two scalars."""
        machine = self.machine
        with machine.ledger.at("loss", None, "unscale_"), Locals() as v:
            v.double = machine.empty((), FLOAT64)
            v.reciprocal = machine.empty((), FLOAT64)
            del v.double
            v.inverse = machine.empty(())
            del v.reciprocal
            v.found_inf = machine.empty(())
            self.found_inf = machine.empty(()).hold()
            v.inverse_copy = machine.empty(())
            for p in parameters:
                assert p.grad is not None
                with at_parameter(p, "unscale_"):
                    in_place("_amp_foreach_non_finite_check_and_unscale_", p.grad, arithmetic=1)

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step; a fused one is told of an overflow, by 0 + found_inf."""
        with Locals() as v:
            if optimizer.supports_scaling:
                with self.machine.ledger.at("loss", None, "step"):
                    v.found_inf = with_number("add", self.found_inf)
            optimizer.step()

    def update(self) -> None:
        """Adapt the scale, forget whether there was an overflow."""
        with self.machine.ledger.at("loss", None, "update"):
            self.found_inf.drop()
