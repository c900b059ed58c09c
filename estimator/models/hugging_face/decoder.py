"""`LlamaForCausalLM` with the loss that it returns, and decoders that are written like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.losses import torch_cross_entropy
from estimator.eager.tensor import FLOAT32, INT64, Locals, arguments
from estimator.eager.views import cast, contiguous
from estimator.models.decoder import Transformer
from estimator.models.hugging_face.block import HFBlock
from estimator.models.hugging_face.positions import look_for_packed_sequences, position_ids, rotary_embedding

if TYPE_CHECKING:
    from estimator.eager.tensor import Tensor
    from estimator.models.block import Block


class HFDecoder(Transformer):
    """`LlamaForCausalLM`: ids (B, T), labels (B, T) -> their loss."""

    build_block: type[Block] = HFBlock

    def rotary_tables(self) -> list[Tensor]:
        """The inverse frequencies, and their original."""
        half = self.machine.shapes.letters[self.recipe.rotated] / 2
        return [self.buffer(half) for _ in ("inv_freq", "original_inv_freq")]

    def forward(self, v: Locals, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        v.x = self.decoded(ids)
        v.logits = self.head(v.x)
        with self.machine.ledger.inside("loss"):
            return causal_lm_loss(v.logits, targets)

    def decoded(self, ids: Tensor) -> Tensor:
        """`LlamaModel`."""
        with Locals() as v:
            v.embeds = self.embedding(ids)
            v.positions = position_ids(self.machine, ids.shape[1])
            look_for_packed_sequences(v.positions, ids.shape[0])
            v.x = v.embeds
            v.cos = v.sin = None
            if self.recipe.rotates:
                rotary_embedding(v, v.positions, self.tables[0], v.x.dtype)
            for block in self.blocks:
                v.x = block(v.x, None, None, v.cos, v.sin, None, v.positions)
            v.x = self.final_norm(v.x)
            return v.take("x")


def causal_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """`ForCausalLMLoss`: the cross entropy of logits in fp32 and of labels moved by one."""
    machine, (B, T) = logits.machine, labels.shape
    with arguments((logits, labels)) as results, Locals() as v:
        v.logits = cast(logits, FLOAT32)
        v.labels = machine.empty((B, T + 1), INT64)
        machine.kernel("constant_pad_nd", (labels,), (v.labels,))
        v.shifted = contiguous(v.labels.view((B, T), v.labels.stride))
        results.append(torch_cross_entropy(v.logits, v.shifted))
    return results[0]
