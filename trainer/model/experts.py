"""A mixture of experts: a router sends each token through a few feed-forwards of many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from estimator.describe.parts import MLP
from trainer.model.feed_forward import GatedFeedForward, gated
from trainer.model.grouped import grouped_product
from trainer.model.layers import INIT_STD, Linear

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan


class Router(nn.Module):
    """Which K experts a token goes through, and with what weights. Shapes: (N, d) -> (N, K) float32, (N, K) int64.

    Attributes:
        weight: (E, d), a row for each expert.
        bias: (E), or None.
        correction: (E), a buffer added to the scores where experts are chosen (Wang et al. 2024, "Auxiliary-loss-free
            load balancing"); zeros until somebody moves it.
        routing: "learned"; "even" deals tokens out one after another; a number m deals them out so that expert 0 gets
            m times its even share. For measurements: the same tensors are made in all three.
        watched: keep the scores' loss of `load_balancing_loss` in `loss` in each forward.
    """

    correction: Tensor | None
    loss: Tensor | None

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        part, E, K = m.made_of.experts, m.num_experts, m.experts_per_token
        assert part is not None
        assert E is not None
        assert K is not None
        self.part, self.num_experts, self.chosen = part, E, K
        self.groups, self.groups_per_token = m.expert_groups, m.groups_per_token
        self.weight = nn.Parameter(torch.empty(E, m.d_model))
        self.bias = nn.Parameter(torch.zeros(E)) if part.router_bias else None
        self.register_buffer("correction", torch.zeros(E) if part.corrected else None)
        nn.init.normal_(self.weight, std=INIT_STD)
        self.routing: str | float = "learned"
        self.watched, self.loss = False, None

    def scores(self, logits_NE: Tensor) -> Tensor:
        """(N, E) float32, from which experts are chosen and weighed."""
        if self.part.score == "softmax":
            return torch.softmax(logits_NE, -1, dtype=torch.float32)
        if self.part.score == "sigmoid":
            return torch.sigmoid(logits_NE.float())
        return logits_NE.float()

    @torch.no_grad()
    def choose(self, scores_NE: Tensor) -> Tensor:
        """(N, K), the experts of each token; no gradient goes through the choice."""
        if self.correction is not None:
            scores_NE = scores_NE + self.correction
        if self.part.grouped:
            scores_NE = self.in_best_groups(scores_NE)
        experts_NK = scores_NE.topk(self.chosen, -1).indices
        return experts_NK if self.routing == "learned" else deal_out(experts_NK, self.num_experts, self.routing)

    def in_best_groups(self, scores_NE: Tensor) -> Tensor:
        """The scores, minus infinity but in the best groups: by their best expert, with sigmoids by their two best.

        DeepSeek-V2, section 2.2.2, and DeepSeek-V3, section 2.1.2 and its published code.
        """
        assert self.groups is not None
        assert self.groups_per_token is not None
        by_group_NGE = scores_NE.view(len(scores_NE), self.groups, -1)
        best = 2 if self.part.score == "sigmoid" else 1
        group_NG = by_group_NGE.topk(best, -1).values.sum(-1)
        kept_NG = group_NG.topk(self.groups_per_token, -1).indices
        out_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter_(1, kept_NG, value=False)
        return by_group_NGE.masked_fill(out_NG[:, :, None], float("-inf")).view_as(scores_NE)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores_NE = self.scores(F.linear(x, self.weight, self.bias))
        experts_NK = self.choose(scores_NE)
        if self.watched:
            self.loss = load_balancing_loss(scores_NE, experts_NK)
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.part.score == "logits":
            weights_NK = torch.softmax(weights_NK, -1)
        elif self.part.score == "sigmoid-all":
            weights_NK = torch.sigmoid(weights_NK)
        elif self.part.normalised:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        if self.part.scaling is not None:
            weights_NK = weights_NK * self.part.scaling
        return weights_NK, experts_NK


def deal_out(experts_NK: Tensor, num_experts: int, routing: str | float) -> Tensor:
    """Overwrite the choice (N, K), contiguous int64, by one that is dealt out; no tensor is made.

    "even": the j-th choice of token t is expert (t K + j) mod E. A number m: the first m N K / E tokens, or all where
    that is more, choose expert 0; everything else is dealt out among the other experts.
    """
    flat_S = experts_NK.view(-1)
    torch.arange(len(flat_S), out=flat_S)
    if routing == "even" or num_experts <= experts_NK.shape[1]:  # each token goes through all there are
        flat_S.remainder_(num_experts)
        return experts_NK
    flat_S.remainder_(num_experts - 1).add_(1)
    experts_NK[: round(float(routing) * len(flat_S) / num_experts), 0] = 0
    return experts_NK


def load_balancing_loss(scores_NE: Tensor, experts_NK: Tensor) -> Tensor:
    """E times the sum over experts of their share of the choices times their mean score: 1 where all is even.

    Fedus et al. 2022, "Switch Transformers", equation 4, for K choices a token. Its gradient goes through the scores.
    """
    E = scores_NE.shape[1]
    share_E = torch.bincount(experts_NK.view(-1), minlength=E) / experts_NK.numel()
    mean_E = (scores_NE / scores_NE.sum(-1, keepdim=True)).mean(0)
    return E * (share_E * mean_E).sum()


class Experts(nn.Module):
    """E gated feed-forwards whose matrices are one tensor. Shapes: rows (S, d), sorted by expert -> (S, d).

    Attributes:
        gate_up: (E, 2 f, d), of each expert the gate's rows, then those of up.
        down: (E, d, f).
        gate_up_bias, down_bias: (E, 2 f) and (E, d), or None.
    """

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        part, E, f = m.made_of.experts, m.num_experts, m.d_expert
        assert part is not None
        assert E is not None
        assert f is not None
        self.activation = part.activation
        self.gate_up = nn.Parameter(torch.empty(E, 2 * f, m.d_model))
        self.down = nn.Parameter(torch.empty(E, m.d_model, f))
        self.gate_up_bias = nn.Parameter(torch.zeros(E, 2 * f)) if part.bias else None
        self.down_bias = nn.Parameter(torch.zeros(E, m.d_model)) if part.bias else None
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=INIT_STD)

    def forward(self, x: Tensor, count_E: Tensor, expert_S: Tensor | None) -> Tensor:
        """`count_E`: how many rows each expert has; `expert_S`: the expert of each row, where they have biases."""
        h = grouped_product(x, self.gate_up, count_E)
        if self.gate_up_bias is not None and expert_S is not None:
            h = h + self.gate_up_bias.index_select(0, expert_S)
        gate, up = h.chunk(2, -1)
        h = gated(gate, up, self.activation)
        y = grouped_product(h, self.down, count_E)
        if self.down_bias is not None and expert_S is not None:
            y = y + self.down_bias.index_select(0, expert_S)
        return y


class SparseFeedForward(nn.Module):
    """Each token through K of E experts, and all through the shared one. Shapes: (B, T, d) -> (B, T, d).

    The N K pairs of token and expert are sorted by expert, so that each expert's rows lie together.

    Attributes:
        router: chooses.
        experts: of which each token takes K.
        shared: the expert of all tokens, or None.
        shared_gate: a score a token whose sigmoid the shared expert's result is multiplied with, or None.
    """

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        part = m.made_of.experts
        assert part is not None
        self.weighs_inputs = part.score == "sigmoid-all"
        self.router = Router(m)
        self.experts = Experts(m)
        self.shared = self.shared_gate = None
        if part.shared != "none":
            assert m.d_shared is not None
            self.shared = GatedFeedForward(MLP(activation=part.activation), m.d_model, m.d_shared, dropout=0.0)
        if part.shared == "gated":
            self.shared_gate = Linear(m.d_model, 1, bias=False)
        self.dropout = nn.Dropout(p.dropout)

    def routed(self, x: Tensor) -> Tensor:
        """What the chosen experts make of each token, weighed and added up. Shapes: (N, d) -> (N, d)."""
        weights_NK, experts_NK = self.router(x)
        count_E = torch.bincount(experts_NK.view(-1), minlength=self.router.num_experts)
        order_S = experts_NK.view(-1).argsort(stable=True)
        expert_S = experts_NK.view(-1).index_select(0, order_S) if self.experts.gate_up_bias is not None else None
        token_S = order_S // experts_NK.shape[1]
        rows = x.index_select(0, token_S)
        weight_S1 = weights_NK.view(-1).index_select(0, order_S)[:, None]
        if self.weighs_inputs:
            y = self.experts(rows * weight_S1.to(rows.dtype), count_E, expert_S)
        else:
            y = self.experts(rows, count_E, expert_S)
            y = y * weight_S1.to(y.dtype)
        return y.new_zeros(len(x), y.shape[1]).index_add_(0, token_S, y)

    def forward(self, x: Tensor) -> Tensor:
        x_Nd = x.reshape(-1, x.shape[-1])
        y = self.routed(x_Nd)
        if self.shared is not None:
            shared = self.shared(x_Nd)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x_Nd)) * shared
            y = y + shared
        return self.dropout(y.view(x.shape))
