"""Low-rank adapters beside a frozen model's linear layers: Hu et al. 2021, "LoRA", as peft trains them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from estimator.describe.adapters import check_targets, is_target
from trainer.model.layers import Linear

if TYPE_CHECKING:
    from estimator.describe.plan import Plan


class LoRA(nn.Module):
    """y = x W^T (+ b) + alpha / r (x A^T) B^T, A and B in float32. Shapes: (..., in) -> (..., out).

    The statements are those of peft's `lora.Linear.forward`: x is cast to the adapter's dtype, the sum back to that of
    the frozen layer's result.

    Attributes:
        base: the frozen layer.
        a, b: (r, in), drawn as nn.Linear's weights are, and (out, r), zeros.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        d_out, d_in = base.weight.shape
        self.base = base
        self.a, self.b = Linear(d_in, rank, bias=False), Linear(rank, d_out, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.scaling = alpha / rank
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        before = result.dtype
        x = x.to(self.a.weight.dtype)
        result = result + self.b(self.a(self.dropout(x))) * self.scaling
        return result.to(before)


def adapt(model: nn.Module, p: Plan) -> None:
    """Put an adapter beside every linear layer that the plan names; all else is frozen.

    Raises:
        ConfigError: the model has none of these layers.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]
    check_targets(p.adapter_targets, (path.rpartition(".")[2] for path, _ in layers))
    model.requires_grad_(requires_grad=False)
    for path, base in layers:
        owner, _, name = path.rpartition(".")
        if is_target(p.adapter_targets, name):
            setattr(model.get_submodule(owner), name, LoRA(base, p.adapter_rank, p.adapter_alpha, p.adapter_dropout))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' matrices, by name."""
    adapters = {path: module for path, module in model.named_modules() if isinstance(module, LoRA)}
    return {
        f"{path}.{name}.weight": getattr(adapter, name).weight for path, adapter in adapters.items() for name in "ab"
    }


def to_precision(model: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """The model in `dtype`, its adapters in float32 (peft's `autocast_adapter_dtype`)."""
    model.to(dtype)
    for p in adapter_parameters(model).values():
        p.data = p.detach().float()
    return model
