"""A mixture of experts; `trainer.model.experts`. Memory and FLOPs are the same whichever experts are chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.parts import MLP, PICKS, Norm
from estimator.eager import ops
from estimator.eager.indexing import (
    add_rows,
    argsort,
    bincount,
    div,
    gather_last,
    grouped_product,
    index_select,
    maximum_last,
    scatter_last,
    sum_all,
    sum_last,
    top_k,
    top_k_values,
    whole_number_divided,
    with_loss,
)
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE, ceiling
from estimator.eager.linalg import linear
from estimator.eager.pointwise import compared, sigmoid
from estimator.eager.tensor import BOOL, FLOAT32, Locals, Tensor, arguments, empty_like
from estimator.eager.views import cast, concatenate, reshape, split, unsqueeze, view
from estimator.models.feed_forward import GatedFeedForward, gated
from estimator.models.layers import Linear, Module, dropout
from estimator.models.norms import build_norm
from estimator.parallel.expert import Exchange, Place, experts_on, regrouped
from estimator.parallel.placement import EXPERT, counted_whole

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine
    from estimator.models.expert_adapters import ExpertsLoRA
    from estimator.models.layers import Recipe


class Router(Module):
    """(N, d) -> weights (N, K) in fp32 and experts (N, K)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "router")
        size, part = machine.shapes.letters, recipe.parts.experts
        assert part is not None
        self.part, self.E, self.balances = part, size["E"], recipe.balances
        # Experts of attention have k heads each, which are h together.
        self.K = size["g"] if recipe.parts.attention.experts else size["K"]
        self.G, self.groups = (size["G"], size["G_K"]) if part.grouped else (ONE, ONE)
        self.weight = self.parameter(self.E, size["d"])
        self.bias = self.parameter(self.E) if part.router_bias else None
        self.correction = self.buffer = None
        if part.correction == "parameter":
            self.correction = self.parameter(self.E, trained=False)
        elif part.correction == "buffer":
            with self.inside():
                self.buffer = machine.empty((self.E,), machine.dtype, category=Category.BUFFER).hold()
            self.correction = self.buffer

    def scores(self, logits: Tensor) -> Tensor:
        """(N, E) in fp32."""
        with arguments((logits,)) as results:
            if self.part.score == "softmax":
                results.append(ops.softmax(logits, FLOAT32))
            elif self.part.score == "sigmoid":
                results.append(sigmoid(cast(logits, FLOAT32)))
            else:
                results.append(cast(logits, FLOAT32))
        return results[0]

    def choose(self, scores: Tensor) -> Tensor:
        """(N, K), without a gradient."""
        with scores.machine.no_grad(), Locals() as v:
            v.scores = scores
            if self.correction is not None:
                v.scores = ops.elementwise("add", scores, self.correction)
            if self.part.grouped:
                v.scores = self.in_best_groups(v.scores)
            return top_k(v.scores, self.K)

    def in_best_groups(self, scores: Tensor) -> Tensor:
        """The scores, minus infinity but in the best groups."""
        machine, n = scores.machine, scores.shape[0]
        with Locals() as v:
            inside = ceiling(self.E, self.G)
            v.by_group = scores.view((n, self.G, inside), (self.E, inside, ONE))
            best = 2 * ONE if self.part.score == "sigmoid" else ONE
            values = top_k_values(v.by_group, best)
            v.group = machine.empty((n, self.G), scores.dtype)
            values.hold()
            machine.kernel("sum", (values,), (v.group,))
            values.drop()
            v.kept = top_k(v.group, self.groups)
            v.out = empty_like(v.group, BOOL)
            machine.kernel("scatter_", (v.kept,), (v.out,))
            masked = machine.empty(scores.shape, scores.dtype)
            machine.kernel("masked_fill", (scores, v.out), (masked,))
            return masked

    def forward(self, v: Locals, x: Tensor) -> tuple[Tensor, Tensor]:
        v.scores = self.scores(linear(x, self.weight, self.bias))
        if self.part.score == "sparse-mixer":
            v.weights, v.experts = self.picked_in_turn(v.scores)
        else:
            v.weights, v.experts = self.picked_at_once(v.scores)
        if self.balances:
            v.weights = with_loss(v.weights, self.balance_loss(v.scores, v.experts))
        return v.take("weights"), v.take("experts")

    def balance_loss(self, scores: Tensor, experts: Tensor) -> Tensor:
        """A scalar."""
        with arguments((scores, experts)) as results, Locals() as v:
            with scores.machine.no_grad():
                v.share = cast(bincount(experts, self.E), FLOAT32)
                ops.in_place_with_number("mul_", v.share)
            if self.part.score == "sigmoid":
                v.p = div(scores, sum_last(scores))
            else:
                v.p = scores if self.part.score == "softmax" else ops.softmax(scores)
            results.append(sum_all(ops.mul(v.p, v.share)))
        return results[0]

    def picked_at_once(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The K best, and their weights."""
        with arguments((scores,)) as results, Locals() as v:
            results.extend(self.chosen(v, scores))
        return results[0], results[1]

    def chosen(self, v: Locals, scores: Tensor) -> tuple[Tensor, Tensor]:
        v.scores = scores
        v.experts = self.choose(v.scores)
        v.weights = gather_last(v.scores, v.experts)
        if self.part.score == "logits":
            v.weights = ops.softmax(v.weights)
        elif self.part.score in ("sigmoid-all", "sigmoid-chosen"):
            v.weights = sigmoid(v.weights)
        if self.part.normalises:
            v.weights = div(v.weights, sum_last(v.weights))
        if self.part.scaling is not None:
            v.weights = ops.mul_number(v.weights)
        return v.take("weights"), v.take("experts")

    def picked_in_turn(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """One expert after the other."""
        with arguments((logits,)) as results, Locals() as v:
            v.experts = self.choose(logits)
            v.left, weights = logits, []
            column = (*v.experts.shape[:-1], ONE)
            for pick in range(PICKS):
                v.expert = v.experts.view(column, v.experts.stride)
                with logits.machine.no_grad():
                    v.top = maximum_last(v.left)
                    v.far = self.far(v.top, logits)
                v.near = ops.softmax(ops.masked_fill(v.left, v.far))
                name = f"weight{pick}"
                setattr(v, name, gather_last(v.near, v.expert))
                weights.append(name)
                v.left = scatter_last(v.left, v.expert)
            v.weights = concatenate([getattr(v, name) for name in weights], self.K)
            del v.expert  # a view of what is returned
            results += [v.take("weights"), v.take("experts")]
        return results[0], results[1]

    def far(self, top: Tensor, logits: Tensor) -> Tensor:
        """(top - logits) / logits.abs().clamp(min=top) > number."""
        with Locals() as v:
            v.below = ops.elementwise("sub", top, logits)
            v.ratio = ops.elementwise("div", v.below, ops.elementwise("clamp", ops.elementwise("abs", logits), top))
            del v.below
            return compared("gt", v.ratio)


def sort_by_expert(experts: Tensor, bins: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of each expert, which pair of token and choice a row is, and which token: `Sorted`."""
    with arguments((experts,)) as results, Locals() as v:
        v.count = bincount(experts, bins)
        v.order = argsort(experts.view((experts.numel,), (ONE,)))
        v.token = whole_number_divided(v.order)
        results += [v.take("count"), v.take("order"), v.take("token")]
    return results[0], results[1], results[2]


class Experts(Module):
    """Rows (S, d), sorted by expert -> (S, d)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "experts")
        size, part = machine.shapes.letters, recipe.parts.experts
        assert part is not None
        self.activation, self.f = part.activation, size["f_e"]
        self.adapted: ExpertsLoRA | None = None
        E, d = size["E"], size["d"]
        self.E = experts_on(machine, E) if recipe.expert_parallel else E
        self.gate_up = self.parameter(self.E, 2 * self.f, d)
        self.down = self.parameter(self.E, d, self.f)
        self.gate_up_bias = self.parameter(self.E, 2 * self.f) if part.bias else None
        self.down_bias = self.parameter(self.E, d) if part.bias else None
        for p in self.owned if recipe.expert_parallel else ():
            assert isinstance(p, Tensor)
            p.placement = {EXPERT: 0}
            counted_whole(p, (E, *p.shape[1:]))

    def matrix(self, name: str) -> Tensor:
        """The stacked matrices, with what adapters add to them."""
        if self.adapted is not None:
            return self.adapted.matrix(name)
        matrix: Tensor = getattr(self, name)
        return matrix

    def forward(self, v: Locals, x: Tensor, count: Tensor, expert: Tensor | None) -> Tensor:
        v.h = grouped_product(x, self.matrix("gate_up"), count)
        if self.gate_up_bias is not None and expert is not None:
            v.h = ops.add(v.h, index_select(self.gate_up_bias, expert))
        v.gate, v.up = split(v.h, (self.f, self.f))
        v.h = gated(v.gate, v.up, self.activation)
        v.y = grouped_product(v.h, self.matrix("down"), count)
        if self.down_bias is not None and expert is not None:
            v.y = ops.add(v.y, index_select(self.down_bias, expert))
        return v.take("y")


class SparseFeedForward(Module):
    """Each token through K of E experts, and all through the shared one."""

    build_router: type[Router] = Router
    build_experts: type[Experts] = Experts

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "ffn")
        self.recipe, part, size = recipe, recipe.parts.experts, machine.shapes.letters
        assert part is not None
        self.weighs_inputs, self.averages = part.score == "sigmoid-all", part.averaged
        self.shared = self.shared_gate = None
        with self.inside():
            self.router = self.child(self.build_router(machine, recipe))
            self.experts = self.child(self.build_experts(machine, recipe))
            if part.shared != "none":
                mlp = MLP(activation=part.activation, fused=part.shared_fused)
                shared = GatedFeedForward(machine, "shared", mlp, size["d"], size["f_s"], recipe, drops=False)
                self.shared = self.child(shared)
            if part.shared == "gated":
                self.shared_gate = self.child(Linear(machine, "shared_gate", size["d"], ONE, bias=False))
            norm = build_norm(machine, recipe, "out_norm", Norm("rms"), size["d"]) if part.out_norm else None
            self.out_norm = self.child(norm)
        self.out_bias = self.parameter(size["d"]) if part.out_bias else None

    def routed(self, x: Tensor) -> Tensor:
        """What the chosen experts make of each token, weighed and added up."""
        machine, E = x.machine, self.router.E
        pairs = (machine.product((x.shape[0], self.router.K)),)
        with Locals() as v:
            v.weights, v.experts = self.router(x)
            v.count, v.order, v.token = sort_by_expert(v.experts, E)
            v.expert = None
            if self.experts.gate_up_bias is not None:
                v.expert = index_select(v.experts.view(pairs, (ONE,)), v.order)
            v.rows = index_select(x, v.token)
            v.weight = unsqueeze(index_select(view(v.weights, pairs), v.order), 1)
            if self.weighs_inputs:
                v.y = self.through(ops.mul(v.rows, cast(v.weight, v.rows.dtype)), v.count, v.expert)
            else:
                v.y = self.through(v.rows, v.count, v.expert)
                v.y = ops.mul(v.y, cast(v.weight, v.y.dtype))
            v.y = add_rows(v.y, v.token, (x.shape[0], v.y.shape[1]))
            return v.take("y") if self.out_bias is None else ops.add(v.y, self.out_bias)

    def through(self, rows: Tensor, count: Tensor, expert: Tensor | None) -> Tensor:
        """The rows' results, in their order, wherever their experts are."""
        if not self.recipe.expert_parallel:
            made: Tensor = self.experts(rows, count, expert)
            return made
        place = Place(self.recipe.expert_rank, self.recipe.imbalanced)
        with arguments((rows, count, expert)) as results, Locals() as v:
            there = Exchange(v, count, self.experts.E, place, rows.shape[0], biases=expert is not None)
            v.y = self.experts(there.dispatch(rows), v.count, v.expert)
            v.y = regrouped(v.y)
            results.append(there.combine(v.y))
        return results[0]

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.flat = reshape(x, (x.machine.product(x.shape[:-1]), x.shape[-1]))
        v.y = self.routed(v.flat)
        if self.shared is not None:
            v.shared = self.shared(v.flat)
            if self.shared_gate is not None:
                v.shared = ops.mul(sigmoid(self.shared_gate(v.flat)), v.shared)
            v.y = ops.add(v.y, v.shared)
            if self.averages:
                v.y = ops.mul_number(v.y)
        if self.out_norm is not None:
            v.y = self.out_norm(v.y)
        return dropout(view(v.y, x.shape), self.recipe)
