"""What kernels allocate for themselves beside their results: a table for each device, by operator.

A kernel that is left out does not allocate it, so it is written down here, with the file of PyTorch that says so. The
sizes are those of the symbolic machine (`estimator.eager`), whose rules take numbers as well as letters.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch

from estimator.eager.indexing import EXPANDED_INDEX_WIDTH
from estimator.eager.letters import constant
from estimator.eager.linalg import efficient_scratch, flash_scratch, tile_keys, tile_rows
from estimator.eager.tensor import TRANSPOSED_BLOCK
from trainer.referee.recorder.log import DTYPES, Operand

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.eager.letters import Size

    Rule = Callable[[Sequence[Any], int], Sequence[int]]

FLOAT = 4  # bytes of a float32


def scratch_of(device: str, name: str, inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """Bytes of each storage that a kernel has for itself, while it runs.

    Args:
        device: "cpu" or "cuda".
        name: the operator, with its overload.
        inputs: what it is given (`Log.values`).
        threads: PyTorch's CPU threads.
    """
    rule = KERNELS[device].get(name.removeprefix("aten::").partition(".")[0])
    if rule is None or not any(isinstance(x, Operand) for x in inputs):  # torch.func wraps tensors for a kernel within
        return ()
    return rule(inputs, threads)


def turns_of(device: str, name: str, inputs: Sequence[Any]) -> Sequence[int]:
    """Bytes that a kernel has for itself one after the other, each let go before the next: of `cat` into another dtype.

    What the common dtype of a TensorIterator's inputs is not, an output is written through a copy in that dtype
    (`cat_out_cpu` of aten/src/ATen/native/TensorShape.cpp takes one tensor after the other).
    """
    if device != "cpu" or name.removeprefix("aten::") not in ("cat", "cat.out"):
        return ()
    parts = [x for x in inputs[0] if isinstance(x, Operand) and x.numel]
    out = inputs[2] if name.endswith("out") else None
    dtype = out.dtype if isinstance(out, Operand) else common_dtype(parts)
    return [x.nbytes for x in parts if x.dtype != dtype]


def _casts(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """TensorIterator reads an operand of another dtype than the computation's through a copy.

    `TensorIteratorBase::compute_types` of aten/src/ATen/TensorIterator.cpp.
    """
    operands = [x for x in inputs if isinstance(x, Operand)]
    common = common_dtype(operands)
    return [x.numel * common.itemsize for x in operands if x.dtype != common]


def _compared(inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """A number that something is compared with becomes a tensor in the kernel, and is then cast."""
    x, other = inputs[:2]
    if isinstance(other, Operand):
        return _casts(inputs, threads)
    number = torch.float64 if isinstance(other, float) else torch.int64
    common = common_dtype([x, Operand(0, number, is_number=True, known=True, shape=(), stride=())])
    casts = [y.numel * common.itemsize for y in (x,) if y.dtype != common]
    return [number.itemsize, *casts, *([common.itemsize] if common != number else [])]


def _where(inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """The condition is read as it is; of the others, `where_self_out` casts one itself."""
    return _casts(inputs[1:3], threads)


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


def _number(x: Size) -> int:
    assert x.number is not None
    return int(x.number)


def _tiles(q: Operand, k: Operand) -> tuple[int, int]:
    """(query rows, key rows) of one tile of fused attention on (B, h, T, e)."""
    return _number(tile_rows(constant(q.shape[-2]))), _number(tile_keys(constant(k.shape[-2])))


def _flash(inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """A tile of scores, its rows' maximum and sum and a tile of the output for each thread; scores in half precision.

    aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, `cpu_flash_attention`.
    """
    q, k = inputs[:2]
    rows, keys = _tiles(q, k)
    found = [FLOAT * threads * rows * (keys + 2 + q.shape[-1])]
    return found if q.dtype.itemsize >= FLOAT else [*found, threads * rows * keys * q.dtype.itemsize]


def _flash_backward(inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """A tile of scores and one of their gradients for each thread, both in half precision too, and a row of sums."""
    _, q, k = inputs[:3]
    rows, keys = _tiles(q, k)
    found = [FLOAT * 2 * threads * rows * keys, FLOAT * rows]
    return found if q.dtype.itemsize >= FLOAT else [*found, 2 * threads * rows * keys * q.dtype.itemsize]


def _flash_backward_on_cuda(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """`estimator.eager.linalg.flash_scratch`; where keys have fewer heads, gradients of them for every head."""
    _, q, k, v = inputs[:4]
    held = _floats(flash_scratch(tuple(map(constant, q.shape))))
    groups = q.shape[1] // k.shape[1]
    return held if groups == 1 else [*held, k.nbytes * groups, v.nbytes * groups]


def _efficient_backward_on_cuda(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """`estimator.eager.linalg.efficient_scratch`."""
    q = inputs[1]
    return _floats(efficient_scratch(tuple(map(constant, q.shape)), wide=q.dtype.itemsize == FLOAT))


def _floats(shapes: Sequence[Sequence[Size]]) -> Sequence[int]:
    """Bytes of tensors of these shapes in float32."""
    return [FLOAT * prod(map(_number, shape)) for shape in shapes]


def _layer_norm(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """Its input, made contiguous."""
    return _copies(inputs[:1])


def _layer_norm_backward(inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """Two rows a thread, in which the gradients of weight and bias are summed; both inputs, made contiguous.

    aten/src/ATen/native/cpu/layer_norm_kernel.cpp, `LayerNormBackwardKernelImplInternal`.
    """
    _, x, shape, _, _, weight, _, mask = inputs
    sums = () if weight is None or not any(mask[1:]) else [2 * threads * prod(shape) * x.dtype.itemsize]
    return [*_copies(inputs[:2]), *sums]


def _copies(operands: Sequence[Operand]) -> Sequence[int]:
    """Those that are not contiguous, copied."""
    return [x.nbytes for x in operands if not x.is_contiguous]


def _sum(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """Its input in the dtype of the result; half precision is added up in float32 where two loops are summed.

    `make_reduction` and `should_use_acc_buffer` of aten/src/ATen/native/ReduceOps.{h,cpp}.
    """
    x, dims, _keep, asked = inputs[:4]
    dtype = x.dtype if x.dtype.is_floating_point or x.dtype.is_complex else torch.int64
    if isinstance(asked, int):
        dtype = DTYPES[asked]
    summed = {d % len(x.shape) for d in dims} if dims and x.shape else set(range(len(x.shape)))
    if dtype.itemsize < FLOAT and dtype.is_floating_point and _loops(x, summed) > 1:
        kept = prod(n for i, n in enumerate(x.shape) if i not in summed)
        return [FLOAT * x.numel, FLOAT * kept]
    return [] if x.dtype == dtype else [x.numel * dtype.itemsize]


def _loops(x: Operand, summed: set[int]) -> int:
    """Into how many loops the dimensions that are summed coalesce: those whose strides follow from one another."""
    loops, following = 0, None
    for stride, n in sorted((x.stride[i], x.shape[i]) for i in summed if x.shape[i] != 1):
        loops += stride != following
        following = stride * n
    return loops


def _bincount(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """The least and the greatest of its numbers."""
    return [inputs[0].dtype.itemsize] * 2


def _sort(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """A buffer of its values (aten/src/ATen/native/cpu/SortingKernel.cpp)."""
    return [inputs[0].nbytes]


def _batch_norm(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """A scale and a shift of each channel (`batch_norm_cpu_collect_linear_and_constant_terms`)."""
    return [inputs[0].shape[1] * FLOAT] * 2


def _copy(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """A transposed matrix is copied to a contiguous one block by block (`copy_transpose_valid` of Copy.cpp)."""
    to, source = inputs[:2]
    transposed = len(source.shape) == 2 and source.stride == (1, source.shape[0])
    straight = to.shape == source.shape and to.stride == (to.shape[-1], 1) if transposed else False
    if not straight or to.dtype != source.dtype or to.numel < TRANSPOSED_BLOCK**2:
        return ()
    return [TRANSPOSED_BLOCK**2 * to.dtype.itemsize]


def _element_moves(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """gather and scatter of half precision go through a buffer in float32 as large as their result.

    aten/src/ATen/native/cpu/ScatterGatherKernel.cpp, `create_acc_buffer`.
    """
    to, _, index = inputs[:3]
    return [] if to.dtype.itemsize >= FLOAT or not to.dtype.is_floating_point else [FLOAT * index.numel]


def _scatter(inputs: Sequence[Any], _: int) -> Sequence[int]:
    to = inputs[0]
    return [] if to.dtype.itemsize >= FLOAT or not to.dtype.is_floating_point else [FLOAT * to.numel]


def _index_add(inputs: Sequence[Any], threads: int) -> Sequence[int]:
    """Rows of half precision are added up in float32: one row a thread where rows are wide, else a copy of all."""
    to = inputs[0]
    if to.dtype.itemsize >= FLOAT or len(to.shape) < 2:
        return []
    rows = threads if to.shape[1] >= EXPANDED_INDEX_WIDTH else to.shape[0]
    return [FLOAT * rows * prod(to.shape[1:])]


def _embedding_backward(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """The gradient and the indices, made contiguous (aten/src/ATen/native/Embedding.cpp)."""
    return _copies(inputs[:2])


def _conv2d(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """The columns that a matrix product takes the place of a convolution on (`compute_columns2d`)."""
    x, weight, kernel, _, stride, pad = inputs
    return _columns(x, weight, kernel, stride, pad)


def _conv2d_backward(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """The gradient, made contiguous in the convolution's format, and the columns (.../native/ConvolutionMM2d.cpp)."""
    grad, x, weight, kernel, stride, pad, wanted = inputs
    last = is_channels_last(x.shape, x.stride) or is_channels_last(weight.shape, weight.stride)
    held = _copies([_permuted(grad) if last else grad])
    return [*held, *_columns(x, weight, kernel, stride, pad)] if wanted[1] else held


def is_channels_last(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """`is_channels_last_strides_2d_s4` of c10/core/MemoryFormat.h."""
    if len(shape) != 4 or stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if shape[d] == 0 or stride[d] < least or (d == 0 and least == stride[1]):
            return False
        least = stride[d] * max(shape[d], 1)
    return True


def _permuted(x: Operand) -> Operand:
    """(N, C, H, W) as (N, H, W, C)."""
    order = (0, 2, 3, 1)
    return x._replace(shape=tuple(x.shape[i] for i in order), stride=tuple(x.stride[i] for i in order))


def _conv_transpose2d(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """The columns of every image (aten/src/ATen/native/NaiveConvolutionTranspose2d.cpp)."""
    x, weight = inputs[:2]
    return [x.shape[0] * prod(weight.shape[1:]) * prod(x.shape[2:]) * x.dtype.itemsize]


def _group_norm_backward(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """Two sums of each image's channels (aten/src/ATen/native/cpu/group_norm_kernel.cpp)."""
    x = inputs[1]
    return [x.shape[0] * x.shape[1] * FLOAT] * 2


def _pointwise_loss(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """The loss of each element, before they are added up; their mean divides by a number (aten/.../native/Loss.cpp)."""
    x, reduction = inputs[0], inputs[2]
    whole = [x.nbytes] if reduction else []
    return [*whole, torch.float64.itemsize, x.dtype.itemsize] if reduction == 1 else whole


def _cross_entropy_of_two(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """A mean is made beside the losses, by a division, and copied into their storage; a sum likewise."""
    x, reduction = inputs[0], inputs[3]
    result = [x.dtype.itemsize] if reduction else []
    return [*result, torch.float64.itemsize, x.dtype.itemsize] if reduction == 1 else result


def _cross_entropy_of_two_backward(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """That of a mean is divided by a number."""
    x, reduction = inputs[1], inputs[4]
    return [torch.float64.itemsize, x.dtype.itemsize] if reduction == 1 else []


def _median(inputs: Sequence[Any], _: int) -> Sequence[int]:
    """A copy, in which it is looked for."""
    return [inputs[0].nbytes]


def _columns(
    x: Operand, weight: Operand, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]
) -> Sequence[int]:
    if set(kernel) == set(stride) == {1} and set(pad) == {0}:
        return []
    sides = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], pad, kernel, stride, strict=True)]
    return [x.shape[0] * prod(weight.shape[1:]) * prod(sides) * x.dtype.itemsize]


ELEMENTWISE = (
    *("add", "sub", "mul", "div", "pow", "rsub", "maximum", "minimum", "fmod", "remainder", "atan2", "lerp"),
    *("add_", "sub_", "mul_", "div_", "pow_", "addcmul", "addcdiv"),
)
ON_CPU: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _casts),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), _compared),
    "where": _where,
    "copy_": _copy,
    "gather": _element_moves,
    **dict.fromkeys(("scatter", "scatter_", "scatter_add", "scatter_add_"), _scatter),
    "index_add_": _index_add,
    "embedding_dense_backward": _embedding_backward,
    "_slow_conv2d_forward": _conv2d,
    "_slow_conv2d_backward": _conv2d_backward,
    "slow_conv_transpose2d": _conv_transpose2d,
    "native_group_norm_backward": _group_norm_backward,
    **dict.fromkeys(("mse_loss", "smooth_l1_loss", "huber_loss"), _pointwise_loss),
    "binary_cross_entropy": _cross_entropy_of_two,
    "binary_cross_entropy_backward": _cross_entropy_of_two_backward,
    "median": _median,
    "bincount": _bincount,
    "sort": _sort,
    "sum": _sum,
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "native_layer_norm_backward": _layer_norm_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _flash,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
}
# The symbolic machine's own rules. What else CUDA's kernels have (cuDNN's workspaces, buffers of sorts) neither knows.
ON_CUDA: dict[str, Rule] = {
    "_scaled_dot_product_flash_attention_backward": _flash_backward_on_cuda,
    "_scaled_dot_product_efficient_attention_backward": _efficient_backward_on_cuda,
}
KERNELS = {"cpu": ON_CPU, "cuda": ON_CUDA}
