"""Matrix products and what is made of them: linear layers, batched products, the attention kernels."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager.autocast import lower
from estimator.eager.autograd import Context, attach, record
from estimator.eager.checkpointing import not_repeated
from estimator.eager.ledger import Gemm
from estimator.eager.letters import ONE, ZERO, Function, constant, rounded_up, smaller
from estimator.eager.letters import n as threads
from estimator.eager.ops import added, additive_mask, with_number
from estimator.eager.tensor import FLOAT32, UINT64, Locals, Tensor, empty_like, is_transposed, op
from estimator.eager.views import expand, reshape, slice_last, transpose, unsafe_view, unsqueeze, view

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.eager.autograd import Backward
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Machine, Shape


TINY = 400  # multiplications of a matrix in a batch, from which on the CPU does not use its own loop


@op
def product(name: str, a: Tensor, b: Tensor, added: Callable[[], Tensor] | None = None) -> Tensor:
    """One GEMM, (m, k) x (k, n) or (b, m, k) x (b, k, n), into a new contiguous tensor.

    What `added` makes is read too; a selective checkpoint that has kept the result makes it no second time.
    """
    batch = a.shape[0] if len(a.shape) == 3 else ONE
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]

    def compute() -> tuple[Tensor]:
        more = [] if added is None else [added().hold()]
        out = a.machine.empty((*a.shape[:-1], n), a.dtype)
        a.machine.kernel(name, (a, b, *more), (out,), gemm=Gemm(batch, m, n, k))
        for x in more:
            x.drop()
        return (out,)

    return compute()[0] if name == "bmm" else not_repeated(a.machine, compute)[0]


def _factors(c: Context, *, second_first: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """The saved factors of a product: each is there if the other wants a gradient.

    Inputs are saved in the order of their names in derivatives.yaml: mat2 before self, but mat1 before mat2.
    """
    saved = iter(c.saved)
    needs_a, needs_b = c.needs[-2:]
    if second_first:
        b = next(saved) if needs_a else None
        return next(saved) if needs_b else None, b
    a = next(saved) if needs_b else None
    return a, next(saved) if needs_a else None


def _second_gradient(grad: Tensor, a: Tensor, name: str, *, column_major: bool) -> Tensor:
    """a^T grad; for a column-major second factor the product is transposed (`mm_mat2_backward`)."""
    if column_major:
        return transpose(product("mm", transpose(grad, 0, 1), a), 0, 1)
    return product(name, transpose(a, -2, -1), grad)


def _product_backward(name: str, b: Tensor) -> Backward:
    """Backward of mm and bmm: the second factor's gradient first. A node knows b's strides, saved or not."""
    column_major = name == "mm" and is_transposed(b)

    def backward(c: Context, grad: Tensor) -> Gradients:
        a, b = _factors(c)
        c.grad_b = _second_gradient(grad, a, name, column_major=column_major) if a is not None else None
        grad_a = product(name, grad, transpose(b, -2, -1)) if b is not None else None
        return [grad_a, c.take("grad_b") if a is not None else None]

    return backward


def _saved_factors(a: Tensor, b: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of a and b, in this order, those that the other's gradient needs."""
    return a if b.requires_grad else None, b if a.requires_grad else None


@op
def mm(a: Tensor, b: Tensor) -> Tensor:
    """(m, k) x (k, n)."""
    node = record("MmBackward0", (a, b), _product_backward("mm", b), _saved_factors(b, a))
    return attach(node, product("mm", a, b))


@op
def bmm(a: Tensor, b: Tensor) -> Tensor:
    """(b, m, k) x (b, k, n)."""
    node = record("BmmBackward0", (a, b), _product_backward("bmm", b), _saved_factors(b, a))
    return attach(node, product("bmm", a, b))


@op
def baddbmm(base: Tensor, a: Tensor, b: Tensor, *, scales: bool) -> Tensor:
    """base + alpha a b of (b, m, k) x (b, k, n), `base` without a gradient; with `scales` alpha is not 1.

    The CPU multiplies one matrix after the other where a product is not tiny (`bmm_out_or_baddbmm_` in
    aten/src/ATen/native/LinearAlgebra.cpp), each through a copy of a factor that lies neither by rows nor by columns.
    """
    machine = base.machine
    batch, m, k = a.shape
    n = b.shape[-1]

    def one_by_one(x: Tensor) -> None:
        scattered = x.stride[1] != ONE and x.stride[2] != ONE
        if machine.device == "cpu" and scattered and machine.at_most(constant(TINY), machine.product((m, k, n))):
            machine.empty((m, k), x.dtype).discard()

    def scaled(grad: Tensor) -> Tensor:
        if not scales:
            return grad
        with Locals() as v:
            v.grad = grad
            return with_number("mul", v.grad)

    def backward(c: Context, grad: Tensor) -> Gradients:
        a, b = c.saved
        c.grad_a = scaled(product("bmm", grad, transpose(b, -2, -1)))
        grad_b = product("bmm", transpose(a, -2, -1), grad)
        one_by_one(a)
        return [None, c.take("grad_a"), scaled(grad_b)]

    node = record("BaddbmmBackward0", (base, a, b), backward, (a, b))
    out = machine.empty(base.shape, base.dtype)
    one_by_one(a)
    machine.kernel("baddbmm", (base, a, b), (out,), gemm=Gemm(batch, m, n, k))
    return attach(node, out)


@op
def addmm(bias: Tensor, a: Tensor, b: Tensor, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Bias + a b; the kernel reads what `read` makes of the bias, if anything.

    Backward goes first factor, second factor, the bias's is the incoming one, which the engine sums.
    """
    column_major = is_transposed(b)

    def backward(c: Context, grad: Tensor) -> Gradients:
        a, b = _factors(c, second_first=False)
        c.grad_a = product("mm", grad, transpose(b, -2, -1)) if b is not None else None
        grad_b = _second_gradient(grad, a, "mm", column_major=column_major) if a is not None else None
        return [grad, c.take("grad_a") if b is not None else None, grad_b]

    node = record("AddmmBackward0", (bias, a, b), backward, _saved_factors(a, b))
    return attach(node, product("addmm", a, b, lambda: bias if read is None else read(bias)))


@op
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """F.linear: of a matrix a product; of three dimensions folded to one, multiplied, unfolded.

    A bias goes into the same kernel if x is contiguous; of a DTensor the kernel reads what `read` makes of it.
    """
    x, weight, bias = lower(x, weight, bias)
    return _linear(x, weight, bias, read)


@op
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, read: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    if len(x.shape) == 2:
        w_t = transpose(weight, 0, 1)
        return mm(x, w_t) if bias is None else addmm(bias, x, w_t, read)
    flat = (x.machine.product(x.shape[:-1]), x.shape[-1])
    out = (*x.shape[:-1], weight.shape[0])
    if bias is not None and x.is_contiguous:
        return view(addmm(bias, view(x, flat), transpose(weight, 0, 1), read), out)
    assert read is None or bias is None, "what comes out of a DTensor's rows is contiguous"
    y = unsafe_view(_fold_mm(x, flat, weight), out) if _folds(x, weight) else _batched(x, weight)
    return added(y, bias) if bias is not None else y


def _folds(x: Tensor, weight: Tensor) -> bool:
    """`should_fold` in aten/src/ATen/native/LinearAlgebra.cpp: with a copy only where the matrix wants a gradient."""
    steps = zip(x.stride[:-2], x.stride[1:-1], x.shape[1:-1], strict=True)
    return weight.requires_grad or all(wide == x.machine.product((step, n)) for wide, step, n in steps)


@op
def _batched(x: Tensor, weight: Tensor) -> Tensor:
    """A product for each sequence with the same matrix."""
    w_t = transpose(weight, 0, 1)
    return bmm(x, expand(unsqueeze(w_t, 0), (x.shape[0], *w_t.shape)))


def _fold_mm(x: Tensor, flat: Shape, weight: Tensor) -> Tensor:
    w_t = transpose(weight, 0, 1)
    return mm(reshape(x, flat), w_t)


@op
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """(B, h, m, k) @ (B, h, k, n): both folded to three dimensions, which copies what is not contiguous enough.

    One of a single head is expanded to as many as the other has.
    """
    return _matmul(*lower(a, b))


@op
def _matmul(a: Tensor, b: Tensor) -> Tensor:
    batch = a.machine.product(a.shape[:-2])
    left = reshape(a, (batch, *a.shape[-2:])).hold()
    if b.shape[:-2] != a.shape[:-2]:
        b = expand(b, (*a.shape[:-2], *b.shape[-2:]))
    right = reshape(b, (batch, *b.shape[-2:])).hold()
    try:
        return unsafe_view(bmm(left, right), (*a.shape[:-1], b.shape[-1]))
    finally:
        right.drop()
        left.drop()


# The tiles of fused attention. On the CPU (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp): 256, 64 or 32 query rows
# from 768, from 192 and below, 512 key rows, never more than there are. On CUDA, elements of a head's dq in the
# workspace of the memory-efficient kernel, in tiles with 4 words of locks: 64 x 64 for heads of up to 64, 128 x 128 (in
# fp32 128 x 64) for those of up to 128 and 128 x 64 beyond, on devices whose shared memory holds them, as A100's and
# H100's does (mem_eff_attention/kernel_backward.h, workspace_elements_gq, and generate_kernels.py). What 16-bit heads
# wider than 128 keep of dk and dv is left out: a few tiles a head. Flash's dq has columns in multiples of 32, beyond
# 128 of 64 (flash_api.cpp).
HEAD_ALIGNMENT = 8  # aten/src/ATen/native/transformers/attention.cpp, `pad_last_dim`, of flash on CUDA
MASK_ALIGNMENT = 8  # aten/src/ATen/native/transformers/attention.cpp, mem_eff_alignment


def _tile_rows(t: Any) -> Any:
    return np.minimum(np.where(t >= 768, 256, np.where(t >= 192, 64, 32)), t)


def _tile_columns(width: Any) -> Any:
    return np.where(width <= 128, -(-width // 32) * 32, -(-width // 64) * 64)


def _dq_tiles(t: Any, width: Any, wide: int) -> Any:
    rows = np.where(width <= 64, 64, 128)
    columns = np.where((width <= 64) | (width > 128), 64, wide)
    return -(-t // rows) * -(-width // columns) * (rows * columns + 4)


tile_rows = Function(
    _tile_rows, "tile_rows({0})", "query rows in one tile of the CPU's flash attention", symbol="s", usual=("T",)
)
tile_columns = Function(
    _tile_columns,
    "tile_columns({0})",
    "head_dim rounded up to 32, above 128 to 64: columns in the scratch of CUDA's flash attention in backward",
    symbol="e_32",
    usual=("e",),
)
half_tiles = Function(
    partial(_dq_tiles, wide=128),
    "half_tiles({0}, {1})",
    "elements of a head's dq in the backward of CUDA's memory-efficient attention in 16 bits, in whole tiles",
    symbol="a_16",
    usual=("T", "e"),
)
wide_tiles = Function(
    partial(_dq_tiles, wide=64),
    "wide_tiles({0}, {1})",
    "elements of a head's dq in the backward of CUDA's memory-efficient attention in fp32, in whole tiles",
    symbol="a_32",
    usual=("T", "e"),
)


def tile_keys(t: Size) -> Size:
    """Key rows in one tile of the CPU's flash attention."""
    return smaller(512, t)


def flash_scratch(queries: Shape) -> tuple[Shape, Shape]:
    """softmax_d and dq_accum in the backward of CUDA's flash attention on (B, h, T, e), in fp32 and whole tiles.

    `mha_bwd` of aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp.
    """
    b, h, t, e = queries
    rows = rounded_up(t, 128)
    return (b, h, rows), (b, rows, h, tile_columns(e))


def efficient_scratch(queries: Shape, *, wide: bool) -> tuple[Shape, Shape]:
    """delta, a number a row, and the tiles of dq with their locks, in the backward of the memory-efficient kernel.

    Both are in fp32; tiles of `wide` inputs, in fp32, are others than those of half precision.
    aten/src/ATen/native/transformers/cuda/attention_backward.cu.
    """
    b, h, t, e = queries
    tiles = wide_tiles if wide else half_tiles
    return (b, h, t), (b, h, tiles(t, e))


@op
def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor | None = None,
    *,
    drops: bool,
    efficient: bool = False,
    pads: bool = False,
) -> Tensor:
    """F.scaled_dot_product_attention by a fused kernel: the scores never exist. Causal, or with a mask of what is seen.

    The CPU's flash and CUDA's take keys and values of fewer heads (`enable_gqa`).

    Saves its inputs, its output and the log-sum-exp of each row. On the CPU each thread has a scratch for one tile; on
    CUDA the backward of flash adds up dq in fp32. `efficient` is CUDA's memory-efficient kernel, which takes fp32 and
    masks too, and whose values may have a width of their own, which is the result's. Of a boolean mask every call makes
    one to add, in the inputs' dtype, and saves it; autocast casts one of numbers; the memory-efficient kernel `pads`
    rows that are no multiple of 8 elements in a copy (`preprocess_mask` in attention.cpp).

    CUDA's flash saves the generator's state in CUDA memory, with dropout or without: seed and offset in one tensor, and
    one that nothing uses. The memory-efficient kernel's are on the CPU, unless a CUDA graph is captured. Heads whose
    width is no multiple of 8 are padded to one for flash, and what is too much of its result cut off
    (`pad_last_dim<8, false>` and `post_process_flash_output` in attention.cpp).
    """
    with Locals() as c:
        numbers = seen is not None and seen.dtype.is_floating
        q, k, v, c.mask = lower(q, k, v, seen) if numbers else (*lower(q, k, v), None)
        width, flash = q.shape[-1], q.machine.device == "cuda" and not efficient
        if flash and not q.machine.divides(constant(HEAD_ALIGNMENT), width):
            c.q, c.k, c.v = (_wider(x) for x in (q, k, v))
            return slice_last(_fused_attention(c.q, c.k, c.v, None, drops=drops, efficient=False), width)
        if seen is not None and not numbers:
            c.mask = additive_mask(seen, q.dtype)
        if pads:
            c.mask = _padded(c.mask)
        if efficient and c.mask is not None and q.machine.saves_on_host:
            c.mask = _for_every_head(c.mask, q, k)
        return _fused_attention(q, k, v, c.mask, drops=drops, efficient=efficient)


def _for_every_head(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """A view of T x T for each head of each sequence (`preprocess_mask` expands it): on the host it is saved whole."""
    own = zip(mask.shape, mask.stride, strict=True)
    stride = tuple(ZERO if n == ONE else s for n, s in own)
    return mask.view((*q.shape[:3], k.shape[2]), (*(ZERO,) * (4 - len(stride)), *stride))


@op
def _wider(x: Tensor) -> Tensor:
    """at::pad of the last dimension to a multiple of 8; backward is a copy of the gradient's part."""
    shape = x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        part = grad.view(shape, grad.stride).hold()
        out = empty_like(part)
        grad.machine.kernel("clone", (part,), (out,))
        part.drop()
        return [out]

    node = record("ConstantPadNdBackward0", (x,), backward)
    out = x.machine.empty((*shape[:-1], rounded_up(shape[-1], HEAD_ALIGNMENT)), x.dtype)
    x.machine.kernel("constant_pad_nd", (x,), (out,))
    return attach(node, out)


@op
def _padded(mask: Tensor) -> Tensor:
    """pad_bias: rows of T elements in a storage whose rows are a multiple of 8."""
    out = mask.machine.empty((*mask.shape[:-1], rounded_up(mask.shape[-1], MASK_ALIGNMENT)), mask.dtype)
    mask.machine.kernel("constant_pad_nd", (mask,), (out,))
    return out


@op
def _fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, drops: bool, efficient: bool) -> Tensor:
    machine = q.machine
    b, h, t, width = q.shape

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.dq, c.dk, c.dv = (_heads_inside(x) for x in c.saved[:3])
        if machine.device == "cpu":  # a tile of scores and one of their gradient for each thread, and one row of sums
            rows, keys = tile_rows(t), tile_keys(k.shape[2])
            c.scratch = machine.empty((2 * threads, rows, keys), FLOAT32)
            if grad.dtype.itemsize < FLOAT32.itemsize:  # both tiles in the inputs' dtype
                c.narrow = machine.empty((2 * threads, rows, keys), grad.dtype)
            c.sums = machine.empty((rows,), FLOAT32)
        elif efficient:
            c.delta, c.tiles = (
                machine.empty(x, FLOAT32) for x in efficient_scratch(q.shape, wide=grad.dtype == FLOAT32)
            )
        else:
            c.sums, c.accumulated = (machine.empty(x, FLOAT32) for x in flash_scratch(q.shape))
            if k.shape[1] is not h:  # gradients of keys and values for every head, which are then summed
                c.dk_expanded, c.dv_expanded = (machine.empty((b, k.shape[2], h, width), k.dtype) for _ in range(2))
        _attention_kernel(f"{name}_backward", (grad, *c.saved[:read]), (c.dq, c.dk, c.dv), products=5, again=1)
        return [c.take("dq"), c.take("dk"), c.take("dv")]

    inputs = (q, k, v) if mask is None else (q, k, v, mask)
    name, read = ("flash_attention" if mask is None else "masked_attention"), len(inputs) + 2
    node = record("ScaledDotProductFlashAttentionBackward0", (q, k, v), backward, inputs)

    def compute() -> tuple[Tensor, ...]:
        out = _heads_inside(q, v.shape[-1]) if efficient else empty_like(q)
        lse = machine.empty((b, rounded_up(t, 32) if efficient else t, h), FLOAT32)
        if machine.device == "cpu":  # a tile of scores, its rows' maximum and sum, and a tile of the output
            n, s, w = threads, tile_rows(t), tile_keys(k.shape[2])
            tile = machine.empty((n * s * w + 2 * n * s + machine.product((n, s, width)),), FLOAT32).hold()
            if q.dtype.itemsize < FLOAT32.itemsize:  # the tile of scores in the inputs' dtype, to multiply with v
                machine.empty((n, s, w), q.dtype).discard()
            tile.drop()
        state = _generator_state(machine, drops=drops) if machine.device == "cuda" and not efficient else ()
        _attention_kernel(name, inputs, (out, lse), products=2)
        return out, lse, *state

    out, *rest = results = not_repeated(machine, compute)
    attach(node, *results, save=results)
    for x in rest:
        x.discard()
    return out


def _generator_state(machine: Machine, *, drops: bool) -> tuple[Tensor, Tensor]:
    """`rng_state` and `_unused` of flash_api.cpp's mha_fwd; with dropout the first is made anew."""
    state, unused = machine.empty((2 * ONE,), UINT64), machine.empty((), UINT64)
    if drops:
        state.hold()
        again = machine.empty((2 * ONE,), UINT64)
        state.drop()
        return again, unused
    return state, unused


def _heads_inside(x: Tensor, width: Size | None = None) -> Tensor:
    """A new tensor of x's shape (B, h, T, e), or of another `width`, stored as (B, T, h, e)."""
    b, h, t, e = (*x.shape[:3], width or x.shape[3])
    stride = x.machine.contiguous((b, t, h, e))
    return x.machine.empty((b, h, t, e), x.dtype, stride=(stride[0], stride[2], stride[1], stride[3]))


def _attention_kernel(
    name: str, reads: Sequence[Tensor], writes: Sequence[Tensor], products: int, again: int = 0
) -> None:
    """A fused kernel of `products` matrix products of T x T x e a head, the masked half counted, `again` anew."""
    q, k = reads[1:3] if again else reads[:2]  # in backward the gradient comes first
    b, h, t, e = q.shape
    keys = k.shape[2]
    machine = reads[1].machine
    heads = machine.product((b, h))
    repeated = 2 * again * machine.product((heads, t, keys, e))
    machine.kernel(name, reads, writes, gemm=Gemm(heads, t, keys, products * e), repeated=repeated)
