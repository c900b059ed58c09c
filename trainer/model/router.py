"""Which experts a token goes through: the router of a mixture, and what it is measured and balanced with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.model.layers import INIT_STD

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig

SPARSE_MIXER_EPS = 0.01  # Phi-3.5-MoE's router_jitter_noise


class Router(nn.Module):
    """Which K experts a token goes through, and with what weights. Shapes: (N, d) -> (N, K) float32, (N, K) int64.

    Attributes:
        weight: (E, d), a row for each expert.
        bias: (E), or None.
        correction: (E), a buffer or a parameter without a gradient, added to the scores where experts are chosen (Wang
            et al. 2024, "Auxiliary-loss-free load balancing"); zeros until somebody moves it; or None.
        routing: "learned"; "even" deals tokens out one after another; a number m deals them out so that expert 0 gets
            m times its even share. For measurements: the same tensors are made in all three.
        balance: the weight of the balancing loss whose gradient the backward of each micro-batch adds
            (`balance_loss`); 0 adds none.
        watched: keep the scores' loss of `load_balancing_loss` in `loss` in each forward.
    """

    correction: Tensor | None
    loss: Tensor | None

    def __init__(self, m: ModelConfig, balance: float = 0.0) -> None:
        super().__init__()
        self.balance = balance
        part, E, K = m.made_of.experts, m.num_experts, m.experts_per_token
        assert part is not None
        assert E is not None
        assert K is not None
        self.part, self.num_experts, self.chosen = part, E, K
        self.groups, self.groups_per_token = m.expert_groups, m.groups_per_token
        self.weight = nn.Parameter(torch.empty(E, m.d_model))
        self.bias = nn.Parameter(torch.zeros(E)) if part.router_bias else None
        if part.correction == "parameter":
            self.correction = nn.Parameter(torch.zeros(E), requires_grad=False)
        else:
            self.register_buffer("correction", torch.zeros(E) if part.correction == "buffer" else None)
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
        if self.part.score == "sparse-mixer":
            weights_NK, experts_NK = self.picked_in_turn(scores_NE)
        else:
            weights_NK, experts_NK = self.picked_at_once(scores_NE)
        if self.balance:
            weights_NK = _WithLoss.apply(weights_NK, self.balance_loss(scores_NE, experts_NK))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return weights_NK, experts_NK

    def balance_loss(self, scores_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """`balance` times E sum_e f_e P_e, of the share f of the choices and the mean probability P of each expert.

        Fedus et al. 2022, "Switch Transformers", equation 4, for K choices a token.
        """
        with torch.no_grad():
            share_E = torch.bincount(experts_NK.view(-1), minlength=self.num_experts).to(torch.float32)
            share_E.mul_(self.balance * self.num_experts / (experts_NK.numel() * len(experts_NK)))
        if self.part.score == "sigmoid":
            p_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        else:
            p_NE = scores_NE if self.part.score == "softmax" else torch.softmax(scores_NE, -1)
        return (p_NE * share_E).sum()

    def picked_at_once(self, scores_NE: Tensor) -> tuple[Tensor, Tensor]:
        """The K best, and their weights."""
        experts_NK = self.choose(scores_NE)
        if self.watched:
            self.loss = load_balancing_loss(scores_NE, experts_NK)
        weights_NK = scores_NE.gather(-1, experts_NK)
        if self.part.score == "logits":
            weights_NK = torch.softmax(weights_NK, -1)
        elif self.part.score in ("sigmoid-all", "sigmoid-chosen"):
            weights_NK = torch.sigmoid(weights_NK)
        if self.part.normalises:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        if self.part.scaling is not None:
            weights_NK = weights_NK * self.part.scaling
        return weights_NK, experts_NK

    def picked_in_turn(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """One expert after the other, each weighed by a softmax of those logits that are not far below the greatest.

        Liu et al. 2024, "GRIN: Gradient-Informed MoE", equation 4 and Phi-3.5-MoE's code, where nothing is drawn.
        """
        experts_NK = self.choose(logits_NE)
        left_NE, weights = logits_NE, []
        for expert_N1 in experts_NK.split(1, -1):  # type: ignore[no-untyped-call]  # torch leaves Tensor.split untyped
            with torch.no_grad():
                top_N1 = left_NE.amax(-1, keepdim=True)
                far_NE = (top_N1 - logits_NE) / logits_NE.abs().clamp(min=top_N1) > 2 * SPARSE_MIXER_EPS
            near_NE = torch.softmax(left_NE.masked_fill(far_NE, float("-inf")), -1)
            weights.append(near_NE.gather(-1, expert_N1))
            left_NE = left_NE.scatter(-1, expert_N1, float("-inf"))
        return torch.cat(weights, -1), experts_NK


class _WithLoss(torch.autograd.Function):
    """A tensor as it is, in whose backward a loss gets a gradient of 1: the loss counts, and nobody adds it up.

    DeepSeek's AddAuxiliaryLoss (modeling_deepseek.py of DeepSeek-V2), Megatron-LM's MoEAuxLossAutoScaler.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:  # noqa: ARG004 - autograd passes both
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004 - nothing is saved
        return grad, torch.ones((), device=grad.device)


class Sorted(NamedTuple):
    """The S = N K pairs of token and choice, sorted by expert, so that each expert's rows lie together.

    Attributes:
        sizes: (E), rows of each expert.
        order: (S), which pair a row is.
        token: (S), which token a row is of.
    """

    sizes: Tensor
    order: Tensor
    token: Tensor


def sort_by_expert(experts_NK: Tensor, num_experts: int) -> Sorted:
    """`Sorted` of a router's choice, (N, K) int64."""
    count_E = torch.bincount(experts_NK.view(-1), minlength=num_experts)
    order_S = experts_NK.view(-1).argsort(stable=True)
    return Sorted(count_E, order_S, order_S // experts_NK.shape[1])


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
