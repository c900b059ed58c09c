"""A mixture of attention heads; `trainer.model.expert_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.indexing import add_rows, argsort, grouped_product, index_select
from estimator.eager.views import cast, repeat_all, reshape, split, transpose, unsqueeze, view
from estimator.models.attention import attend
from estimator.models.experts import Router, sort_by_expert
from estimator.models.layers import Linear, Module, dropout
from estimator.models.positions import rotate_part

if TYPE_CHECKING:
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import Recipe


class ExpertAttention(Module):
    """Each token's queries are the k heads of each of its K experts, h = K k."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "attention")
        self.recipe, size = recipe, machine.shapes.letters
        self.h, self.k_heads, self.e, E, d = size["h"], size["k"], size["e"], size["E"], size["d"]
        self.wide = machine.product((self.k_heads, self.e))
        self.queries, self.outputs = self.parameter(E, self.wide, d), self.parameter(E, d, self.wide)
        self.out_bias = self.parameter(d)
        with self.inside():
            self.router = self.child(Router(machine, recipe))
            self.kv = self.child(Linear(machine, "kv", d, 2 * self.wide, bias=False))

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        query_scale: Tensor | None,
    ) -> Tensor:
        machine, (B, T, d) = x.machine, x.shape
        v.flat = reshape(x, (machine.product((B, T)), d))
        v.weights, v.experts = self.router(v.flat)
        K, E = self.router.K, self.router.E
        v.count, v.order, v.token = sort_by_expert(v.experts, E)
        v.q = grouped_product(index_select(v.flat, v.token), self.queries, v.count)
        v.q = view(index_select(v.q, argsort(v.order)), (B, T, self.h, self.e))
        v.k, v.v = split(self.kv(x), (self.wide, self.wide))
        v.k = view(v.k, (B, T, self.k_heads, self.e))
        v.v = transpose(view(v.v, (B, T, self.k_heads, self.e)), 1, 2)
        if cos is not None and sin is not None:
            pairs = self.recipe.parts.positions.pairs
            v.q = rotate_part(v.q, cos, sin, pairs)
            v.k = rotate_part(v.k, cos, sin, pairs)
        if query_scale is not None:
            v.q = ops.mul(v.q, query_scale)
        v.q, v.k = transpose(v.q, 1, 2), transpose(v.k, 1, 2)
        keys = repeat_all(v.k, 1, K).hold()
        v.k, v.v = keys, repeat_all(v.v, 1, K)
        keys.drop()
        v.y = attend(v.q, v.k, v.v, mask, self.recipe, bias)
        pairs_made = machine.product((B, T, K))
        v.rows = index_select(reshape(transpose(v.y, 1, 2), (pairs_made, self.wide)), v.order)
        v.y = grouped_product(v.rows, self.outputs, v.count)
        weight = unsqueeze(index_select(view(v.weights, (pairs_made,)), v.order), 1)
        v.y = ops.mul(v.y, cast(weight, v.y.dtype))
        v.y = ops.add(add_rows(v.y, v.token, (machine.product((B, T)), d)), self.out_bias)
        return dropout(view(v.y, (B, T, d)), self.recipe)
