"""What scaled_dot_product_attention runs besides flash kernels: aten/src/ATen/native/transformers/attention.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autocast import lower
from estimator.eager.autograd import Context, attach, record
from estimator.eager.letters import ONE
from estimator.eager.linalg import matmul
from estimator.eager.ops import added, additive_mask, causal_mask, dropout, elementwise, with_number
from estimator.eager.tensor import BOOL, FLOAT32, Locals, Tensor, empty_like, op
from estimator.eager.views import cast, clone, expand, transpose, unsqueeze, view

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients


@op
def attention_math(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, *, drops: bool, repeats: bool = True
) -> Tensor:
    """`_scaled_dot_product_attention_math`: in float32 whatever comes in.

    Of a boolean mask `seen` every call makes one to add, in the inputs' dtype; without one it is causal, and every call
    makes its own in float32. Keys and values of fewer heads are repeated (`enable_gqa`), or
    those of a single one, without that, expanded by its products.
    """
    numbers = seen is not None and seen.dtype != BOOL
    q, k, v, seen = lower(q, k, v, seen) if numbers else (*lower(q, k, v), seen)
    with q.machine.autocast(None), Locals() as c:  # inside an operator that it casts for, autocast is off
        c.mask = additive_mask(seen, q.dtype) if seen is not None and seen.dtype == BOOL else seen
        return _attention_math(q, k, v, c.mask, drops=drops, repeats=repeats)


@op
def _attention_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, drops: bool, repeats: bool) -> Tensor:
    dtype = q.dtype
    with Locals() as c:
        c.q, c.k, c.v = (cast(x, FLOAT32) for x in (q, k, v))
        c.query = _scaled(c.q)
        c.mask = additive_mask(causal_mask(q, q.shape[-2]), FLOAT32) if mask is None else mask
        if repeats and q.shape[1] is not k.shape[1]:
            groups = q.machine.shapes.letters["g"]
            c.key_expanded, c.value_expanded = (_repeat_interleave(x, groups) for x in (c.k, c.v))
        else:
            c.key_expanded, c.value_expanded = c.k, c.v
        c.attn = matmul(c.query, _scaled(transpose(c.key_expanded, -2, -1)))
        c.attn = added(c.attn, c.mask)
        c.attn = _safe_softmax(c.attn)
        if drops:
            c.attn = dropout(c.attn)
        c.returned = cast(c.attn, dtype)  # the weights, which scaled_dot_product_attention throws away
        return cast(matmul(c.attn, c.value_expanded), dtype)


@op
def _repeat_interleave(x: Tensor, times: Size) -> Tensor:
    """x.repeat_interleave(times, 1) of four dimensions: a copy, of one head too."""
    b, k, t, e = x.shape
    return view(clone(expand(unsqueeze(x, 2), (b, k, times, t, e))), (b, x.machine.product((k, times)), t, e))


@op
def _scaled(x: Tensor) -> Tensor:
    """X * Scalar in C++: unlike a Python expression, it saves no wrapped number."""
    node = record("MulBackward1", (x,), lambda _, grad: [with_number("mul", grad)])
    return attach(node, with_number("mul", x))


@op
def _safe_softmax(x: Tensor) -> Tensor:
    """A softmax whose rows that are masked whole come out as zeros, written over its result."""
    machine = x.machine

    def backward(c: Context, grad: Tensor) -> Gradients:
        return [elementwise("_softmax_backward_data", grad, c.saved[0])]

    node = record("SafeSoftmaxBackward0", (x,), backward)
    out = elementwise("_softmax", x)
    masked = empty_like(x, BOOL).hold()
    rows = machine.empty((*x.shape[:-1], ONE), BOOL).hold()
    zero = machine.empty(()).hold()
    machine.kernel("where", (rows, out), (out,))
    for t in (zero, rows, masked):
        t.drop()
    return attach(node, out, save=(out,))
