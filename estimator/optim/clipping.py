"""Clipping of the gradients by their norm, and how many parameters there are to clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.letters import ZERO
from estimator.eager.tensor import Locals
from estimator.optim.updates import at_parameter, in_place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Tensor


def clip_gradients(parameters: Sequence[Tensor]) -> None:
    """`trainer.optim.clip.gradient_clipping`: a norm a parameter, the norm of those stacked, the factor in place.

    All in the gradients' dtype. The scalars between norm and factor are less than the stack that is gone by then.
    """
    machine = parameters[0].machine
    with Locals() as v, machine.ledger.at("clipping", None, "gradient_clipping"):
        norms = gradient_norms(parameters)
        dtype = norms[0].dtype
        stacked = machine.empty((number_of(parameters),), dtype).hold()
        v.norm = machine.empty((), dtype)
        stacked.drop()
        v.factor = machine.empty((), dtype)
        for p in parameters:
            assert p.grad is not None
            with at_parameter(p, "mul_"):
                in_place("mul_", p.grad, v.factor, arithmetic=1)
        for p, norm in zip(parameters, norms, strict=True):
            with at_parameter(p, "gradient_clipping"):
                norm.drop()


def gradient_norms(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The norm of each parameter's gradient, in its dtype, held."""
    norms = []
    for p in parameters:
        assert p.grad is not None
        with at_parameter(p, "vector_norm"):
            norms.append(p.machine.empty((), p.grad.dtype).hold())
            p.machine.kernel("vector_norm", (p.grad,), (norms[-1],), arithmetic=2 * p.numel)
    return norms


def number_of(parameters: Sequence[Tensor]) -> Size:
    """How many parameters a model of any number of layers has."""
    stack = parameters[0].machine.stack
    return sum((stack.times(p.storage.where.block) for p in parameters), ZERO)
