"""Routers: rows of tokens -> logits, and each token's weights and experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.autocast import fp32
from estimator.eager.indexing import div, gather_last, sum_last
from estimator.eager.letters import ONE, ceiling
from estimator.eager.linalg import linear
from estimator.eager.pointwise import clamp, sigmoid
from estimator.eager.routing import divide_in_place, greatest_last, opposite, put_number, sum_over, top_k_with_values
from estimator.eager.tensor import FLOAT32, arguments, empty_like
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
        self.routed_as = recipe.routed

    def forward(self, v: Locals, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        bare = self.routed_as.router in ("chosen", "cohere2_moe", "gpt_oss")  # without a view of their own
        v.x = x if bare else view(x, (x.machine.product(x.shape[:-1]), x.shape[-1]))
        v.logits = self.logits(v.x)
        ROUTERS[self.routed_as.router](self, v)
        kinds = {"logits": v.logits.dtype, "inputs": x.dtype}
        if self.routed_as.weights:
            v.weights = cast(v.weights, kinds[self.routed_as.weights])
        return v.take("logits"), v.take("weights"), v.take("experts")

    def logits(self, x: Tensor) -> Tensor:
        """(N, E), in the dtype that the class has them in."""
        machine, how = self.machine, self.routed_as.logits
        with arguments((x,)) as results, machine.autocast(None if how == "fp32-alone" else machine.autocast_dtype):
            if how.startswith("fp32"):
                results.append(linear(cast(x, FLOAT32), cast(self.weight, FLOAT32), self.bias))
            else:
                made = linear(x, self.weight, self.bias)
                results.append(cast(made, FLOAT32) if how == "late" else made)
        return results[0]


def softmax(router: HFRouter, v: Locals) -> None:
    """`MixtralTopKRouter`."""
    v.probabilities = ops.softmax(v.logits, FLOAT32)
    v.weights, v.experts = top_k_with_values(v.probabilities, router.K)
    if router.part.normalises:
        divide_in_place(v.weights, sum_last(v.weights))


def hunyuan(router: HFRouter, v: Locals) -> None:
    """`HunYuanMoEV1Gate`, which has one name for the probabilities and for those that it takes."""
    v.weights = ops.softmax(v.logits, FLOAT32)
    v.weights, v.experts = top_k_with_values(v.weights, router.K)
    divide_in_place(v.weights, sum_last(v.weights))


def groups(router: HFRouter, v: Locals) -> None:
    """`DeepseekV3TopkRouter`."""
    v.scores = sigmoid(v.logits) if router.part.score == "sigmoid" else ops.softmax(v.logits)
    v.choice = v.scores if router.correction is None else ops.add(v.scores, router.correction)
    in_best_groups(router, v)
    v.experts = indices_of_best(v.choice, router.K)
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
    v.group = indices_of_best(v.group_scores, router.groups)
    v.group_mask = empty_like(v.group_scores)
    put_number(v.group_mask, v.group)
    v.mask = reshape(expand(unsqueeze(v.group_mask, 2), (rows, router.G, inside)), v.choice.shape)
    v.choice = ops.masked_fill(v.choice, opposite(v.mask))


def limited(router: HFRouter, v: Locals) -> None:
    """`DeepseekV2TopkRouter`: "greedy", or the best of the groups whose best are best."""
    v.scores = ops.softmax(v.logits, FLOAT32)
    if router.part.grouped:
        rows, inside = v.scores.shape[0], ceiling(router.E, router.G)
        greatest, at = greatest_last(view(v.scores, (rows, router.G, inside)))
        at.discard()
        v.group_scores = view(greatest, (rows, router.G))
        v.group = indices_of_best(v.group_scores, router.groups)
        v.group_mask = empty_like(v.group_scores)
        put_number(v.group_mask, v.group)
        v.mask = reshape(expand(unsqueeze(v.group_mask, 2), (rows, router.G, inside)), v.scores.shape)
        v.scores = ops.masked_fill(v.scores, opposite(v.mask))
    v.weights, v.experts = top_k_with_values(v.scores, router.K)
    v.weights = ops.mul_number(v.weights)


def indices_of_best(scores: Tensor, count: Size) -> Tensor:
    """scores.topk(count)[1]."""
    values, indices = top_k_with_values(scores, count)
    values.discard()
    return indices


def chosen(router: HFRouter, v: Locals) -> None:
    """`GraniteMoeTopKRouter`: a softmax of the best logits; it takes the rows as they are."""
    v.best, v.experts = top_k_with_values(v.logits, router.K)
    v.weights = ops.softmax(v.best, fp32(router.machine, "cuda"))


def gpt_oss(router: HFRouter, v: Locals) -> None:
    """`GptOssTopKRouter`, which says the softmax's dtype: autocast leaves it."""
    v.best, v.experts = top_k_with_values(v.logits, router.K)
    v.weights = ops.softmax(v.best)


def cohere(router: HFRouter, v: Locals) -> None:
    """`Cohere2MoeTopKRouter`."""
    v.weights, v.experts = top_k_with_values(v.logits, router.K)
    v.weights = ops.softmax(v.weights, FLOAT32) if router.part.score == "logits" else sigmoid(v.weights)
    if router.part.normalises:
        v.weights = div(v.weights, sum_last(v.weights))


def minimax(router: HFRouter, v: Locals) -> None:
    """`MiniMaxM2TopKRouter`."""
    v.scores = sigmoid(cast(v.logits, FLOAT32))
    corrected(router, v)
    divide_in_place(v.weights, sum_last(v.weights))


def corrected(router: HFRouter, v: Locals) -> None:
    """`v.experts` are the best of the scores with their correction, whose sums are held; `v.weights` without it."""
    assert router.correction is not None
    v.choice = ops.add(v.scores, router.correction)
    v.best, v.experts = top_k_with_values(v.choice, router.K)
    v.weights = gather_last(v.scores, v.experts)


def hunyuan_3(router: HFRouter, v: Locals) -> None:
    """`HYV3TopKRouter`."""
    v.scores = sigmoid(v.logits)
    corrected(router, v)
    v.weights = div(v.weights, ops.add_number(sum_last(v.weights)))
    v.weights = ops.mul_number(v.weights)


def ernie(router: HFRouter, v: Locals) -> None:
    """`Ernie4_5_MoeTopKRouter`, outside of autocast."""
    assert router.correction is not None
    with router.machine.autocast(None):
        v.scores = ops.softmax(v.logits, FLOAT32)
        v.best, v.experts = top_k_with_values(ops.add(v.scores, router.correction), router.K)
        v.scores = gather_last(v.scores, v.experts)
        v.weights = div(v.scores, clamp(sum_last(v.scores), both=False))


def kolibri(router: HFRouter, v: Locals) -> None:
    """`Kolibri1TopKRouter`."""
    assert router.correction is not None
    v.experts = indices_of_best(ops.add(v.logits, router.correction), router.K)
    v.weights = sigmoid(gather_last(v.logits, v.experts))
    if router.part.normalises:
        v.weights = div(v.weights, sum_last(v.weights))


ROUTERS = {
    "chosen": chosen,
    "cohere2_moe": cohere,
    "ernie4_5_moe": ernie,
    "gpt_oss": gpt_oss,
    "groups": groups,
    "hunyuan_v1_moe": hunyuan,
    "hy_v3": hunyuan_3,
    "kolibri1": kolibri,
    "limited": limited,
    "minimax_m2": minimax,
    "softmax": softmax,
}
