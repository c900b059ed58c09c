"""Tensor parallelism as PyTorch's DTensor does it: `ColwiseParallel` and `RowwiseParallel` of a block's matrices.

What goes into a matrix that is cut by its output is whole on every rank, and so is what comes out of one that is cut by
its input, after an all-reduce: a functional collective, which reduces a clone in place. The docstrings have the names
of torch/distributed/tensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import attach, record
from estimator.eager.letters import ONE, Function, letter
from estimator.eager.ops import with_number
from estimator.eager.tensor import Tensor, op
from estimator.parallel.placement import TENSOR

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine

RANKS = letter("t", "accelerators that share each block's matrices (tensor parallelism)")
_SHARE = Function(lambda whole, ranks: whole // ranks, "{0}/{1}", "{0} over {1}, without remainder", lambda a, b: a / b)


def share(machine: Machine, whole: Size) -> Size:
    """A rank's part of so many heads or columns; the number 1 where it is one."""
    part = _SHARE(whole, RANKS)
    return ONE if machine.at_most(part, ONE) else part


def part_of(whole: Size, ranks: Size) -> Size:
    """One of so many equal parts."""
    return _SHARE(whole, ranks)


@op
def entering(x: Tensor) -> Tensor:
    """`DTensor.from_local(x, [Replicate()])`, a view; each rank has a part of its gradient, and backward adds them."""
    node = record("_FromTorchTensorBackward", (x,), lambda _, grad: [all_reduced(grad)])
    return attach(node, x.view(x.shape, x.stride))


@op
def leaving(x: Tensor) -> Tensor:
    """`redistribute` of a `Partial` to `Replicate`, and its local tensor; the gradient is each rank's own already."""
    node = record("RedistributeBackward", (x,), lambda _, grad: [grad])
    return attach(node, all_reduced(x))


def all_reduced(x: Tensor) -> Tensor:
    """`funcol.all_reduce`: of a contiguous clone, in place."""
    machine = x.machine
    out = machine.empty(x.shape, x.dtype)
    machine.kernel("clone", (x,), (out,))
    machine.collective("all-reduce", TENSOR, out, waits="step")
    return out


def as_partial(bias: Tensor) -> Tensor:
    """`_replicate_to_partial`: what is added on every rank is divided by their number; autograd knows nothing of it."""
    return with_number("div", bias)


def place_gradients(parameters: Sequence[Tensor]) -> None:
    """`redistribute` of gradients, one after the other, to how their parameters are laid out.

    Those of weights that work on each rank on other heads or other tokens are summed, and of a table of which a rank
    has some rows it takes these from the whole gradient. They are no more gradients than they were.
    """
    for p in parameters:
        before, where = p.grad, p.storage.where
        takes = p.whole_gradient and before is not None and before.shape != p.shape
        if before is None or not (p.partial or takes):
            continue
        with p.machine.ledger.at(where.module, where.block, "redistribute"):
            p.grad = (_own_rows(before, p) if takes else all_reduced(before)).hold()
            p.grad.storage.category = before.storage.category
            p.machine.ledger.gradients[p.grad.storage] = []
            before.drop()


def _own_rows(gradient: Tensor, p: Tensor) -> Tensor:
    """`Shard._replicate_to_shard`: a copy."""
    out = p.machine.empty(p.shape, gradient.dtype)
    p.machine.kernel("clone", (out,), (out,))
    return out
