"""Megatron-LM's GPT model on one tensor-parallel rank and one stage: megatron/core/models/gpt and transformer/.

A model of its execution after its source and Korthikanti et al. 2022 (arXiv 2205.05198), not compared with a run of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.ledger import Category
from estimator.eager.linalg import matmul, scaled_dot_product_attention
from estimator.eager.views import repeat_heads, reshape, split, transpose, view
from estimator.models.layers import BlockKind, Embedding, Linear, Module
from estimator.models.norms import ScaleAndShift
from estimator.models.positions import Positions
from estimator.parallel import megatron_ops as own
from estimator.parallel.placement import TENSOR
from estimator.parallel.tensor import share

if TYPE_CHECKING:
    from estimator.describe.parts import Norm
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import Recipe


class FusedNorm(ScaleAndShift):
    """TransformerEngine's or apex's: one kernel in either direction."""

    def __init__(self, machine: Machine, name: str, norm: Norm, *shape: Size) -> None:
        super().__init__(machine, name, norm, *shape)
        self.kind = norm.kind

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        if self.kind == "rms":
            assert self.weight is not None
            return own.rms_norm(x, self.weight)
        return ops.layer_norm(x, self.weight, self.bias)


class CoreAttention(Module):
    """`DotProductAttention`, what selective recomputation computes again; (B, h, T, e) each -> (B, h, T, e)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "core")
        self.recipe = recipe

    def forward(self, v: Locals, q: Tensor, k: Tensor, value: Tensor) -> Tensor:
        if not self.recipe.attention.startswith("naive"):
            return scaled_dot_product_attention(q, k, value, None, drops=self.recipe.dropout)
        v.scores = matmul(q, transpose(k, -2, -1))
        v.weights = ops.softmax(v.scores)  # scaled and masked in the same kernel
        del v.scores
        if self.recipe.dropout:
            v.weights = ops.dropout(v.weights)
        return matmul(v.weights, value)


class SelfAttention(Module):
    """`SelfAttention`."""

    def __init__(self, machine: Machine, recipe: Recipe, rank: own.Rank) -> None:
        super().__init__(machine, "attention")
        self.recipe, self.rank, a = recipe, rank, recipe.parts.attention
        size, product = machine.shapes.letters, machine.product
        self.g, self.e = size["g"], size["e"]
        self.k = share(machine, size["k"]) if rank.shared else size["k"]
        self.h = product((self.k, self.g))
        wide, narrow = product((self.h, self.e)), product((self.k, self.e))
        with self.inside():
            self.qkv = self.child(Linear(machine, "qkv", size["d"], wide + 2 * narrow, bias=a.bias))
            self.core = CoreAttention(machine, recipe)
            self.out = self.child(Linear(machine, "out", wide, size["d"], bias=a.out_bias))
        if rank.shared:
            whole = [product((size[heads], self.e)) for heads in ("h", "k")]
            self.qkv.cut_by("output", whole[0] + 2 * whole[1])
            self.out.cut_by("input", whole[0])
        self.core.checkpointed = recipe.checkpointing == "selective"

    def forward(self, v: Locals, x: Tensor, table: Tensor | None) -> Tensor:
        machine, group = self.machine, self.machine.product((self.g, self.e))
        with self.qkv.inside():
            v.qkv = own.column(self.rank, x, self.qkv.weight, self.qkv.bias)
        T, B, _ = v.qkv.shape
        v.q, v.k, v.v = split(view(v.qkv, (T, B, self.k, group + 2 * self.e)), (group, self.e, self.e))
        del v.qkv
        v.q = reshape(v.q, (T, B, self.h, self.e))
        if table is not None:
            v.q = own.rotated(v.q, table)
            v.k = own.rotated(v.k, table)
        heads = [transpose(transpose(x, 0, 1), 1, 2).hold() for x in (v.q, v.k, v.v)]
        v.q, v.k, v.v = heads
        for head in heads:
            head.drop()
        v.k, v.v = repeat_heads(v.k, self.g), repeat_heads(v.v, self.g)
        v.y = self.core(v.q, v.k, v.v)
        v.y = reshape(transpose(transpose(v.y, 1, 2), 0, 1), (T, B, machine.product((self.h, self.e))))
        with self.out.inside():
            return own.row(self.rank, v.y, self.out.weight)


class MLP(Module):
    """`MLP`."""

    def __init__(self, machine: Machine, recipe: Recipe, rank: own.Rank) -> None:
        super().__init__(machine, "ffn")
        self.rank, part, size = rank, recipe.parts.mlp, machine.shapes.letters
        self.gated = part.gated
        self.f = share(machine, size["f"]) if rank.shared else size["f"]
        times = 2 if part.gated else 1
        with self.inside():
            self.up = self.child(Linear(machine, "up", size["d"], times * self.f, bias=part.bias))
            self.down = self.child(Linear(machine, "down", self.f, size["d"], bias=part.bias))
        if rank.shared:
            self.up.cut_by("output", times * size["f"])
            self.down.cut_by("input", size["f"])

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        with self.up.inside():
            v.up = own.column(self.rank, x, self.up.weight, None)
        name = "bias_swiglu" if self.gated else "bias_gelu"
        v.act = own.bias_activation(name, v.up, self.up.bias, self.f)
        del v.up
        with self.down.inside():
            return own.row(self.rank, v.act, self.down.weight)


class TransformerLayer(Module):
    """`TransformerLayer`."""

    def __init__(self, machine: Machine, index: int, recipe: Recipe, kind: BlockKind, rank: own.Rank) -> None:
        super().__init__(machine, f"blocks.{index}", index)
        self.drops, norm, d = recipe.dropout, recipe.parts.norm, machine.shapes.letters["d"]
        with self.inside():
            self.attention_norm = self.child(FusedNorm(machine, "attention_norm", norm, d))
            self.attention = self.child(SelfAttention(machine, recipe, rank))
            self.ffn_norm = self.child(FusedNorm(machine, "ffn_norm", norm, d))
            self.ffn = self.child(MLP(machine, recipe, rank))
        self.checkpointed = kind.checkpointed and recipe.checkpointing == "block"

    def forward(self, v: Locals, x: Tensor, table: Tensor | None) -> Tensor:
        v.x = x
        v.y = self.attention(self.attention_norm(v.x), table)
        v.x = own.bias_dropout_add(v.y, self.attention.out.bias, v.x, self.drops)
        v.y = self.ffn(self.ffn_norm(v.x))
        return own.bias_dropout_add(v.y, self.ffn.down.bias, v.x, self.drops)


class GPTModel(Module):
    """`GPTModel`: ids (B, T) -> logits (T, B, V/t), or a stage of it from or to (T, B, d), (T/t, B, d)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "")
        self.recipe, parts, size = recipe, recipe.parts, machine.shapes.letters
        self.rank = rank = own.Rank(machine, recipe.tensor_parallel, recipe.sequence_parallel)
        vocabulary = share(machine, size["V"]) if rank.shared else size["V"]
        self.embedding = self.child(Embedding(machine, "embedding", vocabulary, size["d"]) if recipe.enters else None)
        self.positions = None
        if recipe.enters and parts.positions.kind == "learned":
            self.positions = self.child(Positions(machine, "positions", size["C"], size["d"]))
        self.kinds: list[BlockKind] = []
        self.blocks: list[TransformerLayer] = []
        for index, kind in enumerate(machine.stack.kinds):
            assert isinstance(kind, BlockKind)
            self.kinds.append(kind)
            self.blocks.append(self.child(TransformerLayer(machine, index, recipe, kind, rank)))
        self.final_norm = self.child(FusedNorm(machine, "final_norm", parts.norm, size["d"]) if recipe.leaves else None)
        tied = parts.ends.tied and recipe.enters
        self.head = None
        if recipe.leaves and not tied:
            self.head = self.child(Linear(machine, "head", size["d"], vocabulary, bias=False))
        for table in (self.embedding, self.head):
            if rank.shared and table is not None:
                places, where = machine.ledger.parameters, table.weight.storage.where
                places[places.index((where, table.weight.numel))] = (
                    where, machine.product((size["V"], size["d"]))
                )  # fmt: skip
                table.weight.placement = {TENSOR: 0}
        self.table: Tensor | None = None
        if parts.positions.kind == "rotary":
            self.table = machine.empty((size["C"], size[recipe.rotated]), category=Category.BUFFER).hold()
        with machine.ledger.inside("global memory buffer"):
            if rank.sequence:
                rank.gathered = own.held(machine, size["T"], size["B"], size["d"])
        for p in self.parameters():
            p.requires_grad = True
            machine.ledger.trained.append((p.storage.where, p.numel))

    @property
    def buffers(self) -> list[Tensor]:
        """What the model holds and does not train."""
        return [] if self.table is None else [self.table]

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.x = self.entered(v, x) if self.embedding is not None else x
        for block in self.blocks:
            v.x = block(v.x, self.table)
        if self.final_norm is None:
            return v.take("x")
        v.x = self.final_norm(v.x)
        head = self.embedding if self.head is None else self.head
        assert head is not None
        with self.machine.ledger.inside("head"):
            return own.column(self.rank, v.x, head.weight, None)

    def entered(self, v: Locals, ids: Tensor) -> Tensor:
        """`LanguageModelEmbedding`."""
        assert self.embedding is not None
        with self.embedding.inside():
            v.y = own.embedded(self.rank, ids, self.embedding.weight)
        if self.positions is not None:
            v.y = ops.add(v.y, self.positions(ids.shape[1]))
        v.y = own.sequence_first(v.y)
        if self.rank.sequence:
            v.y = own.scattered(self.rank, v.y)
        if self.recipe.dropout:
            v.y = ops.dropout(v.y)
        return v.take("y")
