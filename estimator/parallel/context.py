"""Context parallelism: each rank has its part of every sequence, and gathers keys and values in attention.

`trainer.model.gather`: an all-gather by `torch.distributed._functional_collectives`, whose backward is a reduce-scatter
of the sum over the ranks. What comes lies by rank; a cat brings it in the order of the sequence, and with one sequence
a view does. On the CPU gloo works in buffers of its own. Shapes: (B, T/c, k, e) on a rank, (B, T, k, e) gathered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import attach, record
from estimator.eager.letters import ONE, letter
from estimator.eager.tensor import Tensor, op
from estimator.eager.views import channels_last, clone, contiguous, is_channels_last
from estimator.parallel.placement import CONTEXT
from estimator.parallel.tensor import part_of

if TYPE_CHECKING:
    from estimator.eager.autograd import Context
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Machine

RANKS = letter("c", "accelerators that share each sequence (context parallelism)")


def tokens_on(machine: Machine, whole: Size) -> Size:
    """How many of a sequence's tokens a rank has."""
    part = part_of(whole, RANKS)
    return ONE if machine.at_most(part, ONE) else part


@op
def gathered(x: Tensor, whole: Size) -> Tensor:
    """The tokens of all ranks, `whole` of them."""
    shape = (x.shape[0], whole, *x.shape[2:])
    ranks = _all_gather(x if x.is_contiguous else clone(x))
    return _of_one(ranks, shape) if shape[0] is ONE else _in_sequence(ranks, shape)


@op
def _all_gather(x: Tensor) -> Tensor:
    """By rank, (c B, T/c, k, e)."""
    machine = x.machine

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.grad = contiguous(grad)
        out = machine.empty(x_shape, grad.dtype)
        machine.collective("reduce-scatter", CONTEXT, c.grad, waits="step")
        if machine.device == "cpu":  # gloo reduces all of it in a copy
            machine.empty(shape, grad.dtype).discard()
        return [out]

    x_shape, shape = x.shape, (machine.product((RANKS, x.shape[0])), *x.shape[1:])
    node = record("all_gather_into_tensor", (x,), backward)
    out = machine.empty(shape, x.dtype)
    machine.collective("all-gather", CONTEXT, out, waits="step")
    if machine.device == "cpu":  # gloo sends from a copy, and receives into one more
        machine.empty(x_shape, x.dtype).discard()
        machine.empty(shape, x.dtype).discard()
    return attach(node, out)


@op
def _of_one(ranks: Tensor, shape: tuple[Size, ...]) -> Tensor:
    """`ranks.view(1, T, k, e)` of one sequence; its gradient can be viewed whatever its strides are."""
    machine, before = ranks.machine, ranks.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        step = grad.stride[1]
        return [grad.view(before, (machine.product((before[1], step)), *grad.stride[1:]))]

    node = record("ViewBackward0", (ranks,), backward)
    return attach(node, ranks.view(shape, machine.contiguous(shape)))


@op
def _in_sequence(ranks: Tensor, shape: tuple[Size, ...]) -> Tensor:
    """`torch.cat(ranks.chunk(c), 1)`; backward is the cat of the gradient's pieces."""
    machine, before = ranks.machine, ranks.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        piece = grad.view((shape[0], *before[1:]), grad.stride)
        stride = channels_last(machine, before) if is_channels_last(piece) else None
        piece.discard()
        out = machine.empty(before, grad.dtype, stride=stride)
        machine.kernel("cat", (grad,), (out,))
        return [out]

    node = record("SplitBackward0", (ranks,), backward)
    out = machine.empty(shape, ranks.dtype)
    machine.kernel("cat", (ranks,), (out,))
    return attach(node, out)
