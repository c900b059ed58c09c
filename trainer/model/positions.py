"""Where a token stands: rows added to the embedding, rotated heads, or a bias of the scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.model.layers import INIT_STD

ROPE_THETA = 10_000.0  # Su et al. 2021, "RoFormer", section 3.2.2; Vaswani et al. 2017, section 3.5


class Positions(nn.Module):
    """Learned positions: rows start to start + T of the table, after `extra` rows (OPT's first two). Returns (T, d)."""

    def __init__(self, context_length: int, d_model: int, extra: int = 0) -> None:
        super().__init__()
        self.extra = extra
        self.weight = nn.Parameter(torch.empty(context_length + extra, d_model))
        nn.init.normal_(self.weight, std=INIT_STD)

    def forward(self, start: int, length: int) -> Tensor:
        return self.weight[start + self.extra : start + self.extra + length]


class Sinusoids(nn.Module):
    """Fixed positions: sines of d / 2 frequencies, then their cosines. Returns (T, d)."""

    table: Tensor

    def __init__(self, context_length: int, d_model: int) -> None:
        super().__init__()
        cos, sin = rope_tables(context_length, d_model)
        # A clone: of a context of 1 the slice is contiguous, and would keep the column that an odd width has over.
        table = torch.cat((sin, cos), -1)[:, :d_model].clone(memory_format=torch.contiguous_format)
        self.register_buffer("table", table, persistent=False)

    def forward(self, start: int, length: int) -> Tensor:
        return self.table[start : start + length]


def query_scales(context_length: int) -> Tensor:
    """What the queries of each position are multiplied with, (C): more from every 8,192nd on.

    Nakanishi 2025, "Scalable-Softmax", as Llama 4 has it: attn_scale 0.1, floor_scale 8,192.
    """
    position = torch.arange(context_length, dtype=torch.float32)
    return torch.log1p(torch.floor((position + 1.0) / 8192)) * 0.1 + 1.0


def rope_tables(context_length: int, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of position x frequency, each (C, width / 2)."""
    frequency = ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(context_length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BThe: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """Turn the pairs (i, i + e / 2) of each head by their position's angle, the layout of Llama's published weights."""
    a, b = x_BThe.chunk(2, -1)
    return torch.cat((a * cos_T1r - b * sin_T1r, a * sin_T1r + b * cos_T1r), -1)


def rotate_neighbours(x_BThe: Tensor, cos_T1r: Tensor, sin_T1r: Tensor) -> Tensor:
    """Turn the pairs (2 i, 2 i + 1) of each head by their position's angle, the layout of the paper."""
    a, b = x_BThe[..., 0::2], x_BThe[..., 1::2]
    return torch.stack((a * cos_T1r - b * sin_T1r, a * sin_T1r + b * cos_T1r), -1).flatten(-2)


ROTATIONS = {"halves": rotate, "neighbours": rotate_neighbours}


def rotate_part(x_BThe: Tensor, cos_T1r: Tensor, sin_T1r: Tensor, pairs: str) -> Tensor:
    """Rotate the first 2 r of each head, which may be all of it; what comes after stays."""
    width = 2 * cos_T1r.shape[-1]
    if width == x_BThe.shape[-1]:
        return ROTATIONS[pairs](x_BThe, cos_T1r, sin_T1r)
    return torch.cat((ROTATIONS[pairs](x_BThe[..., :width], cos_T1r, sin_T1r), x_BThe[..., width:]), -1)


def alibi_slopes(num_heads: int) -> Tensor:
    """A slope for each head, (h): 2^(-8 i / n) for n heads, a power of two; else every second of twice as many after.

    Press et al. 2022, "Train Short, Test Long", section 3, and the authors' code for other numbers of heads.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return torch.tensor((slopes + between)[:num_heads])


def alibi_bias(slopes_h: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of each key, (h, 1, length).

    A softmax does not change if all scores of a query grow alike, so slope x position of the key is as good as minus
    slope x distance, and needs no row for each query.
    """
    position = torch.arange(length, dtype=slopes_h.dtype, device=slopes_h.device)
    return (slopes_h[:, None, None] * position).to(dtype)
