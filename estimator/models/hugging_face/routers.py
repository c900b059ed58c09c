"""Routers: rows of tokens -> logits, and each token's weights and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.indexing import gather_last, sum_last
from estimator.eager.letters import ONE, ceiling
from estimator.eager.linalg import linear
from estimator.eager.pointwise import sigmoid
from estimator.eager.routing import divide_in_place, opposite, put_number, sum_over, top_k_with_values
from estimator.eager.tensor import FLOAT32, empty_like
from estimator.eager.views import cast, expand, reshape, unsqueeze, view
from estimator.models.experts import Router

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import Recipe


class HFRouter(Router):
    """(N, d) -> logits (N, E), weights (N, K), experts (N, K)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        assert recipe.written is not None
        assert recipe.written.routed is not None
        self.routed_as = recipe.written.routed

    def forward(self, v: Locals, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        v.x = view(x, (x.machine.product(x.shape[:-1]), x.shape[-1]))
        ROUTERS[self.routed_as.router](self, v)
        return v.take("logits"), v.take("weights"), v.take("experts")


def softmax(router: HFRouter, v: Locals) -> None:
    """`MixtralTopKRouter`."""
    v.logits = linear(v.x, router.weight, router.bias)
    v.probabilities = ops.softmax(v.logits, FLOAT32)
    v.weights, v.experts = top_k_with_values(v.probabilities, router.K)
    if router.part.normalises:
        divide_in_place(v.weights, sum_last(v.weights))
    if router.routed_as.like_logits:
        v.weights = cast(v.weights, v.logits.dtype)


def sigmoids(router: HFRouter, v: Locals) -> None:
    """`DeepseekV3TopkRouter`."""
    assert router.correction is not None
    v.logits = linear(cast(v.x, FLOAT32), cast(router.weight, FLOAT32), None)
    v.scores = sigmoid(v.logits)
    v.choice = ops.add(v.scores, router.correction)
    in_best_groups(router, v)
    v.experts = chosen(v.choice, router.K)
    v.weights = gather_last(v.scores, v.experts)
    if router.part.normalises:
        v.denominator = ops.add_number(sum_last(v.weights))
        divide_in_place(v.weights, v.denominator)
    v.weights = ops.mul_number(v.weights)


def in_best_groups(router: HFRouter, v: Locals) -> None:
    """`v.choice`, minus infinity but in the groups whose two best add up to most."""
    rows, inside = v.choice.shape[0], ceiling(router.E, router.G)
    values, indices = top_k_with_values(view(v.choice, (rows, router.G, inside)), 2 * ONE)
    indices.discard()
    v.group_scores = sum_over(values, 2)
    v.group = chosen(v.group_scores, router.groups)
    v.group_mask = empty_like(v.group_scores)
    put_number(v.group_mask, v.group)
    v.mask = reshape(expand(unsqueeze(v.group_mask, 2), (rows, router.G, inside)), v.choice.shape)
    v.choice = ops.masked_fill(v.choice, opposite(v.mask))


def chosen(scores: Tensor, count: Size) -> Tensor:
    """scores.topk(count)[1]."""
    values, indices = top_k_with_values(scores, count)
    values.discard()
    return indices


ROUTERS = {"softmax": softmax, "sigmoid": sigmoids}
