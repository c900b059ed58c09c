"""`OpenAIGPTLMHeadModel`: eager in any case, and without checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import autocast, ops
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE
from estimator.eager.linalg import matmul
from estimator.eager.tensor import INT64, Locals, arguments
from estimator.eager.views import contiguous_of, split, transpose, view
from estimator.models.block import Block
from estimator.models.feed_forward import PlainFeedForward
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt2 import Conv1D
from estimator.models.hugging_face.learned import embedded_positions
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class OpenAIAttention(HFAttention):
    """`Attention`, with a mask of numbers of its own."""

    linear = Conv1D

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        length = machine.shapes.letters["C"]
        with self.inside():
            shape = (ONE, ONE, length, length)
            self.mask = machine.empty(shape, machine.dtype, category=Category.BUFFER).hold()

    def forward(self, v: Locals, x: Tensor, *_: Tensor | None) -> tuple[Tensor, None]:
        B, T = x.shape[:2]
        v.x = self.qkv(x)
        v.q, v.k, v.v = split(v.x, self.widths)
        v.q = transpose(self.heads(v.q, self.h), 1, 2)
        v.k = transpose(transpose(self.heads(v.k, self.h), 1, 2), 2, 3)
        v.v = transpose(self.heads(v.v, self.h), 1, 2)
        v.outputs = v.y = self.products(v.q, v.k, v.v)
        v.y = view(contiguous_of(transpose(v.y, 1, 2)), (B, T, self.widths[0]))
        v.y = self.out(v.y)
        v.y = dropout(v.y, self.recipe)
        return v.take("y"), None

    def products(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`_attn`, of keys (B, h, e, T)."""
        T = q.shape[2]
        with arguments((q, k, v)) as results, Locals() as w:
            w.w = matmul(q, k)
            w.w = ops.div_number(w.w)
            w.b = self.mask.view((ONE, ONE, T, T), self.mask.stride)
            w.masked = ops.mul(w.w, w.b)
            w.least = ops.with_number("mul", ops.with_number("sub", w.b))
            w.w = ops.add(w.take("masked"), w.take("least"))
            w.w = ops.softmax(w.w, autocast.fp32(q.machine, "cuda"))
            w.w = dropout(w.w, self.recipe)
            results.append(matmul(w.w, v))
        found: Tensor = results[0]
        return found


class OpenAIMLP(PlainFeedForward):
    """`MLP`."""

    linear = Conv1D

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.h = self.activation(self.up(x))
        v.h2 = self.down(v.h)
        return dropout(v.h2, self.recipe)


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> OpenAIMLP:
    """Its `mlp`."""
    return OpenAIMLP(machine, "ffn", part, d, f, recipe)


class OpenAIBlock(Block):
    """`Block`."""

    build_attention = staticmethod(OpenAIAttention)
    build_feed_forward = staticmethod(build_feed_forward)

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.a, _ = self.attention(x)
        v.n = self.attention_post_norm(ops.add(x, v.a))
        v.m = self.ffn(v.n)
        v.h = self.ffn_post_norm(ops.add(v.n, v.m))
        return v.take("h")


class OpenAIGPT(HFDecoder):
    """`OpenAIGPTLMHeadModel`."""

    build_block = OpenAIBlock

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        length = machine.shapes.letters["C"]
        self.tables.append(machine.empty((length,), INT64, category=Category.BUFFER).hold())

    @property
    def buffers(self) -> list[Tensor]:
        """The positions, and the masks of all layers."""
        return [*self.tables, *(block.attention.mask for block in self.blocks)]

    def decoded(self, ids: Tensor) -> Tensor:
        """`OpenAIGPTModel`."""
        with Locals() as v:
            v.positions = self.tables[0].view((ONE, ids.shape[1]), (ONE, ONE))
            v.embeds = self.embedding(ids)
            v.position_embeds = embedded_positions(self.positions, v.positions)
            v.x = ops.add_number(ops.add(v.embeds, v.position_embeds))
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.outputs = block(v.x)
                v.x = v.outputs
            v.x = view(v.x, v.x.shape)
            return v.take("x")
