"""Cross entropy that holds the logits and their gradient, and nothing else of that size.

Written with separate ops, a cross entropy over a vocabulary of 50,257 is the peak of many training steps: the shifted
logits, their exponential, their logarithm and the gradients of each are as large as the logits. With m a row's maximum
and s the sum of exp(x - m) over it,

    loss = log(s) - (x[target] - m)        d loss / d x = exp(x - m) / s - onehot(target)

two numbers a row are all that backward needs beside the logits themselves. One, m + log(s), would do on paper; but a
float32 near 1e4 comes in steps of 1e-3, which is then the error of every loss and, relatively, of every gradient.

Shape suffixes are the legend's letters, with N for the rows, B times T: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

# On CPU the passes over a tile (maximum, subtract, exp, sum) should find it in the cache. From 2**19 to 2**22 elements
# a quiet machine makes no difference (benchmarks/bench_loss.py --tiles); smaller tiles lose to the starting of ops.
CPU_TILE = 2**21  # elements

CHUNKS = 8  # of `chunked_cross_entropy`: torchtune's and torchtitan's default

# A sum over so many rows of x times a gradient of at most 1 is in float16's range, 65504, for |x| up to 64. In longer
# chunks the gradients are divided by as much as there are more rows.
FLOAT16_ROWS = 1024

HALF = (torch.bfloat16, torch.float16)
TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(logits)[target] over all leading dimensions.

    The logits are saved for backward, not copied, and the gradient is made in one tensor of their size. The forward
    pass needs a scratch: on CPU of at most `CPU_TILE` elements, elsewhere, where few launches matter more, as large as
    the logits, but gone before the gradient takes its place. Half precision needs a float32 scratch in backward too.

    Args:
        logits: (..., V), a floating dtype; bfloat16 and float16 are worked on in float32.
        targets: (...), integers in [0, V); int64 is used as it is, other dtypes are copied to int64.

    Returns:
        A scalar in nats per target: float64 for float64 logits, float32 for all others.

    Raises:
        TypeError: the logits are not floating or the targets not integer.
        ValueError: the shapes do not belong together, there is no target, or a target is out of range. The range is
            checked on CPU only: on CUDA reading it would make the host wait for the device in each step, and there
            gather's own assertion stops the program, later and without the figure.
    """
    if not logits.is_floating_point():
        raise TypeError(f"logits.dtype = {logits.dtype}: must be a floating dtype")
    if targets.dtype not in TARGET_DTYPES:
        raise TypeError(f"targets.dtype = {targets.dtype}: must be an integer dtype")
    if logits.ndim == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets.shape = {tuple(targets.shape)}: must be the shape of the logits, {tuple(logits.shape)}, without "
            "its last dimension"
        )
    if targets.numel() == 0:
        raise ValueError(f"targets.shape = {tuple(targets.shape)}: there is no target to take the mean over")
    V = logits.shape[-1]
    if targets.device.type == "cpu":
        low, high = (int(end) for end in targets.aminmax())
        if low < 0 or high >= V:
            raise ValueError(f"targets = {low if low < 0 else high}: must be in [0, {V}), the logits' last dimension")
    loss: Tensor = _CrossEntropy.apply(logits, targets.long())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss


class _CrossEntropy(torch.autograd.Function):
    """See `cross_entropy`. The passes write into memory that is already there, by `out=` or in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        x_NV, targets_N1 = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
        half = logits.dtype in HALF
        working = torch.float32 if half else logits.dtype
        scratch = x_NV.new_empty(_tile_elements(x_NV), dtype=working)
        max_N, sum_N, piece_N = (x_NV.new_zeros(len(x_NV), dtype=working) for _ in range(3))
        half_max_N = x_NV.new_empty(len(x_NV) if half else 0)  # amax writes its input's dtype only
        for rows, pieces in _tiles(x_NV):
            torch.amax(x_NV[rows], 1, out=half_max_N[rows] if half else max_N[rows])
            if half:
                max_N[rows].copy_(half_max_N[rows])
            top = max_N[rows, None]
            for columns in pieces:
                tile = x_NV[rows, columns]
                e = scratch[: tile.numel()].view(tile.shape)
                _shift(tile, top, out=e).exp_()
                sum_N[rows].add_(torch.sum(e, 1, out=piece_N[rows]))
        ctx.save_for_backward(logits, targets, max_N, sum_N)
        at_target_N = torch.gather(x_NV, 1, targets_N1).to(working).view(-1).sub_(max_N)
        return torch.log(sum_N, out=piece_N).sub_(at_target_N).mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # create_graph: the gradient would pass for a constant, without a word
            raise RuntimeError("cross_entropy has no second derivative: call backward or grad without create_graph")
        logits, targets, max_N, sum_N = ctx.saved_tensors
        x_NV, targets_N1 = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        grad_NV = grad.view(x_NV.shape)
        scale = grad_loss / len(x_NV)
        factor_N1, max_N1 = (scale / sum_N)[:, None], max_N[:, None]
        half = logits.dtype in HALF
        scratch = sum_N.new_empty(_tile_elements(x_NV) if half else 0)
        for rows, pieces in _tiles(x_NV):
            for columns in pieces:
                tile, out = x_NV[rows, columns], grad_NV[rows, columns]
                e = scratch[: tile.numel()].view(tile.shape) if half else out
                _shift(tile, max_N1[rows], out=e).exp_().mul_(factor_N1[rows])
                if half:
                    out.copy_(e)
        at_target_N1 = torch.gather(x_NV, 1, targets_N1).to(sum_N.dtype)
        at_target_N1.sub_(max_N1).exp_().mul_(factor_N1).sub_(scale)
        grad_NV.scatter_(1, targets_N1, at_target_N1.to(grad.dtype))
        return grad, None


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy(F.linear(x, weight), targets)` without the logits: they exist an eighth of the rows at a time.

    Forward makes the gradients along with the loss, chunk after chunk, and backward only scales them, so no product is
    computed twice (Hsu et al. 2024, "Liger Kernel", section 3.2). In half precision the softmax is taken in float32.
    Under autocast the head's products are in its dtype; the gradient of `weight` is added up in `weight`'s own.

    What backward scales is the gradient of the sum of the losses, not of their mean: divided by thousands of rows it
    would be 0 in float16 before it meets the loss scale, which only backward knows.

    Args:
        x: (..., d), what goes into the head.
        weight: (V, d), the head's.
        targets: (...), int64 in [0, V).

    Returns:
        A scalar in nats per target, of float32 for half precision.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    loss: Tensor = _ChunkedCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool) -> Tensor:
        x_Nd, targets_N1 = x.reshape(-1, x.shape[-1]), targets.reshape(-1, 1)
        N, V, half = len(x_Nd), len(weight), x.dtype in HALF
        head = weight.to(x.dtype)
        height = -(-N // CHUNKS)
        count = max(1.0, height / FLOAT16_ROWS)
        working = torch.float32 if half else x.dtype
        logits = x.new_empty(height, V)
        scratch = x.new_empty(height, V, dtype=working) if half else logits
        loss_N = x.new_empty(N, dtype=working)
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grad_weight = torch.zeros_like(weight)
        grad_x_Nd = grad_x.view(N, -1)
        for row in range(0, N, height):
            rows = slice(row, min(row + height, N))
            here = slice(rows.stop - row)
            torch.mm(x_Nd[rows], head.t(), out=logits[here])
            p = scratch[here].copy_(logits[here]) if half else logits[here]
            _loss_and_gradient(p, targets_N1[rows], count, out=loss_N[rows, None])
            if with_gradients:
                if half:
                    logits[here].copy_(p)
                torch.mm(logits[here], head, out=grad_x_Nd[rows])
                _add_product(grad_weight, logits[here].t(), x_Nd[rows])
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.share = count / N
        return loss_N.mean()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad_loss * ctx.share
        return grad_x.mul_(scale), grad_weight.mul_(scale), None, None


def _add_product(total_Vd: Tensor, a_VN: Tensor, b_Nd: Tensor) -> None:
    """`total_Vd` += `a_VN` @ `b_Nd`; where its dtype is wider, through products of an eighth of its rows at a time."""
    if total_Vd.dtype == a_VN.dtype:
        torch.addmm(total_Vd, a_VN, b_Nd, out=total_Vd)
        return
    height = -(-len(total_Vd) // CHUNKS)
    piece = b_Nd.new_empty(height, b_Nd.shape[1])
    for row in range(0, len(total_Vd), height):
        rows = slice(row, min(row + height, len(total_Vd)))
        total_Vd[rows].add_(torch.mm(a_VN[rows], b_Nd, out=piece[: rows.stop - row]))


def _loss_and_gradient(x_NV: Tensor, targets_N1: Tensor, count: float, *, out: Tensor) -> None:
    """Logits become the gradient of their losses' sum / `count`, in place; `out`, (N, 1), gets the losses."""
    max_N1 = x_NV.amax(1, keepdim=True)
    at_target_N1 = x_NV.sub_(max_N1).gather(1, targets_N1)
    sum_N1 = x_NV.exp_().sum(1, keepdim=True)
    torch.sub(sum_N1.log(), at_target_N1, out=out)
    sum_N1.mul_(count)
    at_target_N1.exp_().div_(sum_N1).sub_(1 / count)
    x_NV.div_(sum_N1).scatter_(1, targets_N1, at_target_N1)


def _shift(tile: Tensor, top: Tensor, *, out: Tensor) -> Tensor:
    """`tile` - `top` into `out`, whose dtype may be wider: an op over two dtypes would copy the narrower one first."""
    return torch.sub(tile, top, out=out) if tile.dtype == out.dtype else out.copy_(tile).sub_(top)


def _tile_elements(x_NV: Tensor) -> int:
    return min(CPU_TILE, x_NV.numel()) if x_NV.is_cpu else x_NV.numel()


def _tiles(x_NV: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """As many rows as a tile holds, and their columns in one piece; a row longer than a tile alone, in several."""
    N, V = x_NV.shape
    elements = _tile_elements(x_NV)
    height, width = max(1, elements // V), min(V, elements)
    pieces = [slice(column, column + width) for column in range(0, V, width)]
    for row in range(0, N, height):
        yield slice(row, row + height), pieces
