"""Feed-forward networks of two or three matrices, and the activations between them."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from estimator.describe.parts import Norm
from trainer.model.layers import Linear
from trainer.model.norms import build_norm

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from estimator.describe.parts import MLP


def gelu_written_out(x: Tensor) -> Tensor:
    """GELU's tanh approximation in eight operators: what OpenAI's code of GPT-2 has (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


def relu_squared(x: Tensor) -> Tensor:
    """So et al. 2021, "Primer"."""
    return F.relu(x).pow(2)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": gelu_written_out,
    "relu": F.relu,
    "relu2": relu_squared,
}


class XIELU(nn.Module):
    """Huang and Schlag 2024: quadratic above 0, an integral of ELU below, both with a learned curvature.

    Attributes:
        alpha_p, alpha_n: (1), the curvatures before a softplus.
    """

    BETA, EPS, START = 0.5, -1e-6, 0.8

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([self.START]).expm1().log())
        self.alpha_n = nn.Parameter(torch.tensor([self.START - self.BETA]).expm1().log())

    def forward(self, x: Tensor) -> Tensor:
        above = F.softplus(self.alpha_p) * x * x + self.BETA * x
        below = (torch.expm1(x.clamp(max=self.EPS)) - x) * (self.BETA + F.softplus(self.alpha_n)) + self.BETA * x
        return torch.where(x > 0, above, below)


def build_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name, a module where it learns."""
    return XIELU() if name == "xielu" else ACTIVATIONS[name]


# gpt-oss's, in OpenAI's reference code: swiglu_limit, and an alpha that makes gate x sigmoid(alpha gate) nearly a GELU.
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """f(gate) * up, of equal shapes, f one of `ACTIVATIONS` or "clamped-swiglu"."""
    if activation != "clamped-swiglu":
        return ACTIVATIONS[activation](gate) * up
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return (up + 1.0) * (gate * torch.sigmoid(gate * SWIGLU_ALPHA))


class PlainFeedForward(nn.Module):
    """down(f(up(x))). Shapes: (..., d) -> (..., d), through f."""

    def __init__(self, part: MLP, d: int, f: int, dropout: float) -> None:
        super().__init__()
        self.activation = build_activation(part.activation)
        self.up = Linear(d, f, bias=part.bias)
        self.down_norm = build_norm(Norm("rms"), f) if part.down_norm else None
        self.down = Linear(f, d, bias=part.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.down_norm is not None:
            return self.dropout(self.down(self.down_norm(self.activation(self.up(x)))))
        return self.dropout(self.down(self.activation(self.up(x))))


class GatedFeedForward(nn.Module):
    """down(f(gate(x)) * up(x)), Shazeer 2020. Shapes: (..., d) -> (..., d), through f.

    Attributes:
        gate, up: two projections.
        gate_up: one of both, the gate's rows first.
        down_norm: an RMSNorm before the last, or None.
        down: back to the stream.
    """

    def __init__(self, part: MLP, d: int, f: int, dropout: float) -> None:
        super().__init__()
        self.fused, self.activation = part.fused, build_activation(part.activation)
        if part.fused:
            self.gate_up = Linear(d, 2 * f, bias=part.bias)
        else:
            self.gate = Linear(d, f, bias=part.bias)
            self.up = Linear(d, f, bias=part.bias)
        self.down_norm = build_norm(Norm("rms"), f) if part.down_norm else None
        self.down = Linear(f, d, bias=part.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            gate, up = self.gate_up(x).chunk(2, -1)
            return self.dropout(self.down(self.normed(self.activation(gate) * up)))
        return self.dropout(self.down(self.normed(self.activation(self.gate(x)) * self.up(x))))

    def normed(self, h: Tensor) -> Tensor:
        """What goes down."""
        return h if self.down_norm is None else self.down_norm(h)


def build_feed_forward(part: MLP, d: int, f: int, dropout: float) -> PlainFeedForward | GatedFeedForward:
    """The module of a declared feed-forward."""
    return (GatedFeedForward if part.gated else PlainFeedForward)(part, d, f, dropout)
