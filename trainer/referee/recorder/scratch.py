"""What CPU kernels allocate for themselves, which a meta kernel does not: one table, by operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainer.referee.recorder.log import Operand

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Scratch = tuple[Sequence[int], Sequence[tuple[int, ...]]]


def scratch_of(name: str, inputs: Sequence[Any], threads: int) -> Scratch:
    """(bytes that live while a kernel runs, (bytes that live together) one after the other at its end)."""
    rule = KERNELS.get(name.removeprefix("aten::").partition(".")[0])
    return ((), ()) if rule is None else rule(inputs, threads)


def _casts(inputs: Sequence[Any], _: int) -> Scratch:
    """TensorIterator on the CPU reads an operand of another dtype than the computation's through a copy.

    `TensorIteratorBase::compute_types` of aten/src/ATen/TensorIterator.cpp.
    """
    operands = [x for x in inputs if isinstance(x, Operand)]
    if not operands:
        return (), ()
    common = common_dtype(operands)
    return [x.numel * common.itemsize for x in operands if x.dtype != common], ()


def common_dtype(operands: Sequence[Operand]) -> torch.dtype:
    """`at::result_type`: tensors with dimensions decide before those without, and these before numbers."""
    ranks: dict[int, torch.dtype] = {}
    for x in operands:
        rank = 2 if x.is_number else 0 if x.shape else 1
        ranks[rank] = torch.promote_types(ranks[rank], x.dtype) if rank in ranks else x.dtype
    found = ranks.pop(min(ranks))
    for _, dtype in sorted(ranks.items()):
        found = _combined(found, dtype)
    return found


def _combined(stronger: torch.dtype, weaker: torch.dtype) -> torch.dtype:
    """`combine_categories`: the weaker decides only where it is of a higher kind."""
    if _kind(weaker) <= _kind(stronger):
        return stronger
    return torch.get_default_dtype() if weaker == torch.float64 else weaker


def _kind(dtype: torch.dtype) -> int:
    return 3 if dtype.is_complex else 2 if dtype.is_floating_point else 1 if dtype != torch.bool else 0


def _layer_norm_backward(inputs: Sequence[Any], threads: int) -> Scratch:
    """Two rows a thread, in which the gradients of weight and bias are summed (layer_norm_kernel.cpp)."""
    dy, _, shape, _, _, weight, bias, mask = inputs
    width = 1
    for n in shape:
        width *= n
    if not any(mask[1:]):
        return (), ()
    return (), [(2 * threads * width * dy.dtype.itemsize,)]


KERNELS: dict[str, Callable[[Sequence[Any], int], Scratch]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "pow", "add_", "mul_", "div_", "sub_", "where", "rsub", "maximum"), _casts),
    "native_layer_norm_backward": _layer_norm_backward,
}
