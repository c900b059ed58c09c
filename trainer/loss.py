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
