"""Low-rank adapters beside a frozen model's linear layers: Hu et al. 2021, "LoRA", as peft trains them."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from estimator.describe.adapters import EXPERTS, check_targets, is_target
from estimator.describe.plan import FULLY_SHARDED
from trainer.model.expert_adapters import ExpertsLoRA
from trainer.model.experts import Experts
from trainer.model.layers import Linear
from trainer.model.quantised import dequantised, quantise
from trainer.optim.precision import PARAMETERS

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


class DoRA(LoRA):
    """y = m / |W + s B A| (x W^T + s (x A^T) B^T) (+ b), the norms one for each row: Liu et al. 2024, "DoRA".

    The statements are those of peft's `lora.dora.DoraLinearLayer.forward`: B A is made from a whole identity matrix,
    and the norms have no gradient (the paper's section 4.3).

    Attributes:
        magnitude: m, (out,), float32: the norms of the frozen weight's rows.
    """

    def __init__(self, base: Linear, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(base, rank, alpha, dropout)
        self.magnitude = nn.Parameter(torch.linalg.norm(base.weight.detach(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        before = result.dtype
        x = x.to(self.a.weight.dtype)
        if isinstance(self.dropout, nn.Identity) or not self.training:
            base_result = result
        else:
            x = self.dropout(x)
            base_result = None
        result = result + self._scaled(x, base_result)
        return result.to(before)

    def _scaled(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        """What the magnitudes and the narrow matrices add."""
        x_eye = torch.eye(self.a.weight.shape[1], device=x.device, dtype=self.a.weight.dtype)
        lora_weight = self.b(self.a(x_eye)).T
        del x_eye
        lora_weight = lora_weight.to(x.dtype)
        weight = dequantised(self.base)
        weight = weight.to(x.dtype)
        norms = self._norms(weight, lora_weight.detach()).detach()
        scale = (self.magnitude / norms).view(1, -1)
        lora_result = self.b(self.a(x))
        if base_result is None:
            base_result = F.linear(x, weight)
        elif self.base.bias is not None:
            base_result = base_result - self.base.bias
        return (scale - 1) * base_result + scale * lora_result * self.scaling

    def _norms(self, weight: Tensor, lora_weight: Tensor) -> Tensor:
        weight = weight + self.scaling * lora_weight
        return torch.linalg.norm(weight, dim=1).to(weight.dtype)


class OnQuantised(LoRA):
    """What adapters on a quantised layer begin with, as peft's `lora.bnb.Linear4bit` and `Linear8bitLt` do."""

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor, torch.dtype | None]:
        """(The layer's result, the adapter's input, the dtype that the sum is to have: None for its own)."""
        result = self.base(x)
        if type(self.base).__name__ == "Linear4bit":
            result = result.clone()
        if torch.is_autocast_enabled():
            return result, x, None
        return result, x.to(self.a.weight.dtype), result.dtype


class QuantisedLoRA(OnQuantised):
    """LoRA on a quantised layer, with peft's statements."""

    def forward(self, x: Tensor) -> Tensor:
        result, x, expected = self.begin(x)
        output = self.b(self.a(self.dropout(x))) * self.scaling
        if expected is not None:
            output = output.to(expected)
        result = result + output
        return result  # noqa: RET504 - peft has the name


class QuantisedDoRA(OnQuantised, DoRA):
    """DoRA on a quantised layer, likewise; its weight is made whole once more for the norms."""

    def forward(self, x: Tensor) -> Tensor:
        result, x, expected = self.begin(x)
        if isinstance(self.dropout, nn.Identity) or not self.training:
            base_result = result
        else:
            x = self.dropout(x)
            base_result = None
        result = result + self._scaled(x, base_result)
        if expected is not None:
            result = result.to(expected)
        return result

    def take_norms(self) -> None:
        """Begin with the norms of the quantised weight's rows."""
        self.magnitude.data = torch.linalg.norm(dequantised(self.base).float(), dim=1)


class Saved(nn.Module):
    """A module that is frozen and a copy of it that is trained and run: peft's `ModulesToSaveWrapper`.

    Attributes:
        original: the frozen one.
        copy: the other, in the same dtype; of a head that shares the embedding's matrix with a matrix of its own.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original, self.copy = original, deepcopy(original).requires_grad_(requires_grad=True)

    @property
    def weight(self) -> nn.Parameter:
        """The copy's."""
        weight = self.copy.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.copy(x)
        return result


KINDS = {"lora": LoRA, "dora": DoRA}
ON_QUANTISED = {"lora": QuantisedLoRA, "dora": QuantisedDoRA}


def adapt(model: nn.Module, p: Plan) -> None:
    """Put an adapter beside every linear layer that the plan names; all else is frozen.

    Raises:
        ConfigError: the model has none of these layers.
    """
    layers = [(path, module) for path, module in model.named_modules() if isinstance(module, Linear)]
    experts = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    names = (path.rpartition(".")[2] for path, _ in layers)
    check_targets(p.adapter_targets, (*names, *(EXPERTS for _ in experts)))
    model.requires_grad_(requires_grad=False)
    for path, stacked in experts if is_target(p.adapter_targets, EXPERTS) else ():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, ExpertsLoRA(stacked, p.adapter_rank, p.adapter_alpha))
    for path, base in layers:
        owner, _, name = path.rpartition(".")
        if is_target(p.adapter_targets, name):
            quantises = p.base_precision != "none" and name != "head"
            kind = (ON_QUANTISED if quantises else KINDS)[p.adapter]
            adapter = kind(base, p.adapter_rank, p.adapter_alpha, p.adapter_dropout)
            setattr(model.get_submodule(owner), name, adapter)
    for name in filter(None, p.modules_to_save.split(",")):
        setattr(model, name, Saved(getattr(model, name)))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' matrices and magnitudes and the copies that are trained beside them, by name."""
    found = _narrow_parameters(model)
    for path, module in model.named_modules():
        if isinstance(module, Saved):
            found |= {f"{path}.copy.{name}": p for name, p in module.copy.named_parameters()}
    return found


def take_originals(model: nn.Module) -> None:
    """Make the copies what the frozen modules are."""
    for module in model.modules():
        if isinstance(module, Saved):
            module.copy.load_state_dict(module.original.state_dict())


def _narrow_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, DoRA):
            found[f"{path}.magnitude"] = module.magnitude
        if isinstance(module, LoRA):
            found |= {f"{path}.a.weight": module.a.weight, f"{path}.b.weight": module.b.weight}
        if isinstance(module, ExpertsLoRA):
            for side, of in (("a", module.a), ("b", module.b)):
                found |= {f"{path}.{side}.{name}": p for name, p in of.named_parameters()}
    return found


def to_precision(model: nn.Module, p: Plan) -> nn.Module:
    """The model in the plan's dtype, its adapters in float32 (peft's `autocast_adapter_dtype`), quantised if so asked.

    What is quantised comes in bfloat16, as checkpoints do, save where all is float32.
    """
    model.to(PARAMETERS.get(p.precision))
    for x in _narrow_parameters(model).values():
        x.data = x.detach().float()
    dtype = torch.float32 if p.precision in ("fp32", "tf32") else torch.bfloat16
    quantise(model, p.base_precision, dtype, dtype if p.shards > 1 and p.sharding in FULLY_SHARDED else torch.uint8)
    for module in model.modules():
        if isinstance(module, QuantisedDoRA):
            module.take_norms()
    return model
