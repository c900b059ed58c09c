"""`BloomForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.autocast import lower
from estimator.eager.autograd import Context, attach, record
from estimator.eager.letters import ONE
from estimator.eager.linalg import baddbmm, bmm
from estimator.eager.losses import saved_at_last
from estimator.eager.tensor import FLOAT32, INT64, Locals, arguments, op
from estimator.eager.views import cast, expand, repeat_all, reshape, select, transpose, view
from estimator.models.block import Block
from estimator.models.feed_forward import PlainFeedForward
from estimator.models.hugging_face.alibi import alibi_slopes
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.masks import attention_mask
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.describe.parts import MLP
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class BloomAttention(HFAttention):
    """`BloomAttention`, with the residual: eager in any case."""

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        alibi: Tensor | None,
        residual: Tensor | None,
        *_: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        assert residual is not None
        assert alibi is not None
        (B, T), heads = x.shape[:2], self.machine.product((x.shape[0], self.h))
        v.qkv = self.qkv(x)
        self.by_head(v, (*x.shape[:2], self.h, 3 * ONE, self.e))
        v.q = reshape(v.q, (heads, T, self.e))
        v.k = transpose(reshape(v.k, (heads, T, self.e)), 1, 2)
        v.v = reshape(v.v, (heads, T, self.e))
        v.scores = added_to_product(alibi, v.q, v.k)
        v.weights = view(v.scores, (B, self.h, T, T))
        if mask is not None:
            v.weights = ops.add(v.weights, mask)
        v.probs = cast(ops.softmax(v.weights, FLOAT32), v.q.dtype)
        v.probs = dropout(v.probs, self.recipe)
        v.reshaped = view(v.probs, (heads, T, T))
        v.context = bmm(*lower(v.reshaped, v.v))
        v.context = reshape(transpose(view(v.context, (B, self.h, T, self.e)), 1, 2), (B, T, self.widths[0]))
        v.out = self.out(v.context)
        v.out = dropout_add(v.out, residual, self.recipe)
        return v.take("out"), v.take("probs")

    def by_head(self, v: Locals, shape: tuple[Size, ...]) -> None:
        """`_reshape`."""
        with Locals() as w:
            w.qkv = view(v.qkv, shape)
            v.q, v.k, v.v = (transpose(select(w.qkv, 3), 1, 2) for _ in range(3))


def dropout_add(x: Tensor, residual: Tensor, recipe: Recipe) -> Tensor:
    """residual + dropout(x)."""
    with arguments((x, residual)) as results, Locals() as w:
        w.out = dropout(x, recipe)
        results.append(ops.add(residual, w.out))
    return results[0]


def added_to_product(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """base.baddbmm(a, b, beta=1, alpha): of a base with a row for each matrix."""
    return _added_to_product(*lower(base, a, b))


@op
def _added_to_product(base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return baddbmm(expand(base, (*a.shape[:2], b.shape[2])), a, b, scales=True)


@op
def bloom_gelu(x: Tensor) -> Tensor:
    """`GeLUFunction`: the tanh approximation, which saves its input and computes its gradient in 18 operators."""

    def backward(c: Context, grad: Tensor) -> Gradients:
        (x,) = c.saved
        with Locals() as w:
            w.tanh = inner_tanh(x)
            w.half = ops.with_number("mul", x)
            w.factor = ops.with_number("sub", ops.elementwise("mul", w.tanh, w.tanh))
            square = ops.elementwise("mul", ops.with_number("mul", x), x)
            inner = ops.elementwise("mul", w.take("factor"), ops.with_number("add", square))
            w.first = ops.elementwise("mul", w.take("half"), inner)
            second = ops.with_number("mul", ops.with_number("add", w.tanh))
            w.ff = ops.elementwise("add", w.take("first"), second)
            c.out = ops.elementwise("mul", w.ff, grad)
        return [c.take("out")]

    node = record("GeLUFunctionBackward", (x,), backward)
    with x.machine.no_grad(), Locals() as w:
        w.half = ops.with_number("mul", x)
        w.out = ops.elementwise("mul", w.take("half"), ops.with_number("add", inner_tanh(x)))
        out, saved = attach(node, w.take("out")), [x.hold()]
    saved_at_last(node, saved)
    return out


def inner_tanh(x: Tensor) -> Tensor:
    """tanh(c x (1 + d x x))."""
    with Locals() as w:
        w.scaled = ops.with_number("mul", x)
        bent = ops.with_number("add", ops.elementwise("mul", ops.with_number("mul", x), x))
        return ops.elementwise("tanh", ops.elementwise("mul", w.take("scaled"), bent))


class BloomMLP(PlainFeedForward):
    """`BloomMLP`, with the residual."""

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        (residual,) = where
        assert residual is not None
        v.x = bloom_gelu(self.up(x))
        v.between = self.down(v.x)
        v.out = dropout_add(v.between, residual, self.recipe)
        return v.take("out")


def build_feed_forward(machine: Machine, part: MLP, d: Size, f: Size, recipe: Recipe) -> BloomMLP:
    """Its `mlp`."""
    return BloomMLP(machine, "ffn", part, d, f, recipe)


class BloomBlock(Block):
    """`BloomBlock`."""

    build_attention = staticmethod(BloomAttention)
    build_feed_forward = staticmethod(build_feed_forward)
    positional = 1

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v.normed = self.attention_norm(x)
        v.residual = x
        v.y, v.weights = self.attention(v.normed, *where, v.residual)
        v.normed = self.ffn_norm(v.y)
        v.residual = v.y
        v.x = self.ffn(v.normed, v.residual)
        return v.take("x"), v.take("weights")


class Bloom(HFDecoder):
    """`BloomForCausalLM`."""

    build_block = BloomBlock

    def decoded(self, ids: Tensor) -> Tensor:
        """`BloomModel`."""
        machine, (B, T) = self.machine, ids.shape
        with Locals() as v:
            v.embeds = self.embedding(ids)
            assert self.embedding_norm is not None
            v.x = self.embedding_norm(v.embeds)
            with Locals() as w:
                alibi_slopes(w, machine, machine.shapes.letters["h"])
                v.slopes = w.slopes
            with Locals() as w:
                w.keys = machine.empty((T,), INT64)
                v.alibi = ops.elementwise("mul", view(v.slopes, (*v.slopes.shape, ONE, ONE)), w.keys)
            v.alibi = cast(repeat_all(v.alibi, 0, B), v.x.dtype)
            v.mask = attention_mask(machine, T, B, "full", v.embeds.dtype, eager=True)
            for block in self.blocks:
                v.out, v.weights = block(v.x, v.mask, v.alibi)
                v.x = v.out
            v.x = self.final_norm(v.x)
            return v.take("x")
