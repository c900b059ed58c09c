"""A block: attention and feed-forward, and how they are added to the stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from trainer.model.attention import Attention
from trainer.model.expert_attention import ExpertAttention
from trainer.model.experts import SparseFeedForward
from trainer.model.feed_forward import build_feed_forward
from trainer.model.latent import LatentAttention
from trainer.model.norms import build_norm

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.parts import Layer
    from estimator.describe.plan import Plan
    from trainer.model.attention import KeysAndValues

# Of each order in `estimator.describe.parts.ORDERS`, the norms that a block has.
NORMS = {
    "pre": ("attention_norm", "ffn_norm"),
    "post": ("attention_post_norm", "ffn_post_norm"),
    "sandwich": ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"),
    "post-sum": ("attention_post_norm", "ffn_post_norm"),
    "parallel": ("attention_norm",),
    "parallel-two": ("attention_norm", "ffn_norm"),
}


def build_attention(m: ModelConfig, p: Plan) -> Attention | LatentAttention | ExpertAttention:
    """The module of the declared attention."""
    if m.made_of.attention.experts:
        return ExpertAttention(m, p)
    return (Attention if m.made_of.attention.latent == "none" else LatentAttention)(m, p)


class Block(nn.Module):
    """One layer. Shapes: (B, T, d) -> (B, T, d); the other arguments are `Attention`'s.

    Attributes:
        attention_norm, ffn_norm: before attention and feed-forward.
        attention_post_norm, ffn_post_norm: after them, or after they have been added.
        attention, ffn: what the block adds.
    """

    attention_norm: nn.Module
    attention_post_norm: nn.Module
    ffn_norm: nn.Module
    ffn_post_norm: nn.Module

    def __init__(self, m: ModelConfig, p: Plan, layer: Layer) -> None:
        super().__init__()
        parts = m.made_of
        self.order, self.scale = parts.order, parts.residual_scale
        self.add_norm(m, "attention_norm")
        self.attention = build_attention(m, p)
        self.add_norm(m, "attention_post_norm")
        self.add_norm(m, "ffn_norm")
        self.ffn = SparseFeedForward(m, p) if layer.sparse else build_feed_forward(parts.mlp, m.d_model, m.f, p.dropout)
        self.add_norm(m, "ffn_post_norm")

    def add_norm(self, m: ModelConfig, name: str) -> None:
        """The norm of this name, if blocks of this order have one."""
        if name in NORMS[self.order]:
            self.add_module(name, build_norm(m.made_of.norm, m.d_model))

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
        where = mask, bias, cos, sin, query_scale, cache
        match self.order:
            case "pre":
                x = x + self.scaled(self.attention(self.attention_norm(x), *where))
                return x + self.scaled(self.ffn(self.ffn_norm(x)))
            case "post":
                x = x + self.scaled(self.attention_post_norm(self.attention(x, *where)))
                return x + self.scaled(self.ffn_post_norm(self.ffn(x)))
            case "sandwich":
                x = x + self.scaled(self.attention_post_norm(self.attention(self.attention_norm(x), *where)))
                return x + self.scaled(self.ffn_post_norm(self.ffn(self.ffn_norm(x))))
            case "post-sum":
                x = self.attention_post_norm(x + self.scaled(self.attention(x, *where)))
                return self.ffn_post_norm(x + self.scaled(self.ffn(x)))
            case "parallel":
                y = self.attention_norm(x)
                return x + self.scaled(self.attention(y, *where)) + self.scaled(self.ffn(y))
            case _:  # "parallel-two"
                y = x + self.scaled(self.attention(self.attention_norm(x), *where))
                return y + self.scaled(self.ffn(self.ffn_norm(x)))

    def scaled(self, x: Tensor) -> Tensor:
        """What is added to the stream."""
        return x if self.scale is None else x * self.scale
