"""`GPT2LMHeadModel`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.autocast import lower
from estimator.eager.linalg import addmm
from estimator.eager.tensor import Locals
from estimator.eager.views import split, transpose, unsqueeze, view
from estimator.models.block import Block
from estimator.models.feed_forward import PlainFeedForward
from estimator.models.hugging_face.attention import OwnSoftmax
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.learned import embedded_positions
from estimator.models.hugging_face.positions import position_ids
from estimator.models.layers import Linear, Module, dropout

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class Conv1D(Linear):
    """x W + b, with a weight (d_in, d_out)."""

    def __init__(self, machine: Machine, name: str, d_in: Size, d_out: Size, *, bias: bool) -> None:
        Module.__init__(self, machine, name)
        self.weight, self.bias = self.parameter(d_in, d_out), self.parameter(d_out) if bias else None

    @property
    def widths(self) -> tuple[Size, Size]:
        """Of what comes out and of what goes in."""
        narrow, wide = self.weight.shape
        return wide, narrow

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.weight.shape[1])
        v.x = view(x, (self.machine.product(x.shape[:-1]), x.shape[-1]))
        v.x = addmm(*lower(self.bias, v.x, self.weight))
        return view(v.x, shape)


class GPT2Attention(OwnSoftmax):
    """`GPT2Attention`."""

    linear = Conv1D
    drops = True

    def project(self, v: Locals, x: Tensor) -> None:
        """All three at once; keys and values become heads before queries do."""
        v.q, v.k, v.v = split(self.qkv(x), self.widths)
        v.k = transpose(self.heads(v.k, self.k_heads), 1, 2)
        v.v = transpose(self.heads(v.v, self.k_heads), 1, 2)
        v.q = transpose(self.heads(v.q, self.h), 1, 2)


class GPT2MLP(PlainFeedForward):
    """`GPT2MLP`: the tanh approximation of GELU is written out."""

    linear = Conv1D

    def __init__(self, machine: Machine, name: str, part: MLP, d: Size, f: Size, recipe: Recipe) -> None:
        written_out = part.activation == "gelu_tanh"
        super().__init__(machine, name, replace(part, activation="gelu_new") if written_out else part, d, f, recipe)


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> GPT2MLP:
    """Its `mlp`."""
    return GPT2MLP(machine, "ffn", part, d, f, recipe)


class NamedBlock(Block):
    """A block before whose parts norms are, and whose names are those of `GPT2Block`."""

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor | tuple[Tensor, Tensor | None]:
        v.residual = x
        v.x = self.attention_norm(x)
        v.y, v.weights = self.attention(v.x, *where[:-1])
        v.x = ops.add(v.y, v.residual)
        v.residual = v.x
        v.x = self.ffn_norm(v.x)
        v.ffn = self.ffn(v.x)
        v.x = ops.add(v.residual, v.ffn)
        return v.take("x")


class GPT2Block(NamedBlock):
    """`GPT2Block`."""

    build_attention = staticmethod(GPT2Attention)
    build_feed_forward = staticmethod(build_feed_forward)
    positional = 2


class GPT2(HFDecoder):
    """`GPT2LMHeadModel`."""

    build_block = GPT2Block

    def decoded(self, ids: Tensor) -> Tensor:
        """`GPT2Model`."""
        B, T = ids.shape
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.positions = position_ids(self.machine, T)
            v.position_embeds = embedded_positions(self.positions, unsqueeze(v.positions, 0))
            v.x = ops.add(v.embeds, v.position_embeds)
            masks = self.attention_masks(v, B)
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.x = block(v.x, masks["full"], None, None, None, None, v.positions)
            v.x = self.final_norm(v.x)
            v.x = view(v.x, v.x.shape)
            return v.take("x")
