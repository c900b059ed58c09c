"""Norms over the last dimension: with their mean or without, and three kinds of weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from estimator.describe.parts import Norm

NORM_EPS = 1e-5


class ScaleAndShift(nn.Module):
    """What both kinds have: a weight that starts so that nothing is scaled, and a bias of zeros.

    Attributes:
        weight: of the norm's shape; None if it has none.
        bias: likewise.
        plus_one: 1 + weight scales, so that weight decay pulls towards an unscaled norm (Gemma).
    """

    def __init__(self, norm: Norm, *shape: int) -> None:
        super().__init__()
        self.width, self.plus_one = shape[-1:], norm.weight == "plus-one"
        start = torch.zeros if self.plus_one else torch.ones
        self.weight = nn.Parameter(start(shape)) if norm.weight != "none" else None
        self.bias = nn.Parameter(torch.zeros(shape)) if norm.bias else None


class LayerNorm(ScaleAndShift):
    """Ba et al. 2016. Shapes: (..., d) -> (..., d)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None and self.plus_one:
            return F.layer_norm(x, self.width, self.weight + 1.0, self.bias, NORM_EPS)
        return F.layer_norm(x, self.width, self.weight, self.bias, NORM_EPS)


class LayerNormOfHeads(ScaleAndShift):
    """LayerNorm with weights for each head. Shapes: (B, T, h, e) -> (B, T, h, e), weight (h, e)."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, self.width, None, None, NORM_EPS)
        if self.weight is not None:
            x = ((1.0 + self.weight) if self.plus_one else self.weight) * x
        return x if self.bias is None else x + self.bias


class RMSNorm(ScaleAndShift):
    """Zhang and Sennrich 2019. Shapes: (..., d) -> (..., d); of heads (B, T, h, e), weight (e) or (h, e)."""

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + NORM_EPS)
        if self.weight is None:
            return x * scale
        if self.plus_one:
            return (1.0 + self.weight) * (x * scale)
        return self.weight * (x * scale)


def build_norm(norm: Norm, *shape: int) -> ScaleAndShift:
    """The module of a declared norm over the last dimension, its weight of this shape."""
    if norm.kind == "rms":
        return RMSNorm(norm, *shape)
    return (LayerNorm if len(shape) == 1 else LayerNormOfHeads)(norm, *shape)
