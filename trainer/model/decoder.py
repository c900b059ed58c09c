"""Every decoder in plain PyTorch, built from the parts of a `ModelConfig` and a `Plan`.

The ledger of `estimator.models` repeats these forwards statement by statement, under the same module names: a changed
line here is a changed line there, and `validate-estimates` says which one was forgotten.

Shape suffixes are the legend's letters (`trainer.model.layers`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from estimator.describe.checks import ConfigError
from estimator.describe.selection import NOTHING_TRAINED
from trainer.model.adapters import adapt
from trainer.model.attention import KeysAndValues
from trainer.model.block import Block
from trainer.model.layers import INIT_STD, Embedding, Linear, NormedHead, soft_cap
from trainer.model.loss import chunked_cross_entropy
from trainer.model.masks import attention_kinds, build_mask
from trainer.model.norms import build_norm
from trainer.model.positions import Positions, Sinusoids, alibi_bias, alibi_slopes, query_scales, rope_tables
from trainer.model.router import Router

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

# What a selective checkpoint keeps, as torchtitan does: the linear layers' products and the fused attention's results.
KEPT = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001 - the operators' names
    torch.ops.aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
]
# By `Plan.checkpointing`, the contexts of a block's forward and of its recomputation.
RECOMPUTED: dict[str, Callable[[], Any]] = {
    "block": noop_context_fn,
    "selective": partial(create_selective_checkpoint_contexts, KEPT),
}

# What leads back into the stream, whose weights start smaller.
RESIDUAL = (
    "attention.out.weight",
    "ffn.down.weight",
    "ffn.experts.down",
    "ffn.shared.down.weight",
)


class Transformer(nn.Module):
    """ids (B, T) -> logits (B, T, V), or with targets (B, T) their loss.

    With a cache, `forward` takes the ids of the next T positions and attends to those before them as well.

    Attributes:
        embedding: (V, d), or (V, embedding_dim) with `project_in` to d after it.
        positions: what is added to it, learned or fixed; None with rotary positions and ALiBi.
        embedding_norm: after these; None but in BLOOM.
        blocks: the layers.
        final_norm: None in decoders that are normed after each sum.
        project_out: back to embedding_dim, or None.
        head: (V, d), perhaps the embedding's own matrix.
        part: of each sequence, which of how many parts of equal length comes in (`trainer.parallel.context`); None for
            all of it.
        dealt: of parameters whose rows are in another order, this order (`trainer.parallel.tensor.deal`).
    """

    cos: Tensor
    sin: Tensor
    slopes: Tensor
    query_scale: Tensor

    def __init__(self, m: ModelConfig, p: Plan) -> None:
        super().__init__()
        p.check_model(m)
        self.config, self.plan = m, p
        self.part: tuple[int, int] | None = None
        self.dealt: dict[str, Tensor] = {}
        parts, d = m.made_of, m.d_model
        projects = m.embedding_width != d
        self.embedding = Embedding(m.vocab_size, m.embedding_width)
        self.project_in = Linear(m.embedding_width, d, bias=False) if projects else None
        self.dropout = nn.Dropout(p.dropout)
        self.positions: Positions | Sinusoids | None = None
        if parts.positions.kind == "learned":
            self.positions = Positions(m.context_length, d, parts.positions.extra_rows)
        elif parts.positions.kind == "sinusoidal":
            self.positions = Sinusoids(m.context_length, d)
        self.embedding_norm = build_norm(parts.norm, d) if parts.ends.embedding_norm else None
        self.blocks = nn.ModuleList(Block(m, p, layer) for layer in m.layers)
        self.final_norm = build_norm(parts.norm, d) if parts.ends.final_norm else None
        self.project_out = Linear(d, m.embedding_width, bias=False) if projects else None
        self.add_tables(m)
        if p.checkpointing == "attention":
            for block in self.blocks[p.checkpoint_every - 1 :: p.checkpoint_every]:
                attention = block.get_submodule("attention")
                attention.forward = recomputed(attention.forward)
        head = NormedHead if parts.ends.head_norm else Linear
        self.head = head(m.embedding_width, m.vocab_size, bias=parts.ends.head_bias)
        if parts.ends.tied:
            self.head.weight = self.embedding.weight
        for name, weight in self.named_parameters():
            if name.endswith(RESIDUAL):
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * m.num_layers))
        self.freeze()

    def freeze(self) -> None:
        """Parameters that the plan does not train want no gradient."""
        if self.plan.adapter != "none":
            adapt(self, self.plan)
            return
        selection = self.plan.selection
        for name, p in self.named_parameters():
            module = name.rpartition(".")[0]
            layer = int(module.split(".")[1]) if module.startswith("blocks.") else None
            p.requires_grad_(p.requires_grad and selection.at(layer).has(module))
        if not any(p.requires_grad for p in self.parameters()):
            raise ConfigError(NOTHING_TRAINED)

    def add_tables(self, m: ModelConfig) -> None:
        """The buffers that follow from the positions, which no checkpoint holds."""
        if m.made_of.positions.kind == "rotary":
            cos, sin = rope_tables(m.context_length, m.rotated)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        elif m.made_of.positions.kind == "alibi":
            self.register_buffer("slopes", alibi_slopes(m.num_heads), persistent=False)
        if m.made_of.attention.query_scaling != "none":
            self.register_buffer("query_scale", query_scales(m.context_length), persistent=False)

    def forward(
        self, ids_BT: Tensor, cache: list[KeysAndValues] | None = None, targets_BT: Tensor | None = None
    ) -> Tensor:
        start, T = cache[0].length if cache else 0, ids_BT.shape[1]
        if self.part is not None:
            start = self.part[0] * T
        x = self.dropout(self.embedded(ids_BT, start))
        masks, bias = self.masks(x, T, start)
        rotary = self.config.made_of.positions.kind == "rotary"
        cos, sin = (table[start : start + T, None] for table in (self.cos, self.sin)) if rotary else (None, None)
        scaled = self.config.made_of.attention.query_scaling
        scale = self.query_scale[start : start + T, None, None] if scaled != "none" else None
        for i, layer in enumerate(self.config.layers):
            turn = (cos, sin) if layer.rotates else (None, None)
            stretch = scale if scaled == "all" or not layer.rotates else None
            x = self.run_block(i, x, masks[layer.attention], bias, *turn, stretch, cache[i] if cache else None)
        return self.logits_or_loss(self.leave(x), targets_BT, cached=cache is not None)

    def embedded(self, ids_BT: Tensor, start: int) -> Tensor:
        """What goes into the first block, (B, T, d), before dropout."""
        ends = self.config.made_of.ends
        x = self.embedding(ids_BT)
        if ends.embedding_scale is not None:
            x = x * ends.embedding_scale
        if self.project_in is not None:
            x = self.project_in(x)
        if self.positions is not None:
            x = x + self.positions(start, ids_BT.shape[1])
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        return x

    def masks(self, x: Tensor, T: int, start: int) -> tuple[dict[str, Tensor | None], Tensor | None]:
        """The mask of each kind of attention that the layers have, and ALiBi's bias where the masks do not hold it.

        Masks are (T, start + T) of bools, see `build_mask`; for SDPA with ALiBi (h, T, start + T), added to the scores.
        """
        whole = None if self.part is None else self.part[1] * T
        end = whole or start + T
        m, naive = self.config, self.plan.attention.startswith("naive")
        alibi = m.made_of.positions.kind == "alibi"
        kinds = attention_kinds(m, end)
        made = {
            kind: build_mask(m, kind, T, start, x.device, naive=naive or alibi, end=whole)
            for kind in dict.fromkeys(kinds.values())
        }
        bias = alibi_bias(self.slopes, end, working_dtype(x)) if alibi else None
        if bias is not None and not naive:
            made = {kind: bias.masked_fill(mask, float("-inf")) for kind, mask in made.items() if mask is not None}
            bias = None
        return {attention: made[kind] for attention, kind in kinds.items()}, bias

    def leave(self, x: Tensor) -> Tensor:
        """What the head takes, (B, T, embedding width)."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return x

    def logits_or_loss(self, x: Tensor, targets_BT: Tensor | None, *, cached: bool = False) -> Tensor:
        """The head's logits (B, T, V); with targets the chunked cross entropy, for which they never exist at once.

        In training they are those of the last positions where the plan keeps no others, as are the targets.
        """
        ends = self.config.made_of.ends
        kept = self.plan.logits_to_keep
        if kept is not None and kept < x.shape[1] and not cached:
            x = x[:, -kept:, :]
        if targets_BT is not None:
            if ends.logits_scale is not None:
                x = x * ends.logits_scale
            return chunked_cross_entropy(x, self.head.weight, targets_BT)
        logits = self.head(x)
        if ends.logits_scale is not None:
            logits = logits * ends.logits_scale
        if ends.logits_softcap is not None:
            logits = soft_cap(logits, ends.logits_softcap)
        return logits

    def run_block(self, layer: int, *args: Tensor | KeysAndValues | None) -> Tensor:
        """Block `layer` of `args`, checkpointed if the plan says so."""
        block, p = self.blocks[layer], self.plan
        contexts = RECOMPUTED.get(p.checkpointing)
        if contexts is None or (layer + 1) % p.checkpoint_every or not torch.is_grad_enabled():
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)

    def new_cache(self, batch_size: int) -> list[KeysAndValues]:
        """An empty cache for `forward`, one entry a block, in the weights' dtype and on their device."""
        return [KeysAndValues(self.config, batch_size, self.embedding.weight) for _ in range(self.config.num_layers)]

    def routers(self) -> Iterator[Router]:
        """Those of the sparse layers: set their `routing` for measurements, `watched` for `load_balancing_loss`."""
        return (module for module in self.modules() if isinstance(module, Router))

    def load_balancing_loss(self) -> Tensor:
        """The mean over the sparse layers of the last forward's loss, for a training loop to add a share of.

        Raises:
            RuntimeError: no router was `watched` in a forward.
        """
        losses = [router.loss for router in self.routers() if router.loss is not None]
        if not losses:
            raise RuntimeError("load_balancing_loss: set `watched` of the model's routers before a forward")
        return torch.stack(losses).mean()


def working_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of `x` are in."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def recomputed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` under activation checkpointing, as it is where there is no backward to come."""

    def call(*args: Tensor | KeysAndValues | None) -> Tensor:
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)

    return call


def build_model(m: ModelConfig, p: Plan) -> Transformer:
    """The trainable model of `m`, whose attention and checkpointing are `p`'s, in fp32 on the default device.

    Raises:
        ConfigError: the model's parts have something that the plan's attention or loss has not.
    """
    return Transformer(m, p)
