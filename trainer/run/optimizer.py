"""The optimizer that a plan names, with a run's hyper-parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from estimator.describe.checks import ConfigError
from estimator.describe.plan import WHOLE_MATRICES
from trainer.optim.eight_bit import AdamW8bit
from trainer.optim.in_backward import InBackward
from trainer.optim.optimizers import SGD, AdamW, Lion, MuonAdamW, is_for_muon, is_matrix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from estimator.describe.plan import Plan
    from trainer.parallel.distributed import Weights
    from trainer.run.settings import OptimSection


def build_optimizer(weights: Weights, p: Plan, o: OptimSection, device: str) -> torch.optim.Optimizer:
    """The optimizer that `p` names, with `o`'s hyper-parameters; weight decay for matrices only.

    A bias or a norm's gain has nothing that decay should keep small: it scales no input.

    Raises:
        ConfigError: it needs whole matrices and the parameters are sharded.
    """
    if weights.sharded and p.optimizer == "adamw-8bit":
        raise ConfigError(
            "plan.optimizer = 'adamw-8bit': a checkpoint cannot share its scales out anew; allowed is --sharding none"
        )
    if weights.sharded and p.optimizer in WHOLE_MATRICES:
        raise ConfigError(f"plan.optimizer = {p.optimizer!r}: works on whole matrices; allowed is --sharding none")
    if p.update == "after":
        return _optimizer_of(weights.named, p, o, device)
    parts = {name: _optimizer_of({name: x}, p, o, device) for name, x in weights.named.items()}
    return InBackward(parts, weights.originals, weights.shard)


def _optimizer_of(named: Mapping[str, nn.Parameter], p: Plan, o: OptimSection, device: str) -> torch.optim.Optimizer:
    matrices = {name: p for name, p in named.items() if is_matrix(name, p)}
    others = {name: p for name, p in named.items() if name not in matrices}
    groups = [
        {"params": list(part.values()), "names": list(part), "weight_decay": decay}
        for part, decay in ((matrices, o.weight_decay), (others, 0.0))
        if part
    ]
    kind = p.optimizer_on(device)
    match p.optimizer:
        case "sgd" if kind == "bundled":
            return SGD(groups, lr=o.lr)
        case "sgd" | "sgd-momentum":
            momentum = 0.9 if p.optimizer == "sgd-momentum" else 0.0
            return torch.optim.SGD(groups, lr=o.lr, momentum=momentum, foreach=kind == "foreach", fused=kind == "fused")
        case "adam":
            return torch.optim.Adam(
                groups, lr=o.lr, betas=o.betas, eps=o.eps, foreach=kind == "foreach", fused=kind == "fused"
            )
        case "lion":
            return Lion(groups, lr=o.lr, betas=o.betas)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=o.lr, foreach=kind == "foreach")
        case "adamw-8bit":
            return AdamW8bit(groups, lr=o.lr, betas=o.betas, eps=o.eps)
        case "muon":
            return build_muon(named, o, kind)
        case _ if kind == "bundled":
            return AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
        case _:
            return torch.optim.AdamW(
                groups, lr=o.lr, betas=o.betas, eps=o.eps, foreach=kind == "foreach", fused=kind == "fused"
            )


def build_muon(named: Mapping[str, nn.Parameter], o: OptimSection, kind: str) -> torch.optim.Optimizer:
    """Muon for the blocks' matrices, AdamW for all else, experts' tensors of three dimensions included."""
    inside = [name for name, p in named.items() if is_for_muon(name, p)]
    outside = [name for name in named if name not in inside]
    optimizer = MuonAdamW(
        [named[name] for name in inside],
        [named[name] for name in outside],
        lr=o.lr,
        weight_decay=o.weight_decay,
        foreach=kind == "foreach",
        fused=kind == "fused",
    )
    for group, names in zip(optimizer.param_groups, filter(None, (inside, outside)), strict=True):
        group["names"] = names
    return optimizer
