"""An update in backward: each parameter as soon as its gradient is there; `trainer.optim.in_backward`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from estimator.optim.updates import Optimizer, zero_grad

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.tensor import Tensor


class InBackward(Optimizer):
    """An optimizer for each parameter, run by its gradient's hook (`register_post_accumulate_grad_hook`)."""

    def __init__(self, kind: type[Optimizer], parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        for p, optimizer in zip(parameters, kind.of_each(parameters), strict=True):
            p.after_accumulation = partial(_update, optimizer)

    def step(self) -> None:
        """Nothing is left to do when backward is over."""


def _update(optimizer: Optimizer, p: Tensor) -> None:
    with p.machine.ledger.updating():
        optimizer.step()
    zero_grad([p])
