"""Tensor parallelism by PyTorch's DTensor: each process has some columns of what goes into attention and feed-forward.

The projections that go in are cut by their output (`ColwiseParallel`), those that come out by their input
(`RowwiseParallel`), so that a block takes one all-reduce behind attention and one behind the feed-forward, and two more
in backward (Shoeybi et al. 2019, "Megatron-LM", section 3). Embedding, norms and head are whole in every process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from trainer.model.attention import Attention
from trainer.model.block import Block
from trainer.model.decoder import Transformer
from trainer.model.feed_forward import GatedFeedForward
from trainer.parallel.columns import Columns, Rows
from trainer.parallel.sequence import TOKENS, block_styles, cut_stream, gather_stream
from trainer.parallel.vocabulary import share_vocabulary

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

COLUMNS = (
    *("attention.q", "attention.k", "attention.v", "attention.qkv", "attention.out_gate"),
    *("ffn.gate", "ffn.up", "ffn.gate_up"),
)
ROWS = ("attention.out", "ffn.down")
HEAD_NORMS = ("attention.q_norm", "attention.k_norm")
HEADS = 2  # the dimension of theirs in what these take, (B, T, h, e)


def tensor_parallel(
    model: nn.Module, mesh: DeviceMesh, *, sequence: bool = False, vocabulary: bool = False
) -> nn.Module:
    """`model`, of whose blocks' matrices each process of `mesh` has its part, in place.

    Projections that hold several matrices (q, k and v; gate and up) are put in an order in which each process's rows
    are its part of each of them. With `sequence` it has between them its part of the tokens; with `vocabulary`
    embedding and head are shared out as well.
    """
    size = mesh.size()
    assert isinstance(model, Transformer)
    if vocabulary:
        share_vocabulary(model, mesh, sequence=sequence)
    elif sequence:
        cut_stream(model, mesh)
        gather_stream(model, mesh)
    for i, block in enumerate(model.blocks):
        attention, ffn = block.get_submodule("attention"), block.get_submodule("ffn")
        assert isinstance(attention, Attention)
        if hasattr(attention, "qkv"):
            deal(model, f"blocks.{i}.attention.qkv", attention.widths, size)
        if isinstance(ffn, GatedFeedForward) and ffn.fused:
            deal(model, f"blocks.{i}.ffn.gate_up", [len(ffn.gate_up.weight) // 2] * 2, size)
        attention.num_heads //= size
        attention.kv_heads //= size
        attention.widths = [width // size for width in attention.widths]
        named = dict(block.named_modules())
        styles: dict[str, ParallelStyle] = {name: Columns() for name in COLUMNS if name in named}
        styles |= {name: Rows(output_layouts=TOKENS if sequence else None) for name in ROWS}
        if sequence:
            assert isinstance(block, Block)
            styles = block_styles(block) | styles
        if attention.part.qk_norm == "head":  # one weight for all heads: its gradient is a sum over the processes
            styles |= {name: SequenceParallel(sequence_dim=HEADS, use_local_output=True) for name in HEAD_NORMS}
        parallelize_module(block, mesh, styles)
    return model


def deal(model: Transformer, name: str, widths: list[int], size: int) -> None:
    """Reorder the rows of the linear layer `name`, of several matrices of `widths` rows, and note how.

    First comes every matrix's first `size`-th part.
    """
    starts = [sum(widths[:i]) for i in range(len(widths))]
    order = torch.cat(
        [
            torch.arange(start + rank * (width // size), start + (rank + 1) * (width // size))
            for rank in range(size)
            for start, width in zip(starts, widths, strict=True)
        ]
    )
    with torch.no_grad():
        for key, p in model.get_submodule(name).named_parameters():
            p.copy_(p[order])
            model.dealt[f"{name}.{key}"] = order
