"""`PersimmonForCausalLM`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.tensor import Locals
from estimator.eager.views import select, transpose, view
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.block import HFBlock
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt_neox import build_feed_forward
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Tensor


class PersimmonAttention(HFAttention):
    """`PersimmonAttention`."""

    def project(self, v: Locals, x: Tensor) -> None:
        """All three at once, head by head, normed before they are by head."""
        v.qkv = self.qkv(x)
        with Locals() as w:
            w.qkv = view(v.qkv, (*x.shape[:2], self.h, 3 * ONE, self.e))
            v.q, v.k, v.v = (select(w.qkv, 3) for _ in range(3))
        self.norms(v)
        v.q = transpose(v.q, 1, 2)
        v.v = transpose(v.v, 1, 2)
        v.k = transpose(v.k, 1, 2)


class PersimmonBlock(HFBlock):
    """`PersimmonDecoderLayer`: what attention finds is not dropped."""

    build_attention = staticmethod(PersimmonAttention)
    build_feed_forward = staticmethod(build_feed_forward)

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.residual = x
        v.x = self.attention_norm(x)
        v.x, v.weights = self.attention(v.x, *where[:-1])
        v.x = ops.add(v.residual, v.x)
        v.residual = v.x
        v.x = self.ffn_norm(v.x)
        v.x = self.ffn(v.x)
        v.x = dropout(v.x, self.recipe)
        v.x = ops.add(v.x, v.residual)
        return v.take("x")


class Persimmon(HFDecoder):
    """`PersimmonForCausalLM`."""

    build_block = PersimmonBlock
