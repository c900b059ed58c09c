"""What `torch.autocast` does to an operator's arguments: the policies of aten/src/ATen/autocast_mode.cpp.

Matrix products and fused attention take the lower precision on both devices; softmax, log_softmax and nll_loss take
fp32 on CUDA, cross_entropy takes it on the CPU. `Machine.autocast` is the context, which keeps the casts of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.eager.tensor import BFLOAT16, FLOAT16, FLOAT32
from estimator.eager.views import cast

if TYPE_CHECKING:
    from estimator.eager.tensor import Dtype, Machine, Tensor

LOWER = {"bf16-mixed": BFLOAT16, "fp16-mixed": FLOAT16}  # what a precision casts to


def lower(*arguments: Tensor | None) -> list[Any]:
    """`arguments` as a matrix product takes them; they are cast from the last to the first, as GCC evaluates them."""
    return [_lowered(x) for x in reversed(arguments)][::-1]


def _lowered(x: Tensor | None) -> Tensor | None:
    """A weight is cast once, and autocast keeps the cast until it ends."""
    if x is None:
        return None
    machine, dtype = x.machine, x.machine.autocast_dtype
    if dtype is None or x.dtype == dtype:
        return x
    if not x.is_leaf:
        return cast(x, dtype)
    cached = machine.autocast_cache.get(x)
    if cached is None:
        cached = machine.autocast_cache[x] = cast(x, dtype).hold()
    return cached


def fp32(machine: Machine, device: str) -> Dtype | None:
    """The dtype that autocast gives to operators which it runs in fp32 on `device`; None elsewhere."""
    return FLOAT32 if machine.autocast_dtype is not None and machine.device == device else None
