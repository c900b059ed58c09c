"""Cross entropies: (B, T, V) logits and (B, T) targets to a mean, each as its implementation allocates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import Context, attach, record
from estimator.eager.ops import elementwise
from estimator.eager.tensor import Tensor, op
from estimator.eager.views import view

if TYPE_CHECKING:
    from estimator.eager.ops import Gradients


@op
def torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(logits.view(-1, V), targets.view(-1)): log_softmax, then nll_loss."""
    rows = logits.machine.product(logits.shape[:-1])
    return _nll_loss(_log_softmax(view(logits, (rows, logits.shape[-1]))), view(targets, (rows,)))  # type: ignore[no-any-return]  # `op` keeps the signature of what it wraps


@op
def _log_softmax(x: Tensor) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise("_log_softmax_backward_data", grad, c.saved[0])]

    node = record("LogSoftmaxBackward0", (x,), backward)
    out = elementwise("_log_softmax", x)
    return attach(node, out, save=(out,))


@op
def _nll_loss(x: Tensor, targets: Tensor) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:
        x = c.saved[0]
        out = x.machine.empty(x.shape, x.dtype)
        x.machine.kernel("nll_loss_backward", (grad, c.saved[1]), (out,))
        return [out]

    node = record("NllLossBackward0", (x,), backward, (x, targets))
    machine = x.machine
    out, total_weight = machine.empty((), x.dtype), machine.empty((), x.dtype)
    machine.kernel("nll_loss_forward", (targets,), (out, total_weight))
    attach(node, out, save=(total_weight,))
    total_weight.discard()
    return out
