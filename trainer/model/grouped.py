"""Products of the rows of a matrix with a matrix of their group, all in one: what a mixture of experts is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: the kernel's for the rows of all factors
NATIVE = hasattr(torch, "_grouped_mm")  # from 2.7 on, with a gradient from 2.8 on


def grouped_product(x_Sd: Tensor, weight_Efd: Tensor, count_E: Tensor) -> Tensor:
    """The first `count_E[0]` rows times the first matrix, transposed, and so on. Shapes: -> (S, f).

    Saved for backward are both factors; a gradient of each is made, of their sizes. CUDA has one kernel for it, for
    bfloat16 and widths that are multiples of 8; elsewhere it is a product for each group, straight into the result,
    for which the counts have to be known on the host. Under autocast both factors are cast, as linear layers' are.
    """
    if torch.is_autocast_enabled(x_Sd.device.type):
        dtype = torch.get_autocast_dtype(x_Sd.device.type)
        x_Sd, weight_Efd = x_Sd.to(dtype), weight_Efd.to(dtype)
    if has_kernel(x_Sd, weight_Efd):
        ends_E = count_E.cumsum(0, dtype=torch.int32)
        product: Tensor = torch._grouped_mm(x_Sd, weight_Efd.transpose(-2, -1), offs=ends_E)  # noqa: SLF001 - its only name in the versions that we support
        return product
    result: Tensor = _GroupedProduct.apply(x_Sd, weight_Efd, count_E.tolist())  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


def has_kernel(x_Sd: Tensor, weight_Efd: Tensor) -> bool:
    """Whether this build and device have one kernel for these factors."""
    if not (NATIVE and x_Sd.is_cuda and x_Sd.dtype == weight_Efd.dtype == torch.bfloat16):
        return False
    return all(width * x_Sd.element_size() % ALIGNMENT == 0 for width in weight_Efd.shape[1:])


class _GroupedProduct(torch.autograd.Function):
    """See `grouped_product`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(len(x), weight.shape[1])
        for rows, w, out in zip(torch.split(x, counts), weight, torch.split(y, counts), strict=True):
            torch.mm(rows, w.t(), out=out)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        pieces = (torch.split(each, ctx.counts) for each in (x, grad, grad_x))
        for rows, g, grad_rows, w, grad_w in zip(*pieces, weight, grad_weight, strict=True):
            torch.mm(g, w, out=grad_rows)
            torch.mm(g.t(), rows, out=grad_w)
        return grad_x, grad_weight, None
