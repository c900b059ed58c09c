"""Kernels of a recorded step, as the ledger has them: FLOPs, bytes and shapes from the operators that ran.

The rules are those of the symbolic machine: what a product is, what walks its operands how (`estimator.eager.tensor`).
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from estimator.eager import ledger
from estimator.eager.ledger import Gemm, Kernel, Storage
from estimator.eager.letters import ONE, ZERO, Size, constant
from estimator.eager.tensor import Dtype, access_of, leading_of
from estimator.timing.float8 import SCALED
from trainer.referee.recorder.log import Operand
from trainer.referee.recorder.rules import schemas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from estimator.eager.ledger import Where

    Product = Callable[[Sequence[Any]], tuple[Gemm, int]]

size = cache(constant)
NOTHING = ("_local_scalar_dense", "equal", "is_nonzero")  # answers to the host
WRITTEN_ONLY = ("zero_", "fill_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_")
INDEXED = (
    "gather",
    "index_select",
    "embedding",
    "index",
    "index_add_",
    "scatter_",
    "scatter_add_",
    "index_put_",
)  # rows
# What the ledger calls kernels that have another name by the CPU's dispatch.
NAMES = {
    "index_select": "embedding",
    "_scaled_dot_product_flash_attention_for_cpu": "flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "flash_attention_backward",
    "_scaled_dot_product_flash_attention": "flash_attention",
    "_scaled_dot_product_flash_attention_backward": "flash_attention_backward",
    "_scaled_dot_product_efficient_attention": "flash_attention",
    "_scaled_dot_product_efficient_attention_backward": "flash_attention_backward",
    "_fused_adam_": "_fused_adamw_",
}


ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
)


class Turn(NamedTuple):
    """When a kernel runs: its place, its micro-batch, whether a checkpoint runs it again."""

    where: Where
    micro_batch: int
    recompute: bool


class _Walked(NamedTuple):
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    dtype: Dtype


def kernel_of(
    name: str, inputs: Sequence[Any], results: Sequence[Any], turn: Turn, live: Mapping[int, Storage]
) -> Kernel | None:
    """The launch that an operator is; None of one that the device has no kernel for.

    Args:
        name: the operator, with its overload.
        inputs: what it was given (`Log.values`).
        results: what it returned.
        turn: when.
        live: storages by their number.
    """
    base = name.removeprefix("aten::").partition(".")[0]
    if base in NOTHING:
        return None
    reads, writes = list(dict.fromkeys(_reads(name, base, inputs))), [*_tensors(results)]
    if not writes:  # lists that are written where they are
        writes = [x for i in _written(name) for x in _tensors(inputs[i : i + 1])]
    if not writes or _counts_steps(writes, live):
        return None
    operands = [ledger.Operand(_storage(x, live), size(x.nbytes), written=False) for x in reads]
    operands += [ledger.Operand(_storage(x, live), size(x.nbytes), written=True) for x in writes]
    gemm, again = PRODUCTS[base](inputs) if base in PRODUCTS else (None, 0)
    flops = ZERO if gemm is None else size(2 * prod(int(n.number or 0) for n in (gemm.b, gemm.m, gemm.n, gemm.k)))
    access, leading = _ways(tuple(map(_form, reads)), tuple(map(_form, writes)), gemm is not None)
    return Kernel(
        _name(base, inputs, reads, writes),
        turn.where,
        flops,
        ZERO,
        size(sum(x.nbytes for x in (*reads, *writes))),
        gemm,
        turn.recompute,
        turn.micro_batch,
        flops if turn.recompute else size(again),
        tuple(operands),
        access,
        leading,
    )


def _name(base: str, inputs: Sequence[Any], reads: Sequence[Operand], writes: Sequence[Operand]) -> str:
    if base == "copy_":
        return "_to_copy" if reads and reads[0].dtype != writes[0].dtype else "clone"
    found = NAMES.get(base, base)
    masked = found.startswith("flash") and len(list(_tensors(inputs))) > (3 if found == "flash_attention" else 6)
    return found.replace("flash", "masked") if masked else found


def _tensors(values: Sequence[Any]) -> Iterator[Operand]:
    """The tensors among them and in their lists; a Python number is none."""
    for x in values:
        if isinstance(x, Operand):
            if not x.is_number:
                yield x
        elif isinstance(x, list):
            yield from _tensors(x)


@cache
def _written(name: str) -> tuple[int, ...]:
    """Positions of the arguments that an operator writes."""
    arguments = schemas()[name].arguments if name in schemas() else ()
    return tuple(i for i, x in enumerate(arguments) if x.alias_info is not None and x.alias_info.is_write)


@cache
def _outputs(name: str) -> tuple[int, ...]:
    """Those that are there for the result alone."""
    arguments = schemas()[name].arguments if name in schemas() else ()
    return tuple(i for i in _written(name) if arguments[i].is_out)


def _counts_steps(writes: Sequence[Operand], live: Mapping[int, Storage]) -> bool:
    """An optimizer's count of steps, a number that stays on the host."""
    found = [live.get(x.storage) for x in writes]
    return all(x is not None and x.category is ledger.Category.OPTIMIZER for x in found) and not any(
        x.shape for x in writes
    )


def _reads(name: str, base: str, inputs: Sequence[Any]) -> list[Operand]:
    if base in INDEXED:
        return list(_tensors(inputs[1:]))
    left = _written(name) if base in WRITTEN_ONLY else _outputs(name)
    return list(_tensors([x for i, x in enumerate(inputs) if i not in left]))


def _storage(x: Operand, live: Mapping[int, Storage]) -> Storage:
    found = live.get(x.storage)
    if found is None:  # made before the recording
        return Storage(size(x.nbytes), x.dtype.itemsize, ledger.Category.BUFFER, _NOWHERE)
    found.itemsize = x.dtype.itemsize
    return found


_NOWHERE = ledger.Where(ledger.Phase.SETUP, "", None, "")


@cache
def _dtype(dtype: Any) -> Dtype:
    return Dtype(str(dtype).removeprefix("torch."), dtype.itemsize)


def _form(x: Operand) -> tuple[Any, ...]:
    return x.shape, x.stride, x.dtype


@cache
def _walked(shape: tuple[int, ...], stride: tuple[int, ...], dtype: Any) -> _Walked:
    return _Walked(tuple(map(size, shape)), tuple(map(size, stride)), _dtype(dtype))


@cache
def _ways(reads: tuple[Any, ...], writes: tuple[Any, ...], product: bool) -> tuple[str, tuple[Size, ...]]:
    """How a kernel walks what has these shapes, strides and dtypes; of a product the steps from row to row."""
    walked, written = ([_walked(*x) for x in side] for side in (reads, writes))
    if product:
        return "plain", leading_of(walked[:2], written[:1])
    return access_of(walked, written), ()


def _gemm(b: int, m: int, n: int, k: int) -> Gemm:
    return Gemm(ONE if b == 1 else size(b), size(m), size(n), size(k))


def _matrices(a: Operand, b: Operand) -> tuple[Gemm, int]:
    """(m, k) x (k, n), or batches of them; a vector is a matrix of one column."""
    batch = a.shape[0] if len(a.shape) == 3 else 1
    rows = a.shape[-2] if len(a.shape) > 1 else 1
    return _gemm(batch, rows, b.shape[-1] if len(b.shape) > 1 else 1, a.shape[-1]), 0


def _grouped(inputs: Sequence[Any]) -> tuple[Gemm, int]:
    """`_grouped_mm`: groups of rows of one matrix, or of what is summed over, of the mean size."""
    a, b = inputs[:2]
    if len(a.shape) == 2 and len(b.shape) == 3:
        groups = b.shape[0]
        return Gemm(size(groups), size(a.shape[0]) / groups, size(b.shape[-1]), size(a.shape[1]), "m"), 0
    if len(a.shape) == 2:
        groups = inputs[2].shape[0] if isinstance(inputs[2], Operand) else 1
        return Gemm(size(groups), size(a.shape[0]), size(b.shape[-1]), size(a.shape[1]) / groups, "k"), 0
    return _matrices(a, b)


def _attention(inputs: Sequence[Any]) -> tuple[Gemm, int]:
    """Two products of T x T x e a head, the masked half counted."""
    q, k = inputs[:2]
    *heads, t, e = q.shape
    return _gemm(prod(heads), t, k.shape[-2], 2 * e), 0


def _attention_backward(inputs: Sequence[Any]) -> tuple[Gemm, int]:
    """Five products, of which the scores repeat forward's."""
    _, q, k = inputs[:3]
    *heads, t, e = q.shape
    return _gemm(prod(heads), t, k.shape[-2], 5 * e), 2 * prod(heads) * t * k.shape[-2] * e


def _convolution(inputs: Sequence[Any]) -> tuple[Gemm, int]:
    """As the matrix product on columns that it is: (O, C h w) x (C h w, H' W') of each image."""
    x, weight, kernel, _, stride, pad = inputs[:6]
    return _gemm(x.shape[0], weight.shape[0], _places(x, kernel, stride, pad), prod(weight.shape[1:])), 0


def _convolution_backward(inputs: Sequence[Any]) -> tuple[Gemm, int]:
    """Of the input and of the weight, as many as are wanted."""
    grad, _, weight, *_, wanted = inputs
    products = sum(bool(x) for x in wanted[:2])
    return _gemm(grad.shape[0], weight.shape[0], prod(grad.shape[2:]), products * prod(weight.shape[1:])), 0


def _transposed(inputs: Sequence[Any]) -> tuple[Gemm, int]:
    x, weight = inputs[:2]
    return _gemm(x.shape[0], prod(weight.shape[1:]), prod(x.shape[2:]), weight.shape[0]), 0


def _places(x: Operand, kernel: Sequence[int], stride: Sequence[int], pad: Sequence[int]) -> int:
    return prod((n + 2 * p - k) // s + 1 for n, p, k, s in zip(x.shape[2:], pad, kernel, stride, strict=True))


PRODUCTS: dict[str, Product] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", SCALED), lambda x: _matrices(x[0], x[1])),
    **dict.fromkeys(("addmm", "addmm_", "baddbmm", "baddbmm_", "addmv"), lambda x: _matrices(x[1], x[2])),
    "_grouped_mm": _grouped,
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys((f"{name}_backward" for name in ATTENTION), _attention_backward),
    "_slow_conv2d_forward": _convolution,
    "_slow_conv2d_backward": _convolution_backward,
    "slow_conv_transpose2d": _transposed,
}
