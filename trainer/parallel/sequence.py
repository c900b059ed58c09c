"""Sequence parallelism by PyTorch's DTensor: between the shared matrices each process has its part of the tokens.

What is added to the stream is scattered as it is summed (`RowwiseParallel` to `Shard(1)`), norms work on a process's
own tokens (`SequenceParallel`), and attention and feed-forward gather what goes into them once (`PrepareModuleInput`),
as torchtitan lays a block out; Korthikanti et al. 2022, "Reducing Activation Recomputation", section 4.2.2. Embedding
and head are whole in every process: what leaves the one is cut, what goes into the other is gathered.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    PrepareModuleInput,
    PrepareModuleOutput,
    SequenceParallel,
    parallelize_module,
)

from trainer.model.attention import Attention
from trainer.model.block import NORMS

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

    from trainer.model.block import Block

TOKENS = Shard(1)  # of (B, T, d)


def block_styles(block: Block) -> dict[str, ParallelStyle]:
    """Of a block, beside those of its matrices.

    Norms before attention and feed-forward hand on DTensors, which these gather; those behind them what is added.
    """
    styles: dict[str, ParallelStyle] = {
        name: SequenceParallel(use_local_output="post" in name) for name in NORMS[block.order]
    }
    others = (None,) * (len(inspect.signature(Attention.forward).parameters) - 2)  # beside itself and x
    styles["attention"] = PrepareModuleInput(
        input_layouts=(TOKENS, *others), desired_input_layouts=(Replicate(), *others)
    )
    styles["ffn"] = PrepareModuleInput(input_layouts=TOKENS, desired_input_layouts=Replicate())
    return styles


def cut_stream(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut by tokens what goes into the first block of `model`, in place."""
    cut = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=TOKENS, use_local_output=True)
    parallelize_module(model, mesh, {"dropout": cut})


def gather_stream(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gather what the final norm of `model` makes of a process's tokens, in place."""
    parallelize_module(model, mesh, {"final_norm": SequenceParallel()})
    gather = PrepareModuleOutput(output_layouts=TOKENS, desired_output_layouts=Replicate())
    parallelize_module(model, mesh, {"final_norm": gather})
