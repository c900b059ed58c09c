"""Cross entropy that holds the logits and their gradient, and nothing else of that size.

Written with separate ops, a cross entropy over a vocabulary of 50,257 is the peak of many training steps: the shifted
logits, their exponential, their logarithm and the gradients of each are as large as the logits. With

    loss = log(sum(exp(x))) - x[target]        d loss / d x = exp(x - log(sum(exp(x)))) - onehot(target)

one number a row, the log-sum-exp, is all that backward needs beside the logits themselves.

Shape suffixes are the legend's letters, with N for the rows, B times T: N rows, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator

# On CPU the passes over a tile (maximum, subtract, exp, sum) should find it in the cache: 2 MiB in fp32, with the
# scratch of the same size, is twice what two cores have as L2 and far below their L3. Smaller tiles lose more to the
# starting of ops than they win (benchmarks/bench_loss.py).
CPU_TILE = 2**19  # elements

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
    """See `cross_entropy`. Every pass writes into memory that is already there, by `out=` or in place."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        V = logits.shape[-1]
        x_NV, targets_N1 = logits.reshape(-1, V), targets.reshape(-1, 1)
        working = torch.float32 if logits.dtype in HALF else logits.dtype
        scratch = x_NV.new_empty(_tile_elements(x_NV), dtype=working)
        lse_N = x_NV.new_full((len(x_NV),), float("-inf"), dtype=working)
        top_N, sum_N = torch.empty_like(lse_N), torch.empty_like(lse_N)
        for rows, columns in _tiles(x_NV):
            tile, top, total = x_NV[rows, columns], top_N[rows], sum_N[rows]
            e = scratch[: tile.numel()].view(tile.shape)
            if tile.dtype != working:
                tile = e.copy_(tile)
            torch.amax(tile, 1, out=top)
            torch.sub(tile, top[:, None], out=e).exp_()
            torch.sum(e, 1, out=total).log_().add_(top)
            # Rows longer than a tile come in several pieces; for all others this adds to exp(-inf) = 0.
            torch.logaddexp(lse_N[rows], total, out=lse_N[rows])
        ctx.save_for_backward(logits, targets, lse_N)
        picked_N = torch.gather(x_NV, 1, targets_N1).to(working).view(-1)
        return torch.sub(lse_N, picked_N, out=picked_N).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        logits, targets, lse_N = ctx.saved_tensors
        V = logits.shape[-1]
        x_NV, targets_N1 = logits.reshape(-1, V), targets.reshape(-1, 1)
        grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        grad_NV = grad.view(-1, V)
        scale = grad_loss / len(x_NV)
        half = logits.dtype in HALF
        scratch = lse_N.new_empty(_tile_elements(x_NV) if half else 0)
        for rows, columns in _tiles(x_NV):
            tile, lse, out = x_NV[rows, columns], lse_N[rows, None], grad_NV[rows, columns]
            if half:
                e = scratch[: tile.numel()].view(tile.shape)
                out.copy_(e.copy_(tile).sub_(lse).exp_().mul_(scale))
            else:
                torch.sub(tile, lse, out=out).exp_().mul_(scale)
        # p - 1 at the targets by expm1, which keeps its digits where p is nearly 1.
        at_target_N1 = torch.gather(x_NV, 1, targets_N1).to(lse_N.dtype)
        at_target_N1.sub_(lse_N[:, None]).expm1_().mul_(scale)
        grad_NV.scatter_(1, targets_N1, at_target_N1.to(grad.dtype))
        return grad, None


def _tile_elements(x_NV: Tensor) -> int:
    return min(CPU_TILE, x_NV.numel()) if x_NV.is_cpu else x_NV.numel()


def _tiles(x_NV: Tensor) -> Iterator[tuple[slice, slice]]:
    """Whole rows, as many as a tile holds; where one row is longer than a tile, pieces of it."""
    N, V = x_NV.shape
    elements = _tile_elements(x_NV)
    height, width = max(1, elements // V), min(V, elements)
    for row in range(0, N, height):
        for column in range(0, V, width):
            yield slice(row, min(row + height, N)), slice(column, min(column + width, V))
