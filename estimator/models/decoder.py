"""Every decoder in eager ops, statement by statement `trainer.model.decoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE, letter
from estimator.eager.losses import chunked_cross_entropy
from estimator.eager.pointwise import soft_cap
from estimator.eager.tensor import Locals, arguments
from estimator.eager.views import narrow
from estimator.models.adapters import adapt
from estimator.models.block import Block
from estimator.models.layers import BlockKind, Embedding, Head, Linear, Module, dropout
from estimator.models.masks import attention_kinds, build_mask
from estimator.models.norms import build_norm
from estimator.models.positions import Positions, Sinusoids, alibi_bias
from estimator.parallel.sequence import cut, over_part, to_whole
from estimator.parallel.tensor import share

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


letter("T_l", "positions at the end of a sequence whose logits are computed")


class Transformer(Module):
    """ids (B, T) -> logits (B, T, V), or with targets (B, T) their loss; a stage from or to (B, T, d) between."""

    build_block: type[Block] = Block
    extra_sinusoids = 0

    def __init__(self, machine: Machine, recipe: Recipe, like: Transformer | None = None) -> None:
        """Of several stages on one accelerator that which comes after `like`, whose tables it has too."""
        super().__init__(machine, "")
        self.recipe, parts, size = recipe, recipe.parts, machine.shapes.letters
        self.parts = parts
        d, width = size["d"], size["d_e"] if recipe.projects else size["d"]
        enters, leaves = recipe.enters, recipe.leaves  # else another stage of a pipeline does
        shares = recipe.vocabulary_parallel
        rows = share(machine, size["V"]) if shares else size["V"]
        self.embedding = self.child(Embedding(machine, "embedding", rows, width) if enters else None)
        projects = recipe.projects
        self.project_in = self.child(
            Linear(machine, "project_in", width, d, bias=False) if projects and enters else None
        )
        self.positions: Positions | Sinusoids | None = None
        if not enters:
            pass
        elif parts.positions.kind == "learned":
            length = size["C"] + parts.positions.extra_rows
            self.positions = self.child(Positions(machine, "positions", length, d))
        elif parts.positions.kind == "sinusoidal":
            self.positions = self.child(Sinusoids(machine, "positions", size["C"] + self.extra_sinusoids, d))
        self.build_scale()
        norm = parts.norm
        self.embedding_norm = self.child(
            build_norm(machine, recipe, "embedding_norm", norm, d) if parts.ends.embedding_norm and enters else None
        )
        self.kinds: list[BlockKind] = []
        self.blocks: list[Block] = []
        each = len(machine.stack.kinds) // recipe.local_stages
        self.before: int = 0 if like is None else like.before + each
        for index in range(self.before, self.before + each):
            kind = machine.stack.kinds[index]
            assert isinstance(kind, BlockKind)
            self.kinds.append(kind)
            self.blocks.append(self.child(self.build_block(machine, index, recipe, kind)))
        normed = parts.ends.final_norm and leaves
        self.final_norm = self.child(build_norm(machine, recipe, "final_norm", norm, d) if normed else None)
        self.cuts = recipe.sequence_parallel
        if self.final_norm is not None and recipe.sequence_parallel:
            if shares:
                over_part(self.final_norm, local=False)
            else:
                to_whole(self.final_norm, size["T"])
        self.project_out = self.child(
            Linear(machine, "project_out", d, width, bias=False) if projects and leaves else None
        )
        self.tables: list[Tensor] = []
        if like is not None:
            self.tables = like.tables
        elif parts.positions.kind == "rotary":
            self.tables = self.rotary_tables()
        elif parts.positions.kind == "alibi":
            self.tables = self.alibi_tables()
        self.query_scale: Tensor | None = None if like is None else like.query_scale
        if like is None and parts.attention.query_scaling != "none":
            self.query_scale = self.scale_table()
        self.head = self.child(Head(machine, width, rows, self.embedding, recipe) if leaves else None)
        if shares:
            scatters = recipe.sequence_parallel and self.positions is None and self.embedding_norm is None
            self.cuts = self.cuts and not scatters
            self.embedding.share(size["V"], scatters=scatters)
            self.head.share(size["V"], size["T"] if recipe.sequence_parallel else None)
        self.freeze()

    def build_scale(self) -> None:
        """A buffer of the embedding's scale, where it is one."""

    def scale_table(self) -> Tensor | None:
        """What queries are multiplied with at each position."""
        return self.buffer(self.machine.shapes.letters["C"])

    def rotary_tables(self) -> list[Tensor]:
        """Cosines and sines of every position."""
        size = self.machine.shapes.letters
        return [self.buffer(size["C"], size[self.recipe.rotated] / 2) for _ in ("cos", "sin")]

    def alibi_tables(self) -> list[Tensor]:
        """The slope of each head."""
        return [self.buffer(self.machine.shapes.letters["h"])]

    def freeze(self) -> None:
        """Parameters that the recipe does not train want no gradient."""
        if self.recipe.adapter != "none":
            adapt(self, self.recipe)
        elsewhere = self.recipe.selection.at(None)
        for p in self.parameters():
            where = p.storage.where
            selection = elsewhere if where.block is None else self.kinds[where.block - self.before].selection
            if self.recipe.adapter == "none":
                p.requires_grad = p.requires_grad and selection.has(where.module)
            if p.requires_grad:
                self.machine.ledger.trained.append((where, p.numel))

    def buffer(self, *shape: Size) -> Tensor:
        """A tensor that the model holds and does not train."""
        return self.machine.empty(shape, self.machine.dtype, category=Category.BUFFER).hold()

    @property
    def buffers(self) -> list[Tensor]:
        """All buffers, in PyTorch's order: the model's own first."""
        found = [*self.tables, *(() if self.query_scale is None else (self.query_scale,))]
        if isinstance(self.positions, Sinusoids):
            found.append(self.positions.table)
        routers = (getattr(block.ffn, "router", None) for block in self.blocks)
        return found + [r.buffer for r in routers if r is not None and r.buffer is not None]

    def forward(self, v: Locals, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        length = ids.shape[1] if self.recipe.enters else self.machine.shapes.letters["T"]
        v.x = self.entered(ids) if self.recipe.enters else ids
        masks = self.masks(v, length)
        v.cos = v.sin = None
        if self.recipe.rotates:
            v.cos, v.sin = (
                table.view((length, ONE, table.shape[1]), (table.stride[0], *table.stride)) for table in self.tables
            )
        v.scale = None
        if self.query_scale is not None:
            v.scale = self.query_scale.view((length, ONE, ONE), (self.query_scale.stride[0], ONE, ONE))
        everywhere = self.parts.attention.query_scaling == "all"
        for block, kind in zip(self.blocks, self.kinds, strict=True):
            turn = (v.cos, v.sin) if kind.layer.rotates else (None, None)
            stretch = v.scale if everywhere or not kind.layer.rotates else None
            v.x = block(v.x, masks[kind.layer.attention], v.bias, *turn, stretch)
        return self.logits_or_loss(self.leave(v.x), targets) if self.recipe.leaves else v.take("x")

    def entered(self, ids: Tensor) -> Tensor:
        """What goes into the first block; of a rank's own tokens where it has a part of them."""
        x = self.embedded(ids)
        if not self.cuts:
            return dropout(x, self.recipe)
        with arguments((x,)) as results:
            results.append(dropout(cut(x), self.recipe))
        return results[0]

    def embedded(self, ids: Tensor) -> Tensor:
        """What goes into the first block, before dropout."""
        with Locals() as v:
            v.x = self.embedding(ids)
            if self.parts.ends.embedding_scale is not None:
                v.x = ops.mul_number(v.x)
            if self.project_in is not None:
                v.x = self.project_in(v.x)
            if self.positions is not None:
                v.x = ops.add(v.x, self.positions(ids.shape[1]))
            if self.embedding_norm is not None:
                v.x = self.embedding_norm(v.x)
            return v.take("x")

    def masks(self, v: Locals, length: Size) -> dict[str, Tensor | None]:
        """The mask of each kind of attention, held as names of the frame; ALiBi's bias is `v.bias`."""
        machine, naive = self.machine, self.recipe.attention.startswith("naive")
        alibi = self.parts.positions.kind == "alibi"
        keys = machine.shapes.letters["T"] if self.recipe.context_parallel else None
        kinds = attention_kinds(machine, [kind.layer for kind in self.kinds], keys or length)
        made: dict[str, Tensor | None] = {}
        for kind in dict.fromkeys(kinds.values()):
            mask = build_mask(v.x, kind, length, keys, naive=naive or alibi)
            setattr(v, f"{kind}_mask", mask)
            made[kind] = mask
        v.bias = alibi_bias(self.tables[0], keys or length, machine.autocast_dtype or v.x.dtype) if alibi else None
        if alibi and not naive:
            for kind, mask in made.items():
                assert mask is not None
                made[kind] = _added_to_scores(v.bias, mask)
                setattr(v, f"{kind}_added", made[kind])
            for kind in made:
                delattr(v, f"{kind}_mask")
            v.bias = None
        return {attention: made[kind] for attention, kind in kinds.items()}

    def leave(self, x: Tensor) -> Tensor:
        """What the head takes."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        return self.project_out(x) if self.project_out is not None else x

    def logits_or_loss(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """The head; with targets in its chunked cross entropy."""
        ends = self.parts.ends
        with Locals() as v:
            v.x = x  # this frame's alone
            if self.recipe.keeps_last:
                with self.machine.ledger.inside("head"):
                    v.x = narrow(v.x, self.machine.shapes.letters["T_l"], 1)
            if targets is not None:
                if ends.logits_scale is not None:
                    v.x = ops.mul_number(v.x)
                with self.machine.ledger.inside("head"):
                    return chunked_cross_entropy(v.x, self.head.weight, targets)
            v.logits = self.head(v.x)
            with self.machine.ledger.inside("head"):
                if ends.logits_scale is not None:
                    v.logits = ops.mul_number(v.logits)
                if ends.logits_softcap is not None:
                    v.logits = soft_cap(v.logits)
            return v.take("logits")


def _added_to_scores(bias: Tensor, mask: Tensor) -> Tensor:
    """bias.masked_fill(mask, -inf), (h, T, T)."""
    machine = bias.machine
    out = machine.empty((bias.shape[0], *mask.shape), bias.dtype)
    machine.kernel("masked_fill", (bias, mask), (out,))
    return out
