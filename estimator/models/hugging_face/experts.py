"""Mixtures of experts: their blocks, and `grouped_mm_experts_forward`, which is how transformers runs experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.eager import ops
from estimator.eager.indexing import whole_number_divided
from estimator.eager.pointwise import clamp, sigmoid
from estimator.eager.routing import (
    grouped_linear,
    histogram,
    index_rows,
    inverse,
    running_sum,
    sort,
    sum_over,
)
from estimator.eager.tensor import FLOAT32, INT32, Locals, arguments, converted
from estimator.eager.views import cast, reshape, slice_last, split, transpose, unsqueeze, view
from estimator.models.experts import Experts, SparseFeedForward
from estimator.models.feed_forward import gated
from estimator.models.hugging_face.routers import HFRouter

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class HFExperts(Experts):
    """Rows of tokens (N, d), their experts and weights (N, K) -> (N, d)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.transposed = recipe.routed.transposed
        for matrix in (self.gate_up, self.down) if self.transposed else ():
            matrix.shape = (matrix.shape[0], matrix.shape[2], matrix.shape[1])
            matrix.stride = machine.contiguous(matrix.shape)
        both = ((self.gate_up, self.gate_up_bias), (self.down, self.down_bias))
        self.owned = [x for pair in both for x in pair if x is not None]

    def forward(self, v: Locals, x: Tensor, experts: Tensor, weights: Tensor | None) -> Tensor:
        assert weights is not None
        machine, (rows, d), K = x.machine, x.shape, experts.shape[1]
        pairs = (experts.numel,)
        v.weights, v.ids = reshape(weights, pairs), reshape(experts, pairs)
        v.sorted, v.order = sort(v.ids)
        v.rows = index_rows(x, whole_number_divided(v.order))
        v.weights_sorted = index_rows(v.weights, v.order)
        v.binned = converted(v.sorted, FLOAT32 if machine.device == "cpu" else INT32)
        v.count = histogram(v.binned, self.E)
        v.ends = running_sum(v.count)
        v.bias = None if self.gate_up_bias is None else index_rows(self.gate_up_bias, v.sorted)
        v.y = self.product(v.rows, self.gate_up, v.ends, v.bias)
        v.y = self.gate(v.y)
        v.bias = None if self.down_bias is None else index_rows(self.down_bias, v.sorted)
        v.y = self.product(v.y, self.down, v.ends, v.bias)
        v.weighted = ops.mul(v.y, unsqueeze(v.weights_sorted, 1))
        v.inverse = inverse(v.order)
        v.weighted = index_rows(v.weighted, v.inverse)
        v.out = sum_over(view(v.weighted, (rows, K, d)), 1)
        v.out = cast(v.out, x.dtype)
        return v.take("out")

    def product(self, x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
        """`_grouped_linear`, of a weight (E, out, in); the matrices that are transposed are held as (E, in, out)."""
        with arguments((x, ends, bias)) as results, Locals() as v:
            v.out = grouped_linear(x, weight if self.transposed else transpose(weight, 1, 2), ends)
            if bias is not None:
                ops.add_in_place(v.out, bias)
            results.append(v.take("out"))
        return results[0]

    def gate(self, x: Tensor) -> Tensor:
        """`_default_apply_gate`, or gpt-oss' own."""
        with arguments((x,)) as results, Locals() as v:
            if self.activation != "clamped-swiglu":
                v.gate, v.up = split(x, (self.f, self.f))
                results.append(gated(v.gate, v.up, self.activation))
            else:
                v.gate, v.up = slice_last(x, self.f, step=2), slice_last(x, self.f, step=2)
                v.gate = clamp(v.gate, both=False)
                v.up = clamp(v.up, both=True)
                v.glu = ops.mul(v.gate, sigmoid(ops.mul_number(v.gate)))
                results.append(ops.mul(ops.add_number(v.up), v.glu))
        return results[0]


class HFSparseFeedForward(SparseFeedForward):
    """A block of experts, with a shared one where there is one."""

    build_router = HFRouter
    build_experts = HFExperts

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.routed_as = recipe.routed
        first = [getattr(self, name) for name in self.routed_as.order]
        self.beside = self.shared if self.routed_as.shared == "beside" else None
        self.owned.sort(key=lambda x: first.index(x) if x in first else len(first))

    def forward(self, v: Locals, x: Tensor) -> Any:
        """What comes out, and in some classes the weights of its experts."""
        v.y = self.combined(v, x)
        return (v.take("y"), v.take("weights")) if self.routed_as.returns_weights else v.take("y")

    def combined(self, v: Locals, x: Tensor) -> Tensor:
        """What the experts make of `x`; `v.weights` are theirs."""
        as_written = self.routed_as
        rows = (x.machine.product(x.shape[:-1]), x.shape[-1])
        routed_whole, shared_whole = ("router" in as_written.whole), ("shared" in as_written.whole)
        if self.shared is not None and as_written.shared == "first" and shared_whole:
            v.shared = self.shared(x)
        if not routed_whole:
            v.rows = view(x, rows)
        given = x if shared_whole else v.rows
        if self.shared is not None and as_written.shared == "first" and not shared_whole:
            v.shared = self.shared(given)
        v.logits, v.weights, v.experts = self.router(x if routed_whole else v.rows)
        if routed_whole:
            v.rows = view(x, rows)
        if self.shared is not None and as_written.shared == "between":
            v.shared = self.shared(given)
        v.y = self.experts(v.rows, v.experts, v.weights)
        if self.shared is not None and self.beside is None:
            if shared_whole:
                v.y = view(v.y, x.shape)
            if self.shared_gate is not None:
                v.shared = ops.mul(sigmoid(self.shared_gate(v.rows)), v.shared)
            if as_written.adds_fp32:
                v.wide = cast(v.y, FLOAT32)
                v.wide = ops.add(v.wide, cast(self.shared(given), FLOAT32))
                v.y = cast(v.wide, x.dtype)
                del v.wide
            elif as_written.shared == "named":
                v.shared = self.shared(view(v.rows, x.shape) if shared_whole else v.rows)
                v.y = ops.div_number(ops.add(v.y, v.shared)) if self.averages else ops.add(v.y, v.shared)
            else:
                v.y = ops.add(v.y, self.shared(given) if as_written.shared == "last" else v.shared)
        if self.out_norm is not None:
            v.y = self.out_norm(v.y)
        return v.take("y") if v.y.shape == x.shape else view(v.y, x.shape)
