"""The layers that all parts are made of, and how their weights start.

Shape suffixes are the legend's letters: B batch, T sequence, d width, h heads, k key/value heads, e head width,
f feed-forward width, V vocabulary, C positions; of experts E their number, K those of a token, N tokens, S their N K
copies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class NormedHead(Linear):
    """y = x (W / the lengths of its rows)^T, as Baichuan 2's head has it. Shapes: (..., d) -> (..., V)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.normalize(self.weight)
        return F.linear(x, weight, self.bias)


class Embedding(nn.Module):
    """Rows of a table by token id. Shapes: ids (B, T) -> (B, T, d)."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Squeeze `x` into (-cap, cap), smoothly (Gemma 2). Shapes: (...) -> (...)."""
    return cap * torch.tanh(x / cap)
