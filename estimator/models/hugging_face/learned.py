"""Learned positions as older classes look them up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.tensor import FLOAT32, INT64
from estimator.eager.views import cast
from estimator.models.positions import Positions

if TYPE_CHECKING:
    from estimator.eager.tensor import Locals, Machine, Shape, Tensor
    from estimator.models.positions import Sinusoids


def embedded_positions(table: Positions | Sinusoids | None, ids: Tensor) -> Tensor:
    """Rows of a learned table by position."""
    assert isinstance(table, Positions)
    with table.inside():
        return ops.embedding(ids, table.weight)


def positions_of_ones(v: Locals, machine: Machine, shape: Shape) -> None:
    """`v.seen`, torch.ones(B, T), and `v.positions`, (cumsum(ones) ones - 1).long(), as OPT counts them."""
    v.seen = machine.empty(shape, FLOAT32)
    v.positions = machine.empty(shape, FLOAT32)
    machine.kernel("cumsum", (v.seen,), (v.positions,))
    v.positions = cast(ops.with_number("sub", ops.elementwise("mul", v.positions, v.seen)), INT64)
