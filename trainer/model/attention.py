"""Causal attention: its projections, norms and rotations, and the kernels that compute it."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from estimator.describe.parts import Norm
from trainer.model.layers import Linear, soft_cap
from trainer.model.norms import build_norm
from trainer.model.positions import rotate_part

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from trainer.model.gather import Gather

KERNELS = {  # "sdpa" leaves the choice to PyTorch
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def repeat_heads(x_BkTe: Tensor, groups: int) -> Tensor:
    """(B, k, T, e) -> (B, k groups, T, e): every key/value head serves `groups` query heads; a copy unless 1."""
    if groups == 1:
        return x_BkTe
    B, k, T, e = x_BkTe.shape
    return x_BkTe[:, :, None].expand(B, k, groups, T, e).reshape(B, k * groups, T, e)


def attend(
    q_BhTe: Tensor,
    k_BhTe: Tensor,
    v_BhTe: Tensor,
    mask_TT: Tensor | None,
    kind: str,
    dropout: float,
    *,
    scale: float | None = None,
    cap: float | None = None,
    bias_h1T: Tensor | None = None,
    sinks_h: Tensor | None = None,
) -> Tensor:
    """Causal attention, (B, h, T, e), by separate ops or by SDPA; the mask is `masks.build_mask`'s.

    Without a mask the queries are either all positions or, with a cache, the last one alone, which may look at all.

    Args:
        q_BhTe: queries of T tokens.
        k_BhTe: keys of these tokens and those before them.
        v_BhTe: values, whose heads may have another width.
        mask_TT: for SDPA it may be added to the scores, (h, T, T).
        kind: `Plan.attention`.
        dropout: a probability, of the weights.
        scale: of the scores; None for 1 / sqrt(e).
        cap: of `soft_cap` of the scores. No fused kernel has it, nor sinks; `Plan.check_model` refuses them.
        bias_h1T: what is added to the scores by separate ops (ALiBi's; SDPA has it in its mask).
        sinks_h: a score for each head beside those of the tokens, whose weight goes nowhere.
    """
    if not kind.startswith("naive"):
        causal = mask_TT is None and q_BhTe.shape[2] == k_BhTe.shape[2]
        # CUDA's flash takes no mask: with one, PyTorch picks (on the CPU, its flash).
        kernel = None if kind == "sdpa-flash" and mask_TT is not None else KERNELS.get(kind)
        with sdpa_kernel(kernel) if kernel is not None else nullcontext():
            return F.scaled_dot_product_attention(q_BhTe, k_BhTe, v_BhTe, mask_TT, dropout, causal, scale=scale)
    assert mask_TT is not None
    scores_BhTT = q_BhTe @ k_BhTe.transpose(-2, -1)
    scores_BhTT = scores_BhTT * (1 / math.sqrt(q_BhTe.shape[-1]) if scale is None else scale)
    if cap is not None:
        scores_BhTT = soft_cap(scores_BhTT, cap)
    if bias_h1T is not None:
        scores_BhTT = scores_BhTT + bias_h1T
    scores_BhTT = scores_BhTT.masked_fill(mask_TT, float("-inf"))
    if sinks_h is not None:
        B, h, T, _ = scores_BhTT.shape
        scores_BhTT = torch.cat((scores_BhTT, sinks_h.view(1, h, 1, 1).expand(B, h, T, 1)), -1)
    if kind == "naive-fp32":
        weights_BhTT = torch.softmax(scores_BhTT, -1, dtype=torch.float32).to(q_BhTe.dtype)
    else:
        weights_BhTT = torch.softmax(scores_BhTT, -1)
    if sinks_h is not None:
        weights_BhTT = weights_BhTT[..., :-1]
    weights_BhTT = F.dropout(weights_BhTT, dropout)
    return weights_BhTT @ v_BhTe


class KeysAndValues:
    """What one block has computed of the tokens so far: generation's cache, (B, k, C, e) each, filled from the left."""

    def __init__(self, m: ModelConfig, batch_size: int, like: Tensor) -> None:
        self.keys = like.new_empty(batch_size, m.kv_heads, m.context_length, m.e)
        self.values = like.new_empty(batch_size, m.kv_heads, m.context_length, m.value_e)
        self.length = 0

    def extend(self, k_BkTe: Tensor, v_BkTe: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of T new tokens; views of all so far, (B, k, length, e)."""
        start, self.length = self.length, self.length + k_BkTe.shape[2]
        self.keys[:, :, start : self.length] = k_BkTe
        self.values[:, :, start : self.length] = v_BkTe
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class Attention(nn.Module):
    """Attention with one projection each for queries, keys and values, or one for all. Shapes: (B, T, d) -> (B, T, d).

    Attributes:
        qkv: the one projection, (h + 2 k) e wide: queries of all heads, then keys, then values.
        q, k, v: three of them.
        q_norm, k_norm: of queries and keys.
        out_gate: whose sigmoid what attention finds is multiplied with, or None.
        out_norm: an RMSNorm before the output projection, or None.
        out: the output projection.
        sinks: (h), see `attend`.
        gather: where other processes have other tokens, how their keys and values come here; else None.
    """

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        a = self.part = m.made_of.attention
        self.num_heads, self.kv_heads, self.head_dim = m.num_heads, m.kv_heads, m.e
        self.pairs, self.kind = m.made_of.positions.pairs, p.attention
        widths = self.widths = [m.num_heads * m.e, m.kv_heads * m.e, m.kv_heads * m.e]
        if a.fused:
            self.qkv = Linear(m.d_model, sum(widths), bias=a.bias)
        else:
            self.q = Linear(m.d_model, widths[0], bias=a.bias)
            self.k = Linear(m.d_model, widths[1], bias=a.bias)
            self.v = Linear(m.d_model, widths[2], bias=a.bias)
        if a.qk_norm != "none":
            q_shape, k_shape = {
                "head": ((m.e,), (m.e,)),
                "head-own": ((m.num_heads, m.e), (m.kv_heads, m.e)),
                "width": (widths[:1], widths[1:2]),
            }[a.qk_norm]
            self.q_norm, self.k_norm = build_norm(a.qk_norm_kind, *q_shape), build_norm(a.qk_norm_kind, *k_shape)
        self.out_gate = Linear(m.d_model, widths[0], bias=False) if a.out_gate else None
        self.out_norm = build_norm(Norm("rms"), widths[0]) if a.out_norm else None
        self.out = Linear(m.num_heads * m.e, m.d_model, bias=a.out_bias)
        self.sinks = nn.Parameter(torch.zeros(m.num_heads)) if a.sinks else None
        self.gather: Gather | None = None
        self.dropout = nn.Dropout(p.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, h e), keys and values (B, T, k e)."""
        clip = self.part.clip
        if self.part.fused:
            qkv = self.qkv(x)
            if clip is not None:
                qkv = qkv.clamp(-clip, clip)
            q, k, v = qkv.split(self.widths, -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        if self.part.qk_norm == "width":
            q, k = self.q_norm(q), self.k_norm(k)
        if clip is not None and not self.part.fused:
            q, k, v = q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
        return q, k, v

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
        q, k, v = self.project(x)
        q = q.view(B, T, self.num_heads, self.head_dim)
        k = k.view(B, T, self.kv_heads, self.head_dim)
        v = v.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        by_head = self.part.qk_norm.startswith("head")
        if by_head and not self.part.qk_norm_late:
            q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None and sin is not None:
            q = rotate_part(q, cos, sin, self.pairs)
            k = rotate_part(k, cos, sin, self.pairs)
            if by_head and self.part.qk_norm_late:
                q, k = self.q_norm(q), self.k_norm(k)
        if query_scale is not None:
            q = q * query_scale
        if self.gather is not None:
            k = self.gather(k)
            v = self.gather(v.transpose(1, 2)).transpose(1, 2)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        k = repeat_heads(k, self.num_heads // self.kv_heads)
        v = repeat_heads(v, self.num_heads // self.kv_heads)
        dropout = self.dropout.p if self.training else 0.0
        y = attend(
            q, k, v, mask, self.kind, dropout,
            scale=self.part.scale, cap=self.part.softcap, bias_h1T=bias, sinks_h=self.sinks,
        )  # fmt: skip
        if self.out_gate is not None:
            y = y.transpose(1, 2).reshape(B, T, self.widths[0]) * torch.sigmoid(self.out_gate(x))
            return self.dropout(self.out(y if self.out_norm is None else self.out_norm(y)))
        if self.out_norm is not None:
            return self.dropout(self.out(self.out_norm(y.transpose(1, 2).reshape(B, T, self.widths[0]))))
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, self.widths[0])))
