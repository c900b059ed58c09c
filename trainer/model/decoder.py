"""The two model families in plain PyTorch, built from a `ModelConfig` and a `Plan`.

The ledger of `estimator.models` repeats these forwards statement by statement, under the same module names: a changed
line here is a changed line there, and `validate-estimates` says which one was forgotten.

Shape suffixes are the legend's letters (`estimator.eager.symbols`): B batch, T sequence, d width, h heads, k key/value
heads, e head width, f feed-forward width, V vocabulary, C positions.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from trainer.model.loss import chunked_cross_entropy

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

ROPE_THETA = 10_000.0  # Su et al. 2021, "RoFormer", section 3.2.2
NORM_EPS = 1e-5
KERNELS = {  # "sdpa" leaves the choice to PyTorch
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
# What a selective checkpoint keeps, as torchtitan does: the linear layers' products and the fused attention's results.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 - the operators' names
    torch.ops.aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
]
# By `Plan.checkpointing`, the contexts of a block's forward and of its recomputation.
RECOMPUTED: dict[str, Callable[[], Any]] = {
    "block": noop_context_fn,
    "selective": partial(create_selective_checkpoint_contexts, KEPT),
}
INIT_STD = 0.02  # Radford et al. 2019, GPT-2; residual projections are scaled by 1 / sqrt(2 L)


class Linear(nn.Module):
    """y = x W^T (+ b). Shapes: (..., in) -> (..., out)."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of a table by token id. Shapes: ids (B, T) -> (B, T, d)."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class Positions(nn.Module):
    """Learned positions: rows start to start + T of the table. Returns (T, d)."""

    def __init__(self, context_length: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(context_length, d_model))
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, start: int, length: int) -> Tensor:
        return self.weight[start : start + length]


class LayerNorm(nn.Module):
    """Ba et al. 2016, with weight and bias. Shapes: (..., d) -> (..., d)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019. Shapes: (..., d) -> (..., d)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        return self.weight * (x * scale)


def rope_tables(context_length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (C, e / 2)."""
    frequency = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.arange(context_length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BThe: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """Turn the pairs (i, i + e / 2) of each head by their position's angle, the layout of Llama's published weights."""
    a, b = x_BThe.chunk(2, -1)
    return torch.cat((a * cos_T1r - b * sin_T1r, a * sin_T1r + b * cos_T1r), -1)


def repeat_heads(x_BkTe: Tensor, groups: int) -> Tensor:
    """(B, k, T, e) -> (B, k groups, T, e): every key/value head serves `groups` query heads; a copy unless 1."""
    if groups == 1:
        return x_BkTe
    B, k, T, e = x_BkTe.shape
    return x_BkTe[:, :, None].expand(B, k, groups, T, e).reshape(B, k * groups, T, e)


def attend(q_BhTe: Tensor, k_BhTe: Tensor, v_BhTe: Tensor, mask_TT: Tensor | None, kind: str, dropout: float) -> Tensor:
    """Causal attention, (B, h, T, e), by separate ops or by SDPA; the mask is `Transformer.mask`'s.

    Without a mask the queries are either all positions or, with a cache, the last one alone, which may look at all.
    `kind` is `Plan.attention`; `dropout` is a probability, of the weights.
    """
    if not kind.startswith("naive"):
        causal = mask_TT is None and q_BhTe.shape[2] == k_BhTe.shape[2]
        # CUDA's flash takes no mask: with one, PyTorch picks (on the CPU, its flash).
        kernel = None if kind == "sdpa-flash" and mask_TT is not None else KERNELS.get(kind)
        with sdpa_kernel(kernel) if kernel is not None else nullcontext():
            return F.scaled_dot_product_attention(q_BhTe, k_BhTe, v_BhTe, mask_TT, dropout, causal)
    assert mask_TT is not None
    scores_BhTT = q_BhTe @ k_BhTe.transpose(-2, -1)
    scores_BhTT = scores_BhTT * (1 / math.sqrt(q_BhTe.shape[-1]))
    scores_BhTT = scores_BhTT.masked_fill(mask_TT, float("-inf"))
    if kind == "naive-fp32":
        weights_BhTT = torch.softmax(scores_BhTT, -1, dtype=torch.float32).to(q_BhTe.dtype)
    else:
        weights_BhTT = torch.softmax(scores_BhTT, -1)
    weights_BhTT = F.dropout(weights_BhTT, dropout)
    return weights_BhTT @ v_BhTe


class KeysAndValues:
    """What one block has computed of the tokens so far: generation's cache, (B, k, C, e) each, filled from the left."""

    def __init__(self, m: ModelConfig, batch_size: int, like: Tensor) -> None:
        shape = batch_size, m.kv_heads, m.context_length, m.e
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def extend(self, k_BkTe: Tensor, v_BkTe: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of T new tokens; views of all so far, (B, k, length, e)."""
        start, self.length = self.length, self.length + k_BkTe.shape[2]
        self.keys[:, :, start : self.length] = k_BkTe
        self.values[:, :, start : self.length] = v_BkTe
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class GPT2Attention(nn.Module):
    """Multi-head attention with one fused projection. Shapes: (B, T, d) -> (B, T, d)."""

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.num_heads, self.kind = m.num_heads, p.attention
        self.qkv = Linear(m.d_model, 3 * m.d_model, bias=True)
        self.out = Linear(m.d_model, m.d_model, bias=True)
        self.dropout = nn.Dropout(p.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeysAndValues | None = None) -> Tensor:
        B, T, d = x.shape
        q, k, v = self.qkv(x).split(d, -1)
        q = q.view(B, T, self.num_heads, -1).transpose(1, 2)
        k = k.view(B, T, self.num_heads, -1).transpose(1, 2)
        v = v.view(B, T, self.num_heads, -1).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        y = attend(q, k, v, mask, self.kind, self.dropout.p if self.training else 0.0)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, d)))


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions. Shapes: (B, T, d) -> (B, T, d)."""

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim, self.kind = m.num_heads, m.kv_heads, m.e, p.attention
        self.q = Linear(m.d_model, m.num_heads * m.e, bias=bool(m.qkv_bias))
        self.k = Linear(m.d_model, m.kv_heads * m.e, bias=bool(m.qkv_bias))
        self.v = Linear(m.d_model, m.kv_heads * m.e, bias=bool(m.qkv_bias))
        self.out = Linear(m.num_heads * m.e, m.d_model, bias=False)
        self.dropout = nn.Dropout(p.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeysAndValues | None = None
    ) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, self.num_heads, self.head_dim)
        k = self.k(x).view(B, T, self.kv_heads, self.head_dim)
        v = self.v(x).view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        q = rotate(q, cos, sin).transpose(1, 2)
        k = rotate(k, cos, sin).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(k, v)
        k = repeat_heads(k, self.num_heads // self.kv_heads)
        v = repeat_heads(v, self.num_heads // self.kv_heads)
        y = attend(q, k, v, mask, self.kind, self.dropout.p if self.training else 0.0)
        return self.dropout(self.out(y.transpose(1, 2).reshape(B, T, self.num_heads * self.head_dim)))


class GELUFeedForward(nn.Module):
    """down(gelu(up(x))). Shapes: (B, T, d) -> (B, T, d), through f."""

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.up = Linear(m.d_model, m.f, bias=True)
        self.down = Linear(m.f, m.d_model, bias=True)
        self.dropout = nn.Dropout(p.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))


class SwiGLUFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020. Shapes: (B, T, d) -> (B, T, d), through f."""

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.gate = Linear(m.d_model, m.f, bias=False)
        self.up = Linear(m.d_model, m.f, bias=False)
        self.down = Linear(m.f, m.d_model, bias=False)
        self.dropout = nn.Dropout(p.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x)) * self.up(x)))


class GPT2Block(nn.Module):
    """Pre-norm block. Shapes: (B, T, d) -> (B, T, d)."""

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(m.d_model)
        self.attention = GPT2Attention(m, p)
        self.ffn_norm = LayerNorm(m.d_model)
        self.ffn = GELUFeedForward(m, p)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeysAndValues | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class LlamaBlock(nn.Module):
    """Pre-norm block. Shapes: (B, T, d) -> (B, T, d)."""

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(m.d_model)
        self.attention = LlamaAttention(m, p)
        self.ffn_norm = RMSNorm(m.d_model)
        self.ffn = SwiGLUFeedForward(m, p)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeysAndValues | None = None
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, cache)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V), or with targets (B, T) their loss: what both families share.

    With a cache, `forward` takes the ids of the next T positions and attends to those before them as well.
    """

    blocks: nn.ModuleList

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        self.config, self.plan = m, p
        self.embedding = Embedding(m.vocab_size, m.d_model)
        self.dropout = nn.Dropout(p.dropout)
        self.build(m, p)
        if p.checkpointing == "attention":
            for block in self.blocks[p.checkpoint_every - 1 :: p.checkpoint_every]:
                attention = block.get_submodule("attention")
                attention.forward = recomputed(attention.forward)
        self.head = Linear(m.d_model, m.vocab_size, bias=False)
        if m.tie_embeddings:
            self.head.weight = self.embedding.weight
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "ffn.down.weight")):
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * m.num_layers))

    def build(self, m: ModelConfig, p: Plan) -> None:
        """Make the family's own modules."""
        raise NotImplementedError

    def mask(self, ids_BT: Tensor, start: int) -> Tensor | None:
        """(T, start + T), one for all blocks; None where `attend` needs none.

        For separate ops True is where a query must not look, for SDPA where it may: what each of them takes.
        """
        T, window = ids_BT.shape[1], self.config.sliding_window
        naive, windowed = self.plan.attention.startswith("naive"), window is not None and start + T > window
        if not naive and not windowed and (start == 0 or T == 1):
            return None
        every = torch.ones(T, start + T, dtype=torch.bool, device=ids_BT.device)
        if naive and not windowed:
            return every.triu(start + 1)
        seen = every.tril_(start)
        if window is not None:
            seen.triu_(start + 1 - window)
        return seen.logical_not_() if naive else seen

    def new_cache(self, batch_size: int) -> list[KeysAndValues]:
        """An empty cache for `forward`, one entry a block, in the weights' dtype and on their device."""
        return [KeysAndValues(self.config, batch_size, self.head.weight) for _ in range(self.config.num_layers)]

    def logits_or_loss(self, x: Tensor, targets_BT: Tensor | None) -> Tensor:
        """The head's logits (B, T, V); with targets the chunked cross entropy, for which they never exist at once."""
        return self.head(x) if targets_BT is None else chunked_cross_entropy(x, self.head.weight, targets_BT)

    def run_block(self, layer: int, *args: Tensor | KeysAndValues | None) -> Tensor:
        """Block `layer` of `args`, checkpointed if the plan says so."""
        block, p = self.blocks[layer], self.plan
        contexts = RECOMPUTED.get(p.checkpointing)
        if contexts is None or (layer + 1) % p.checkpoint_every or not torch.is_grad_enabled():
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` under activation checkpointing, as it is where there is no backward to come."""

    def call(*args: Tensor | KeysAndValues | None) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return call


class GPT2(Transformer):
    """Radford et al. 2019."""

    def build(self, m: ModelConfig, p: Plan) -> None:
        self.positions = Positions(m.context_length, m.d_model)
        self.blocks = nn.ModuleList(GPT2Block(m, p) for _ in range(m.num_layers))
        self.final_norm = LayerNorm(m.d_model)

    def forward(
        self, ids_BT: Tensor, cache: list[KeysAndValues] | None = None, targets_BT: Tensor | None = None
    ) -> Tensor:
        start = cache[0].length if cache else 0
        x = self.dropout(self.embedding(ids_BT) + self.positions(start, ids_BT.shape[1]))
        mask = self.mask(ids_BT, start)
        for layer in range(len(self.blocks)):
            x = self.run_block(layer, x, mask, cache[layer] if cache else None)
        return self.logits_or_loss(self.final_norm(x), targets_BT)


class Llama(Transformer):
    """Touvron et al. 2023; with biases on q, k and v it is Qwen2."""

    cos: Tensor
    sin: Tensor

    def build(self, m: ModelConfig, p: Plan) -> None:
        self.blocks = nn.ModuleList(LlamaBlock(m, p) for _ in range(m.num_layers))
        self.final_norm = RMSNorm(m.d_model)
        cos, sin = rope_tables(m.context_length, m.e)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(
        self, ids_BT: Tensor, cache: list[KeysAndValues] | None = None, targets_BT: Tensor | None = None
    ) -> Tensor:
        start = cache[0].length if cache else 0
        x = self.dropout(self.embedding(ids_BT))
        end = start + ids_BT.shape[1]
        cos, sin = self.cos[start:end, None], self.sin[start:end, None]
        mask = self.mask(ids_BT, start)
        for layer in range(len(self.blocks)):
            x = self.run_block(layer, x, cos, sin, mask, cache[layer] if cache else None)
        return self.logits_or_loss(self.final_norm(x), targets_BT)


def build_model(m: ModelConfig, p: Plan) -> Transformer:
    """The trainable model of `m`, whose attention and checkpointing are `p`'s, in fp32 on the default device."""
    return {"gpt2": GPT2, "llama": Llama}[m.family](m, p)
