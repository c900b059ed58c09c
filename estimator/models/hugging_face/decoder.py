"""`LlamaForCausalLM` with the loss that it returns, and decoders that are written like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.ledger import Category
from estimator.eager.losses import torch_cross_entropy
from estimator.eager.pointwise import tanh
from estimator.eager.tensor import FLOAT32, INT64, Locals, arguments
from estimator.eager.views import cast, contiguous
from estimator.models.decoder import Transformer
from estimator.models.hugging_face.block import HFBlock
from estimator.models.hugging_face.masks import attention_mask
from estimator.models.hugging_face.positions import look_for_packed_sequences, position_ids, rotary_embedding
from estimator.models.layers import dropout_at

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Tensor
    from estimator.models.block import Block


class HFDecoder(Transformer):
    """`LlamaForCausalLM`: ids (B, T), labels (B, T) -> their loss."""

    build_block: type[Block] = HFBlock
    drops_embedding = False

    def scale_table(self) -> None:
        """It is computed in each layer."""

    def rotary_tables(self) -> list[Tensor]:
        """The inverse frequencies, and their original, of each kind of layer that has its own."""
        half = self.machine.shapes.letters[self.recipe.rotated] / 2
        return [self.buffer(half) for _ in self.turns for _ in ("inv_freq", "original_inv_freq")]

    def alibi_tables(self) -> list[Tensor]:
        """None: slopes or the bias are made each step."""
        return []

    @property
    def turns(self) -> list[str]:
        """The kinds of layers with cosines and sines of their own: one for all, or those that the model has."""
        written = self.recipe.of_class
        return sorted({kind.layer.attention for kind in self.kinds}) if written.tables_by_kind else ["full"]

    def build_scale(self) -> None:
        """Gemma's scale of the embedding is a buffer, and MiniCPM 3's is one of an integer."""
        norm = self.parts.norm
        gemma = norm.kind == "rms" and norm.weight == "plus-one" and self.parts.ends.embedding_scale is not None
        self.embedding_scale = self.buffer() if gemma else None
        if self.recipe.of_class.whole_scale:
            self.embedding_scale = self.machine.empty((), INT64, category=Category.BUFFER).hold()

    def forward(self, v: Locals, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        assert targets is not None
        ends, divides_hidden = self.parts.ends, self.recipe.of_class.divides_hidden
        v.x = v.last = self.decoded(ids)
        if divides_hidden:
            v.x = ops.div_number(v.x)
        v.logits = self.head(v.x)
        with self.machine.ledger.inside("head"):
            if ends.logits_scale is not None and not divides_hidden:
                v.logits = ops.mul_number(v.logits)
            if ends.logits_softcap is not None:
                v.logits = ops.div_number(v.logits)
                v.logits = tanh(v.logits)
                v.logits = ops.mul_number(v.logits)
        with self.machine.ledger.inside("loss"):
            return causal_lm_loss(v.logits, targets)

    def enter(self, v: Locals) -> None:
        """`v.x` with dropout, where the class has it."""
        drops = self.drops_embedding or "embedding" in self.recipe.of_class.drops
        v.x = dropout_at(v.x, drops=self.recipe.dropout and drops)

    def decoded(self, ids: Tensor) -> Tensor:
        """`LlamaModel`."""
        with Locals() as v:
            late = self.recipe.of_class.late_scale
            v.embeds = self.embedding(ids)
            if not late:
                v.embeds = self.scaled(v.embeds)
            v.positions = position_ids(self.machine, ids.shape[1])
            masks = self.attention_masks(v, ids.shape[0])
            if late == "same":
                v.embeds = self.scaled(v.embeds)
            v.x = self.scaled(v.embeds) if late == "apart" else v.embeds
            self.enter(v)
            turns: dict[str, tuple[Tensor | None, Tensor | None]] = {}
            for i, name in enumerate(self.turns if self.recipe.rotates else ()):
                turns[name] = self.rotary(v, name, self.tables[2 * i])
            if self.embedding_norm is not None:
                v.x = self.embedding_norm(v.x)
            positions = v.positions if self.recipe.of_class.passes_positions else None
            for block, kind in zip(self.blocks, self.kinds, strict=True):
                turn = turns.get(kind.layer.attention, turns.get("full", (None, None)))
                turn = turn if kind.layer.rotates else (None, None)
                scaled = v.positions if self.parts.attention.query_scaling == "all" else None
                v.x = block(v.x, masks[kind.layer.attention], None, *turn, scaled, positions)
            v.x = self.final_norm(v.x)
            return v.take("x")

    def scaled(self, x: Tensor) -> Tensor:
        """The embedding times its scale."""
        if self.embedding_scale is not None:
            return ops.mul(x, cast(self.embedding_scale, self.embedding.weight.dtype))
        return x if self.parts.ends.embedding_scale is None else ops.mul_number(x)

    def rotary(self, v: Locals, kind: str, frequencies: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Cosines and sines, held as names of the frame."""
        with Locals() as w:
            rotary_embedding(w, v.positions, frequencies, v.x.dtype, self.recipe.of_class)
            cos, sin = w.cos, w.sin
            setattr(v, f"{kind}_cos", cos)
            setattr(v, f"{kind}_sin", sin)
        return cos, sin

    def attention_masks(self, v: Locals, sequences: Size) -> dict[str, Tensor | None]:
        """The mask of each kind of attention, held as names of the frame."""
        written, eager = self.recipe.of_class, self.recipe.attention.startswith("naive")
        used = {kind.layer.attention for kind in self.kinds}
        kinds = [kind for kind in ("full", "window", "chunk") if kind in used or kind in written.masks]
        made: dict[str, Tensor | None] = {}
        for kind in kinds:
            if written.packed:
                look_for_packed_sequences(v.positions, sequences)
            made[kind] = attention_mask(
                self.machine, v.positions.shape[0], sequences, kind, v.embeds.dtype, eager=eager, used=kind in used
            )
            setattr(v, f"{kind}_mask", made[kind])
        return made


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
