"""A vocabulary that is shared out, as PyTorch's DTensor does it: the embedding's rows, the head's, and the loss.

`RowwiseParallel` of the embedding masks the ids that other ranks have (`_MaskPartial`), and the sum over the ranks has
every row; `ColwiseParallel` of the head leaves each rank its part of the logits, of which `loss_parallel` takes the
cross entropy. The docstrings have the names of torch/distributed/tensor. DTensor makes the gradient of the embedding
whole on every rank, and only then takes a rank's own rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import autocast
from estimator.eager.autograd import Context, attach, record
from estimator.eager.letters import ONE
from estimator.eager.ops import elementwise, with_number
from estimator.eager.tensor import BOOL, FLOAT32, INT64, Locals, Tensor, converted, op
from estimator.eager.views import cast, view
from estimator.parallel.tensor import all_reduced

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Dtype, Machine, Shape


@op
def masked_embedding(ids: Tensor, weight: Tensor, vocabulary: Size) -> Tensor:
    """F.embedding of a rank's rows of a table of `vocabulary`: a part of a sum, zero where the id is another rank's."""
    whole = (vocabulary, weight.shape[1])

    def backward(c: Context, grad: Tensor) -> Gradients:
        out = grad.machine.empty(whole, grad.dtype)
        grad.machine.kernel("embedding_dense_backward", (grad, c.saved[0]), (out,))
        return [out]

    node = record("EmbeddingBackward0", (weight,), backward, (ids,))
    if node is not None:
        node.shapes = [whole]
    with Locals() as v:
        _partition(v, ids)
        out = weight.machine.empty((*ids.shape, weight.shape[1]), weight.dtype)
        weight.machine.kernel("embedding", (v.own, out), (out,))
        del v.own
        _apply_mask(out, v.mask)
        return attach(node, out)


@op
def parallel_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(logits.view(-1, V), targets.view(-1)) under `loss_parallel`, and its local tensor.

    What autocast widens is as in `estimator.eager.losses`: on CUDA not the log_softmax, but the nll_loss.
    """
    machine, rows = logits.machine, logits.machine.product(logits.shape[:-1])
    flat = view(logits, (rows, logits.shape[-1]))
    if autocast.fp32(machine, "cpu"):
        flat = cast(flat, FLOAT32)
    x, wide = _log_softmax(flat), autocast.fp32(machine, "cuda")
    return _nll_loss(x if wide is None else cast(x, wide), view(targets, (rows,)))


@op
def parallel_cross_entropy_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of logits.float()."""
    return parallel_cross_entropy(cast(logits, FLOAT32), targets)


def _partition(v: Locals, ids: Tensor) -> None:
    """`_MaskPartial._partition_value`: which ids are another rank's, and all counted from a rank's first, as names."""
    machine, shape = ids.machine, ids.shape
    with Locals() as inner:
        inner.below = _compared(machine, shape)
        inner.above = _compared(machine, shape)
        v.mask = machine.empty(shape, BOOL)
        machine.kernel("bitwise_or", (inner.below, inner.above), (v.mask,))
    with Locals() as inner:
        inner.copy = machine.empty(shape, INT64)
        machine.kernel("clone", (ids,), (inner.copy,))
        v.own = _with_integer("sub", inner.copy)
    _apply_mask(v.own, v.mask)


def _compared(machine: Machine, shape: Shape) -> Tensor:
    """A tensor of integers compared with a number."""
    number = machine.empty((), INT64).hold()
    out = machine.empty(shape, BOOL)
    machine.kernel("compare", (out,), (out,))
    number.drop()
    return out


def _with_integer(name: str, x: Tensor) -> Tensor:
    number = x.machine.empty((), INT64).hold()
    out = x.machine.empty(x.shape, x.dtype)
    x.machine.kernel(name, (x,), (out,))
    number.drop()
    return out


def _apply_mask(x: Tensor, mask: Tensor) -> None:
    """`x[mask] = 0`: the number becomes a tensor of x's dtype."""
    x.machine.empty((), x.dtype).discard()
    x.machine.kernel("masked_fill_", (x, mask), (x,))


def _where_not_ignored(shape: Shape, x: Tensor, dtype: Dtype) -> Tensor:
    """`torch.where(target != ignore_index, x, 0)`."""
    machine = x.machine
    with Locals() as v:
        v.kept = _compared(machine, shape)
        v.zero = machine.empty((), dtype)
        out = machine.empty(x.shape, dtype)
        machine.kernel("where", (v.kept, x), (out,))
        del v.zero
        return out


@op
def _log_softmax(x: Tensor) -> Tensor:
    """`_log_softmax_handler`: its result is in x's dtype, and it computes in fp32 at least; backward does nothing."""
    machine, (rows, _) = x.machine, x.shape
    one = (rows, ONE)
    node = record("LogSoftmaxBackward0", (x,), lambda _, grad: [grad])
    with Locals() as v:
        v.x = converted(x, FLOAT32) if x.dtype.itemsize < FLOAT32.itemsize else x
        v.max = machine.empty(one, v.x.dtype)
        machine.kernel("amax", (v.x,), (v.max,))
        v.max = all_reduced(v.max)
        v.shifted = elementwise("sub", v.x, v.max)
        v.exp = elementwise("exp", v.shifted)
        v.sum = machine.empty(one, v.x.dtype)
        machine.kernel("sum", (v.exp,), (v.sum,))
        del v.exp
        v.sum = all_reduced(v.sum)
        v.log = elementwise("log", v.sum)
        v.result = elementwise("sub", v.shifted, v.log)
        if v.result.dtype != x.dtype:
            v.result = converted(v.result, x.dtype)
        out = v.take("result")
        return attach(node, out, save=(out,))


@op
def _nll_loss(x: Tensor, targets: Tensor) -> Tensor:
    """`_nll_loss_forward_handler`; its backward is that of log_softmax as well."""
    machine, dtype, shape = x.machine, x.dtype, targets.shape
    column = (*shape, ONE)

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, targets, total = c.saved
        c.scale = elementwise("div", grad, total)
        c.safe = _where_not_ignored(shape, targets, INT64)
        c.grad = machine.empty(x.shape, dtype)
        machine.kernel("zeros_like", (), (c.grad,))
        _partition(c, targets)
        c.update = _to_float(c.mask, dtype)
        c.update = with_number("sub", c.update)
        c.arange = machine.empty(shape, INT64)
        machine.kernel("index_put_", (c.update,), (c.update,))
        kept = _compared(machine, column).hold()
        zero = machine.empty((), dtype).hold()
        c.scales = machine.empty(column, dtype)
        machine.kernel("where", (kept,), (c.scales,))
        zero.drop()
        kept.drop()
        del c.scale
        exp = elementwise("exp", x).hold()
        total_grad = elementwise("add", c.grad, exp).hold()
        exp.drop()
        out = elementwise("mul", total_grad, c.scales)
        total_grad.drop()
        return [out]

    with Locals() as v:
        v.safe = _where_not_ignored(shape, targets, INT64)
        _partition(v, targets)
        v.partial = machine.empty(column, dtype)
        machine.kernel("gather", (v.partial,), (v.partial,))
        _apply_mask(v.partial, v.mask)
        del v.mask
        v.reduced = all_reduced(v.partial)
        v.result = elementwise("neg", v.reduced.view(shape, machine.contiguous(shape)))
        v.result = _where_not_ignored(shape, v.result, dtype)
        kept = _compared(machine, shape).hold()
        count = machine.empty((), INT64).hold()
        machine.empty(shape, INT64).discard()  # what a sum of bools reads
        kept.drop()
        v.total = machine.empty((), dtype)
        count.drop()
        node = record("NllLossBackward0", (x,), backward, (x, targets))
        v.result = machine.empty((), dtype)
        return attach(node, elementwise("div", v.result, v.total), save=(v.total,))


def _to_float(mask: Tensor, dtype: Dtype) -> Tensor:
    out = mask.machine.empty(mask.shape, dtype)
    mask.machine.kernel("copy_", (mask,), (out,))
    return out
