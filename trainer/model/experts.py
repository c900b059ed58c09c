"""A mixture of experts: a router sends each token through a few feed-forwards of many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from estimator.describe.parts import MLP, Norm
from trainer.model.feed_forward import GatedFeedForward, gated
from trainer.model.grouped import grouped_product
from trainer.model.layers import INIT_STD, Linear
from trainer.model.norms import build_norm
from trainer.model.router import Router, sort_by_expert

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from trainer.model.exchange import Exchanges


class Experts(nn.Module):
    """E gated feed-forwards whose matrices are one tensor. Shapes: rows (S, d), sorted by expert -> (S, d).

    Attributes:
        gate_up: (E, 2 f, d), of each expert the gate's rows, then those of up.
        down: (E, d, f).
        gate_up_bias, down_bias: (E, 2 f) and (E, d), or None.
        adapted: makes the matrices in a forward, where adapters are added to them (`trainer.model.expert_adapters`).
    """

    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        part, E, f = m.made_of.experts, m.num_experts, m.d_expert
        assert part is not None
        assert E is not None
        assert f is not None
        self.activation = part.activation
        self.adapted: Callable[[str], Tensor] | None = None
        self.gate_up = nn.Parameter(torch.empty(E, 2 * f, m.d_model))
        self.down = nn.Parameter(torch.empty(E, m.d_model, f))
        self.gate_up_bias = nn.Parameter(torch.zeros(E, 2 * f)) if part.bias else None
        self.down_bias = nn.Parameter(torch.zeros(E, m.d_model)) if part.bias else None
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=INIT_STD)

    def forward(self, x: Tensor, count_E: Tensor, expert_S: Tensor | None) -> Tensor:
        """`count_E`: how many rows each expert has; `expert_S`: the expert of each row, where they have biases."""
        h = grouped_product(x, self.matrix("gate_up"), count_E)
        if self.gate_up_bias is not None and expert_S is not None:
            h = h + here(self.gate_up_bias).index_select(0, expert_S)
        gate, up = h.chunk(2, -1)
        h = gated(gate, up, self.activation)
        y = grouped_product(h, self.matrix("down"), count_E)
        if self.down_bias is not None and expert_S is not None:
            y = y + here(self.down_bias).index_select(0, expert_S)
        return y

    def matrix(self, name: str) -> Tensor:
        """`gate_up` or `down`, with what adapters add."""
        return here(getattr(self, name)) if self.adapted is None else self.adapted(name)


def here(p: Tensor) -> Tensor:
    """What this process has of a parameter."""
    return p.to_local() if isinstance(p, DTensor) else p


class SparseFeedForward(nn.Module):
    """Each token through K of E experts, and all through the shared one. Shapes: (B, T, d) -> (B, T, d).

    Attributes:
        router: chooses.
        experts: of which each token takes K.
        shared: the expert of all tokens, or None.
        shared_gate: a score a token whose sigmoid the shared expert's result is multiplied with, or None.
        out_norm: an RMSNorm over what all experts have made of a token, or None.
        out_bias: (d), added to the sum of a token's experts, or None.
        exchange: where other processes have a part of the experts, how rows get there and back; else None.
    """

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        part = m.made_of.experts
        assert part is not None
        self.weighs_inputs, self.averages = part.score == "sigmoid-all", part.averaged
        self.router = Router(m, p.balance / p.grad_accumulation)
        self.experts = Experts(m)
        self.exchange: Exchanges | None = None
        self.shared = self.shared_gate = None
        if part.shared != "none":
            assert m.d_shared is not None
            mlp = MLP(activation=part.activation, fused=part.shared_fused)
            self.shared = GatedFeedForward(mlp, m.d_model, m.d_shared, dropout=0.0)
        if part.shared == "gated":
            self.shared_gate = Linear(m.d_model, 1, bias=False)
        self.out_norm = build_norm(Norm("rms"), m.d_model) if part.out_norm else None
        self.out_bias = nn.Parameter(torch.zeros(m.d_model)) if part.out_bias else None
        self.dropout = nn.Dropout(p.dropout)

    def routed(self, x: Tensor) -> Tensor:
        """What the chosen experts make of each token, weighed and added up. Shapes: (N, d) -> (N, d)."""
        weights_NK, experts_NK = self.router(x)
        count_E, order_S, token_S = sort_by_expert(experts_NK, self.router.num_experts)
        expert_S = experts_NK.view(-1).index_select(0, order_S) if self.experts.gate_up_bias is not None else None
        rows = x.index_select(0, token_S)
        weight_S1 = weights_NK.view(-1).index_select(0, order_S)[:, None]
        if self.weighs_inputs:
            y = self.through(rows * weight_S1.to(rows.dtype), count_E, expert_S)
        else:
            y = self.through(rows, count_E, expert_S)
            y = y * weight_S1.to(y.dtype)
        y = y.new_zeros(len(x), y.shape[1]).index_add_(0, token_S, y)
        return y if self.out_bias is None else y + self.out_bias

    def through(self, rows: Tensor, count_E: Tensor, expert_S: Tensor | None) -> Tensor:
        """The rows' results, in their order, wherever their experts are."""
        if self.exchange is None:
            made: Tensor = self.experts(rows, count_E, expert_S)
            return made
        there = self.exchange(count_E, biases=expert_S is not None)
        y = self.experts(there.dispatch(rows), there.count, there.expert)
        y = there.by_sender(y)
        return there.combine(y)

    def forward(self, x: Tensor) -> Tensor:
        x_Nd = x.reshape(-1, x.shape[-1])
        y = self.routed(x_Nd)
        if self.shared is not None:
            shared = self.shared(x_Nd)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x_Nd)) * shared
            y = y + shared
            if self.averages:
                y = y * 0.5
        if self.out_norm is not None:
            y = self.out_norm(y)
        return self.dropout(y.view(x.shape))
