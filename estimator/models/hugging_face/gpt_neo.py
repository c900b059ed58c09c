"""`GPTNeoForCausalLM`: eager in any case."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import autocast, ops
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE
from estimator.eager.linalg import matmul
from estimator.eager.pointwise import where
from estimator.eager.tensor import BOOL, FLOAT32, Locals, arguments
from estimator.eager.views import cast, transpose, unsqueeze, view
from estimator.models.hugging_face.attention import HFAttention
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.gpt2 import NamedBlock
from estimator.models.hugging_face.learned import embedded_positions
from estimator.models.hugging_face.masks import attention_mask
from estimator.models.hugging_face.positions import look_for_packed_sequences, position_ids
from estimator.models.layers import dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class GPTNeoAttention(HFAttention):
    """`GPTNeoSelfAttention`, with a mask of its own beside that which it is given."""

    drops = True

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.owned = [self.k, self.v, self.q, self.out]
        length = machine.shapes.letters["C"]
        with self.inside():
            self.mask = machine.empty((ONE, ONE, length, length), BOOL, category=Category.BUFFER).hold()

    def project(self, v: Locals, x: Tensor) -> None:
        """All three, then heads."""
        v.q = self.q(x)
        v.k = self.k(x)
        v.v = self.v(x)
        v.q = transpose(self.heads(v.q, self.h), 1, 2)
        v.k = transpose(self.heads(v.k, self.h), 1, 2)
        v.v = transpose(self.heads(v.v, self.h), 1, 2)

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`_attn`."""
        machine, T = self.machine, q.shape[2]
        with arguments((q, k, v, mask)) as results, Locals() as w:
            w.q = cast(q, FLOAT32)
            w.k = cast(k, FLOAT32)
            w.weights = matmul(w.q, transpose(w.k, 2, 3))
            w.mask = self.mask.view((ONE, ONE, T, T), self.mask.stride)
            w.least = machine.empty((), w.weights.dtype)
            w.weights = where(w.mask, w.weights, w.least)
            if mask is not None:
                w.weights = ops.add(w.weights, mask)
            w.weights = ops.softmax(w.weights, autocast.fp32(machine, "cuda"))
            w.weights = cast(w.weights, v.dtype)
            w.weights = dropout(w.weights, self.recipe)
            w.y = matmul(w.weights, v)
            results.append((transpose(w.y, 1, 2), w.take("weights")))
        found: tuple[Tensor, Tensor] = results[0]
        return found


class GPTNeoBlock(NamedBlock):
    """`GPTNeoBlock`, which returns the weights too."""

    build_attention = staticmethod(GPTNeoAttention)
    positional = 1

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = super().forward(v, x, *where)
        assert not isinstance(out, tuple)
        return out, v.take("weights")


class GPTNeo(HFDecoder):
    """`GPTNeoForCausalLM`."""

    build_block = GPTNeoBlock

    @property
    def buffers(self) -> list[Tensor]:
        """The masks of all layers."""
        return [block.attention.mask for block in self.blocks]

    def decoded(self, ids: Tensor) -> Tensor:
        """`GPTNeoModel`."""
        machine, (B, T) = self.machine, ids.shape
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.positions = position_ids(machine, T)
            look_for_packed_sequences(v.positions, B)
            v.mask = attention_mask(machine, T, B, "full", v.embeds.dtype, eager=True)
            v.position_embeds = embedded_positions(self.positions, unsqueeze(v.positions, 0))
            v.x = ops.add(v.embeds, v.position_embeds)
            v.x = dropout(v.x, self.recipe)
            for block in self.blocks:
                v.out, v.weights = block(v.x, v.mask, None, None, None, None, None)
                v.x = v.out
            v.x = self.final_norm(v.x)
            v.x = view(v.x, v.x.shape)
            return v.take("x")
