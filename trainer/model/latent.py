"""Multi-head latent attention: keys and values, and perhaps queries, are made from narrow vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from estimator.describe.parts import Norm
from trainer.model.attention import attend
from trainer.model.layers import Linear
from trainer.model.norms import build_norm
from trainer.model.positions import ROTATIONS

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from trainer.model.attention import KeysAndValues


class LatentAttention(nn.Module):
    """DeepSeek-V2, section 2.1, as it is trained: keys and values of all heads are made, nothing is absorbed.

    Shapes: (B, T, d) -> (B, T, d). A head's queries and keys are a part of nope_dim and a part of rope_dim, which alone
    is rotated; that of the keys is one for all heads.

    Attributes:
        q: the projection of the queries where they have no latent vector.
        q_down, q_norm, q_up: to a vector of query_rank, its norm, and from there to the queries of all heads.
        kv_down: to a vector of kv_rank and, beside it, the rotated part of the keys.
        kv_norm, kv_up: the vector's norm, and from there to each head's other part of its keys, and its values.
        out: the output projection.
    """

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        assert m.kv_rank is not None
        assert m.rope_dim is not None
        assert m.nope_dim is not None
        a = self.part = m.made_of.attention
        self.num_heads, self.value_dim, self.kind = m.num_heads, m.value_e, p.attention
        self.kv_rank, self.rope_dim, self.nope_dim = m.kv_rank, m.rope_dim, m.nope_dim
        self.pairs = m.made_of.positions.pairs
        norm = Norm("rms")  # whatever the stream's is
        if m.query_rank is None:
            self.q = Linear(m.d_model, m.num_heads * m.e, bias=False)
        else:
            self.q_down = Linear(m.d_model, m.query_rank, bias=a.bias)
            self.q_norm = build_norm(norm, m.query_rank)
            self.q_up = Linear(m.query_rank, m.num_heads * m.e, bias=False)
        self.kv_down = Linear(m.d_model, m.kv_rank + m.rope_dim, bias=a.bias)
        self.kv_norm = build_norm(norm, m.kv_rank)
        self.kv_up = Linear(m.kv_rank, m.num_heads * (m.nope_dim + m.value_e), bias=False)
        self.out = Linear(m.num_heads * m.value_e, m.d_model, bias=a.out_bias)
        self.dropout = nn.Dropout(p.dropout)

    def queries(self, x: Tensor) -> Tensor:
        """(B, T, h e)."""
        if self.part.latent == "keys":
            return self.q(x)
        return self.q_up(self.q_norm(self.q_down(x)))

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
        B, T, _ = x.shape
        q = self.queries(x).view(B, T, self.num_heads, self.nope_dim + self.rope_dim)
        q_nope, q_rope = torch.split(q, [self.nope_dim, self.rope_dim], -1)
        latent, k_rope = torch.split(self.kv_down(x), [self.kv_rank, self.rope_dim], -1)
        kv = self.kv_up(self.kv_norm(latent)).view(B, T, self.num_heads, self.nope_dim + self.value_dim)
        k_nope, v = torch.split(kv, [self.nope_dim, self.value_dim], -1)
        k_rope = k_rope.view(B, T, 1, self.rope_dim)
        if cos is not None and sin is not None:
            q_rope = ROTATIONS[self.pairs](q_rope, cos, sin)
            k_rope = ROTATIONS[self.pairs](k_rope, cos, sin)
        q = torch.cat((q_nope, q_rope), -1)
        if query_scale is not None:
            q = q * query_scale
        q = q.transpose(1, 2)
        k = torch.cat((k_nope, k_rope.expand(B, T, self.num_heads, self.rope_dim)), -1).transpose(1, 2)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.dropout.p if self.training else 0.0
        y = attend(q, k, v, mask, self.kind, dropout, scale=self.part.scale, cap=self.part.softcap, bias_h1T=bias)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, self.num_heads * self.value_dim)))
