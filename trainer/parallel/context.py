"""Context parallelism: each process has a part of every sequence, and the keys and values of all of it in attention.

Tokens one after another lie on one process; queries stay where they are, keys and values are gathered in each layer,
as in torchtitan's and Megatron-LM's all-gather variants (Dubey et al. 2024, "The Llama 3 Herd of Models", section
3.3.2). Everything else is token by token. The loss of a process is the mean over its own tokens, so that the mean over
all processes, which DDP and FSDP make of the gradients, is that of the whole sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from trainer.model.attention import Attention
from trainer.model.decoder import Transformer
from trainer.model.gather import Gather

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed.device_mesh import DeviceMesh


def context_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`model`, whose sequences the processes of `mesh` share, in place."""
    assert isinstance(model, Transformer)
    model.part = mesh.get_local_rank(), mesh.size()
    for module in model.modules():
        if isinstance(module, Attention):
            module.gather = Gather(mesh.get_group())
    return model


def own_tokens(x_BT: Tensor, rank: int, ranks: int) -> Tensor:
    """The tokens of each sequence that the `rank`-th of so many processes has, in memory of their own."""
    if ranks == 1:
        return x_BT
    return x_BT.chunk(ranks, 1)[rank].clone(memory_format=torch.contiguous_format)
