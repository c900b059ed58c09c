"""Slopes of ALiBi as `_get_alibi_slopes` of BLOOM and Falcon makes them, each step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager import ops
from estimator.eager.letters import Function, smaller
from estimator.eager.tensor import FLOAT32, INT32
from estimator.eager.views import concatenate

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor


def _power_of_two(n: Any) -> Any:
    return 2 ** np.floor(np.log2(n)).astype(int)


power_of_two = Function(
    _power_of_two, "power_of_two({0})", "the greatest power of two that is at most {0}", symbol="h_2", usual=("h",)
)


def alibi_slopes(v: Locals, machine: Machine, heads: Size) -> None:
    """`v.slopes`, (h,) in fp32: powers of one number, of heads that are no power of two the others of another's."""
    most = power_of_two(heads)
    v.base = machine.empty((), FLOAT32)
    v.powers = machine.empty((most,), INT32)
    v.slopes = _powers(v.base, v.powers)
    if not machine.divides(heads, most):
        v.extra_base = machine.empty((), FLOAT32)
        v.extra_powers = machine.empty((smaller(most, heads - most),), INT32)
        v.slopes = concatenate((v.slopes, _powers(v.extra_base, v.extra_powers)), heads)


def _powers(base: Tensor, exponents: Tensor) -> Tensor:
    return ops.elementwise("pow", base, exponents)
