"""A mixture of attention heads: queries and outputs are experts, keys and values are everybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.model.attention import attend
from trainer.model.grouped import grouped_product
from trainer.model.layers import INIT_STD, Linear
from trainer.model.positions import rotate_part
from trainer.model.router import Router, sort_by_expert

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from trainer.model.attention import KeysAndValues


class ExpertAttention(nn.Module):
    """Each token's queries are the k heads of each of its K experts, h = K k. Shapes: (B, T, d) -> (B, T, d).

    Shen et al. 2024, "JetMoE", section 2.2.

    Attributes:
        router: chooses the experts.
        queries: (E, k e, d), each expert's projection.
        kv: one projection of keys and values.
        outputs: (E, d, k e), each expert's projection back.
        out_bias: (d), added to the sum of a token's experts.
    """

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        assert m.num_experts is not None
        self.part, self.kv_heads, self.head_dim = m.made_of.attention, m.kv_heads, m.e
        self.num_heads, self.pairs, self.kind = m.num_heads, m.made_of.positions.pairs, p.attention
        wide = m.kv_heads * m.e
        self.router = Router(m, p.balance / p.grad_accumulation)
        self.queries = nn.Parameter(torch.empty(m.num_experts, wide, m.d_model))
        self.kv = Linear(m.d_model, 2 * wide, bias=False)
        self.outputs = nn.Parameter(torch.empty(m.num_experts, m.d_model, wide))
        self.out_bias = nn.Parameter(torch.zeros(m.d_model))
        self.dropout = nn.Dropout(p.dropout)
        for weight in (self.queries, self.outputs):
            nn.init.normal_(weight, std=INIT_STD)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        query_scale: Tensor | None = None,
        cache: KeysAndValues | None = None,
    ) -> Tensor:
        B, T, d = x.shape
        x_Nd = x.reshape(-1, d)
        weights_NK, experts_NK = self.router(x_Nd)
        K = experts_NK.shape[1]
        count_E, order_S, token_S = sort_by_expert(experts_NK, self.router.num_experts)
        q = grouped_product(x_Nd.index_select(0, token_S), self.queries, count_E)
        q = q.index_select(0, order_S.argsort()).view(B, T, self.num_heads, self.head_dim)
        k, v = self.kv(x).chunk(2, -1)
        k = k.view(B, T, self.kv_heads, self.head_dim)
        v = v.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if cos is not None and sin is not None:
            q = rotate_part(q, cos, sin, self.pairs)
            k = rotate_part(k, cos, sin, self.pairs)
        if query_scale is not None:
            q = q * query_scale
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        k, v = k.repeat(1, K, 1, 1), v.repeat(1, K, 1, 1)  # the heads of one expert, then those of the next
        dropout = self.dropout.p if self.training else 0.0
        y = attend(q, k, v, mask, self.kind, dropout, scale=self.part.scale, cap=self.part.softcap, bias_h1T=bias)
        rows = y.transpose(1, 2).reshape(B * T * K, -1).index_select(0, order_S)
        y = grouped_product(rows, self.outputs, count_E)
        y = y * weights_NK.view(-1).index_select(0, order_S)[:, None].to(y.dtype)
        y = y.new_zeros(B * T, d).index_add_(0, token_S, y) + self.out_bias
        return self.dropout(y.view(B, T, d))
