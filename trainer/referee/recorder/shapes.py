"""Shapes of the results of CPU kernels for which PyTorch has no meta kernel, or another device's."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.library import Library

from trainer.referee.recorder.scratch import is_channels_last

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor


def conv2d(
    x: Tensor, weight: Tensor, kernel: Sequence[int], _: Any, stride: Sequence[int], pad: Sequence[int]
) -> Tensor:
    """`_slow_conv2d_forward`: (B, C, H, W) and (O, C, h, w) -> (B, O, H', W')."""
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], pad, kernel, stride, strict=True)]
    return x.new_empty((x.shape[0], weight.shape[0], *sides)).to(memory_format=_format(x, weight))


def _format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """Channels last where input or weight is (`thnn_conv_use_channels_last` of aten/src/ATen/native/ConvUtils.h)."""
    last = any(is_channels_last(t.shape, t.stride()) for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, _: Any, __: Any, ___: Any, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """`_slow_conv2d_backward`: the gradients of input, weight and bias, those that are wanted."""
    shapes = (x.shape, weight.shape, weight.shape[:1])
    made = [grad.new_empty(shape) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    return tuple(t.to(memory_format=_format(x, weight)) if t is not None and t.dim() == 4 else t for t in made)


def bincount(x: Tensor, _: Tensor | None = None, minlength: int = 0) -> Tensor:
    """`bincount` of numbers below `minlength`.

    Raises:
        NotImplementedError: nothing says how many there are.
    """
    if not minlength:
        raise NotImplementedError("bincount without minlength: its length is a value")
    return x.new_empty((minlength,), dtype=torch.int64)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, _: Any, __: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`native_layer_norm`: mean and 1 / std of each row, in the weight's dtype (PyTorch's meta kernel has CUDA's)."""
    rows = (*x.shape[: x.dim() - len(shape)], *(1 for _ in shape))
    dtype = x.dtype if weight is None else weight.dtype
    return x.new_empty(x.shape), x.new_empty(rows, dtype=dtype), x.new_empty(rows, dtype=dtype)


def layer_norm_backward(
    _: Tensor, x: Tensor, __: Any, ___: Tensor, ____: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Any
) -> tuple[Tensor | None, ...]:
    """`native_layer_norm_backward`: row-major whatever its input is (`layer_norm_backward_cpu` of layer_norm.cpp)."""
    made = zip((x, weight, bias), wanted, strict=True)
    return tuple(None if t is None or not want else t.new_empty(t.shape) for t, want in made)


def group_norm(
    x: Tensor, weight: Tensor | None, _: Any, images: int, __: int, ___: int, groups: int, ____: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`native_group_norm`: mean and 1 / std of each image's groups, in the weight's dtype (`param_scalar_type`)."""
    dtype = x.dtype if weight is None else weight.dtype
    stats = [x.new_empty((images, groups), dtype=dtype) for _ in range(2)]
    return x.new_empty(x.shape), stats[0], stats[1]


def group_norm_backward(
    _: Tensor, x: Tensor, __: Tensor, ___: Tensor, weight: Tensor | None, *more: Any
) -> tuple[Tensor | None, ...]:
    """`native_group_norm_backward`: gradients in the dtypes of input and weight (aten/.../native/group_norm.cpp)."""
    made = zip((x, weight, weight), more[-1], strict=True)
    return tuple(None if t is None or not wanted else t.new_empty(t.shape) for t, wanted in made)


def pointwise_loss(x: Tensor, _: Tensor, reduction: int = 1, *__: float) -> Tensor:
    """`mse_loss` and `smooth_l1_loss`: the sum or mean stays in storage for the loss of each element.

    aten/src/ATen/native/BinaryOps.cpp and Loss.cpp: the result is made before it is known to be one number.
    """
    loss = x.new_empty(x.shape)
    return loss.resize_(()) if reduction else loss


def cross_entropy_of_two(x: Tensor, _: Tensor, __: Tensor | None = None, reduction: int = 1) -> Tensor:
    """`binary_cross_entropy`: likewise."""
    return pointwise_loss(x, x, reduction)


def update(*_: Any, **__: Any) -> None:
    """`_fused_sgd_` and `_fused_adagrad_`: parameters and states are written where they are."""


def like(x: Tensor, *_: Any) -> Tensor:
    """What has the shape of its first argument: `_logcumsumexp`."""
    return x.new_empty(x.shape)


def extremes(x: Tensor, values: Tensor, indices: Tensor, dim: int) -> None:
    """`_cummax_helper`, `_cummin_helper`: both results are there already."""


SHAPES: dict[str, Callable[..., Any]] = {
    "bincount": bincount,
    "binary_cross_entropy": cross_entropy_of_two,
    "mse_loss": pointwise_loss,
    "smooth_l1_loss": pointwise_loss,
    "native_group_norm": group_norm,
    "native_group_norm_backward": group_norm_backward,
    "native_layer_norm": layer_norm,
    "_cummax_helper": extremes,
    "_cummin_helper": extremes,
    "_fused_adagrad_": update,
    "_fused_adagrad_.tensor_lr": update,
    "_fused_sgd_": update,
    "_fused_sgd_.tensor_lr": update,
    "_logcumsumexp": like,
    "native_layer_norm_backward": layer_norm_backward,
    "_slow_conv2d_forward": conv2d,
    "_slow_conv2d_backward.output_mask": conv2d_backward,
}


def efficient_attention(
    q: Tensor, _: Tensor, v: Tensor, __: Tensor | None, log_sum_exp: bool, *___: Any, **____: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_scaled_dot_product_efficient_attention` of CUDA: the generator's seed and offset are the host's.

    aten/src/ATen/native/transformers/cuda/attention.cu, `_efficient_attention_forward`, where no graph is captured.
    """
    b, h, t = q.shape[:3]
    rows = -(-t // 32) * 32 if log_sum_exp else 0
    out = q.new_empty((b, t, h, v.shape[-1])).transpose(1, 2)
    state = torch.empty((), dtype=torch.int64, device="cpu"), torch.empty((), dtype=torch.int64, device="cpu")
    return out, q.new_empty((b, h, rows), dtype=torch.float32), *state


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, _: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """`_grouped_mm` of CUDA in any dtype: rows begin at a multiple of 16 bytes.

    `create_grouped_gemm_output_tensor` of aten/src/ATen/native/GroupedMMUtils.h; PyTorch's meta kernel has bf16 alone.
    """
    if a.dim() == b.dim() == 2:
        shape: tuple[int, ...] = (len(offs) if offs is not None else 1, a.shape[0], b.shape[1])
    elif a.dim() == 3 and b.dim() == 3:
        shape = (*a.shape[:2], b.shape[2])
    else:
        shape = (a.shape[-2], b.shape[-1])
    kind = dtype or a.dtype
    aligned = 16 // kind.itemsize
    row = -(-shape[-1] // aligned) * aligned
    stride = (row, 1) if len(shape) == 2 else (shape[1] * row, row, 1)
    return torch.empty_strided(shape, stride, dtype=kind, device=a.device)


def conv_depthwise2d(
    x: Tensor, weight: Tensor, kernel: Sequence[int], _: Any, stride: Sequence[int], pad: Sequence[int], dilation: Any
) -> Tensor:
    """`_conv_depthwise2d` of CUDA: a kernel for each channel."""
    geometry = zip(x.shape[2:], pad, kernel, stride, dilation, strict=True)
    sides = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, k, s, d in geometry]
    return x.new_empty((x.shape[0], weight.shape[0], *sides)).to(memory_format=_format(x, weight))


def gru_cell(_: Tensor, __: Tensor, hidden: Tensor, *___: Any) -> tuple[Tensor, Tensor]:
    """`_thnn_fused_gru_cell` of CUDA: the state, and five numbers for each of its own (aten/.../native/cuda/RNN.cu)."""
    return hidden.new_empty(hidden.shape), hidden.new_empty((hidden.shape[0], 5 * hidden.shape[1]))


def gru_cell_backward(grad: Tensor, _: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    """`_thnn_fused_gru_cell_backward`: the gradients of both gates, of the state and of both biases."""
    gates, bias = (grad.shape[0], 3 * grad.shape[1]), (3 * grad.shape[1],)
    biases = [grad.new_empty(bias) if has_bias else None for _ in range(2)]
    return grad.new_empty(gates), grad.new_empty(gates), grad.new_empty(grad.shape), *biases


def never(*_: Any) -> bool:
    """Whether cuDNN or MIOpen has a kernel for it: they are left out."""
    return False


ON_CUDA: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((f"_use_{x}_ctc_loss{y}" for x in ("cudnn", "miopen") for y in ("", ".Tensor")), never),
    "_thnn_fused_gru_cell": gru_cell,
    "_thnn_fused_gru_cell_backward": gru_cell_backward,
    "_conv_depthwise2d": conv_depthwise2d,
    "_grouped_mm": grouped_mm,
    "_scaled_dot_product_efficient_attention": efficient_attention,
}
OF_CPU = ("native_group_norm", "native_layer_norm", "native_layer_norm_backward")  # CUDA's are PyTorch's meta kernels


@contextmanager
def known_shapes(device: str) -> Iterator[None]:
    """These as meta kernels."""
    own = SHAPES if device == "cpu" else ON_CUDA | {n: f for n, f in SHAPES.items() if n not in OF_CPU}
    library: Any = Library("aten", "IMPL")  # type: ignore[no-untyped-call]  # torch leaves Library untyped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel is overridden: it is meant to be
            for name, function in own.items():
                library.impl(name, function, "Meta", allow_override=True)
        yield
    finally:
        library._destroy()  # noqa: SLF001 - it has no public name
