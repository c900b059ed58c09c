"""Expert parallelism: each process has a part of every layer's experts, and all else whole.

The experts are DTensors whose rows are cut, so that checkpoints hold them whole; what is sent is
`trainer.model.exchange`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from trainer.model.exchange import Exchanges
from trainer.model.experts import Experts, SparseFeedForward

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.device_mesh import DeviceMesh


def expert_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """`model`, of whose experts each process of `mesh` has its part, in place."""
    for module in model.modules():
        if isinstance(module, Experts):
            for name, p in module.named_parameters(recurse=False):
                mine = p.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
                shared = DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)
                setattr(module, name, nn.Parameter(shared, requires_grad=p.requires_grad))
        elif isinstance(module, SparseFeedForward):
            module.exchange = Exchanges(mesh.get_group())
    return model


def shard_experts(block: nn.Module, ranks: int, **options: Any) -> None:
    """`fully_shard` of a block's experts with `options`, as torchtitan has it, by which bf16-fsdp casts them too.

    Their gradients have the tokens of `ranks` processes in them.
    """
    for module in block.modules():
        if isinstance(module, Experts):
            fully_shard(module, **options).set_gradient_divide_factor(float(ranks))


def of_experts(model: nn.Module) -> list[str]:
    """The names of the parameters of all experts."""
    return list(_names(model))


def _names(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            yield from (f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False))
