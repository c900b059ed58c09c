"""Cross entropies: (B, T, V) logits and (B, T) targets to a mean, each as its implementation allocates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import autocast
from estimator.eager.autograd import Context, add_wider, attach, record
from estimator.eager.ledger import Gemm
from estimator.eager.letters import ONE, ZERO, ceiling, smaller
from estimator.eager.ops import elementwise, in_place_with_number, log_softmax, mean, with_number
from estimator.eager.tensor import FLOAT32, INT64, Locals, Tensor, converted, op
from estimator.eager.views import cast, view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.eager.autograd import Node
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients


# Of the bundled trainer: trainer.model.loss.CPU_TILE and CHUNKS (a test compares).
LOSS_TILE = 2**21
LOSS_CHUNKS = 8


@op
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`trainer.model.loss.cross_entropy`: an autograd.Function that saves the logits, and two numbers a row.

    Logits in half precision are worked on in fp32, tile by tile, in both directions.
    """
    machine, dtype = logits.machine, logits.dtype
    half = dtype.itemsize < FLOAT32.itemsize
    flat = (machine.product(logits.shape[:-1]), logits.shape[-1])
    rows = flat[:1]
    scratch = (smaller(LOSS_TILE, logits.numel),) if machine.device == "cpu" else flat

    def at_target() -> Tensor:
        at_target = machine.empty((*rows, ONE), dtype)
        _move_elements("gather", at_target)
        return cast(at_target, FLOAT32)

    def backward(c: Context, grad: Tensor) -> Gradients:
        logits, _, _, total = c.saved
        c.grad = machine.empty(logits.shape, dtype)
        c.scale = with_number("div", grad)
        c.factor = elementwise("div", total, c.scale)
        if half:
            c.scratch = machine.empty(scratch)
        machine.kernel("softmax", (logits,), (c.grad,))
        c.at_target = at_target()
        narrow = cast(c.at_target, dtype).hold()
        _move_elements("scatter_", c.grad)
        narrow.drop()
        return [c.take("grad")]

    if machine.device == "cpu":  # min and max of the targets
        low, high = machine.empty((), INT64), machine.empty((), INT64)
        low.discard()
        high.discard()
    with Locals() as v:
        v.scratch = machine.empty(scratch)
        v.max, v.sum, v.piece = (machine.empty(rows) for _ in range(3))
        if half:
            v.half_max = machine.empty(rows, dtype)
        machine.kernel("amax", (logits,), (v.max,))
        machine.kernel("logsumexp", (logits,), (v.sum,))
        node = record("CrossEntropyBackward", (logits,), backward)
        v.at_target = at_target()
        out, saved = attach(node, mean(v.piece, ())), [t.hold() for t in (logits, targets, v.max, v.sum)]
    saved_at_last(node, saved)
    return out


def saved_at_last(node: Node | None, tensors: Sequence[Tensor]) -> None:
    """What `ctx.save_for_backward` was given, held: a Python function's node saves it when forward has returned."""
    if node is not None:
        node.save(tensors)
    for t in tensors:
        t.drop()


def _move_elements(name: str, out: Tensor) -> None:
    """gather or scatter_ of one element a row; on the CPU in half precision through an fp32 buffer as large as `out`.

    aten/src/ATen/native/cpu/ScatterGatherKernel.cpp, create_acc_buffer.
    """
    machine = out.machine
    if machine.device == "cpu" and out.dtype.itemsize < FLOAT32.itemsize:
        machine.empty(out.shape).discard()
    touched = Tensor(machine, out.storage, (machine.product(out.shape[:-1]),), (ONE,), out.dtype).hold()
    machine.kernel(name, (touched,), (touched,))
    touched.drop()


@op
def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`trainer.model.loss.chunked_cross_entropy`: head, loss and both gradients, an eighth of the rows at a time."""
    return _chunked_cross_entropy(cast(x, x.machine.autocast_dtype or x.dtype), weight, targets)


@op
def _chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    machine, dtype, (V, d) = x.machine, x.dtype, weight.shape
    N = machine.product(x.shape[:-1])
    r = ceiling(N, LOSS_CHUNKS)

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.scale = with_number("mul", grad)
        for g in c.saved:
            machine.kernel("mul_", (g, c.scale), (g,))
        return list(c.saved)

    with Locals() as v:
        v.head = weight if weight.dtype == dtype else converted(weight, dtype)
        v.logits = machine.empty((r, V), dtype)
        v.scratch = machine.empty((r, V)) if dtype.itemsize < FLOAT32.itemsize else v.logits
        v.losses = machine.empty((N,))
        v.grad_x, v.grad_weight = machine.empty(x.shape, dtype), machine.empty(weight.shape, weight.dtype)
        for turn in range(LOSS_CHUNKS):
            # The rows of all chunks are N, of which a chunk is an eighth rounded up: all are counted with the first.
            rows = N if turn == 0 else ZERO
            machine.kernel("mm", (x, v.head), (v.logits,), gemm=Gemm(ONE, rows, V, d))
            if v.scratch is not v.logits:
                machine.kernel("copy_", (v.logits,), (v.scratch,))
            _chunk_gradient(v.scratch, targets)
            if v.scratch is not v.logits:
                machine.kernel("copy_", (v.scratch,), (v.logits,))
            machine.kernel("mm", (v.logits, v.head), (v.grad_x,), gemm=Gemm(ONE, rows, d, V))
            _add_product(v.grad_weight, v.logits, x, rows)
        node = record("ChunkedCrossEntropyBackward", (x, weight), backward)
        out, saved = attach(node, mean(v.losses, ())), [v.grad_x.hold(), v.grad_weight.hold()]
    saved_at_last(node, saved)
    return out


def _add_product(total: Tensor, logits: Tensor, x: Tensor, rows: Size) -> None:
    """`trainer.model.loss._add_product`: into a wider dtype an eighth of the vocabulary at a time."""
    machine, (V, d) = x.machine, total.shape
    if total.dtype == x.dtype:
        machine.kernel("addmm", (logits, x), (total,), gemm=Gemm(ONE, V, d, rows))
        return
    with Locals() as v:
        v.piece = machine.empty((ceiling(V, LOSS_CHUNKS), d), x.dtype)
        v.some = Tensor(machine, total.storage, v.piece.shape, v.piece.stride, total.dtype)
        for turn in range(LOSS_CHUNKS):  # all pieces are counted with the first, as the chunks are
            machine.kernel("mm", (logits, x), (v.piece,), gemm=Gemm(ONE, V if turn == 0 else ZERO, d, rows))
            add_wider(v.some, v.piece)


def _chunk_gradient(x: Tensor, targets: Tensor) -> None:
    """`trainer.model.loss._loss_and_gradient`."""
    machine, rows = x.machine, (x.shape[0], ONE)
    with Locals() as v:
        v.max, v.at_target, v.sum = (machine.empty(rows) for _ in range(3))
        machine.kernel("amax", (x,), (v.max,))
        machine.kernel("gather", (targets,), (v.at_target,))
        machine.kernel("exp_", (x,), (x,))
        machine.kernel("sum", (x,), (v.sum,))
        machine.empty(rows).discard()  # log
        for name, what in (("mul_", v.sum), ("sub_", v.at_target)):
            in_place_with_number(name, what)
        machine.kernel("div_", (x, v.sum), (x,))


@op
def torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """F.cross_entropy(logits.view(-1, V), targets.view(-1)): log_softmax, then nll_loss."""
    machine, rows = logits.machine, logits.machine.product(logits.shape[:-1])
    flat = view(logits, (rows, logits.shape[-1]))
    if autocast.fp32(machine, "cpu"):
        flat = cast(flat, FLOAT32)
    return _cross_entropy_loss(flat, view(targets, (rows,)))


@op
def _cross_entropy_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """On CUDA autocast does not widen the log_softmax in it, which is given a dtype, the logits', but the nll_loss.

    `cross_entropy_loss` of aten/src/ATen/native/LossNLL.cpp; `set_opt_dtype` of aten/src/ATen/autocast_mode.h.
    """
    x = log_softmax(logits)
    wide = autocast.fp32(logits.machine, "cuda")
    return _nll_loss(x if wide is None else cast(x, wide), targets)


@op
def torch_cross_entropy_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of logits.float()."""
    return torch_cross_entropy(cast(logits, FLOAT32), targets)


@op
def _nll_loss(x: Tensor, targets: Tensor) -> Tensor:
    def backward(c: Context, grad: Tensor) -> Gradients:
        x = c.saved[0]
        out = x.machine.empty(x.shape, x.dtype)
        x.machine.kernel("nll_loss_backward", (grad, c.saved[1]), (out,))
        return [out]

    node = record("NllLossBackward0", (x,), backward, (x, targets))
    machine = x.machine
    out, total_weight = machine.empty((), x.dtype), machine.empty((), x.dtype).hold()
    machine.kernel("nll_loss_forward", (targets,), (out, total_weight))
    attach(node, out, save=(total_weight,))
    total_weight.drop()
    return out
