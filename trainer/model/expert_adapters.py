"""Low-rank adapters on the stacked matrices of a mixture's experts, as peft trains them (`target_parameters`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from trainer.model.experts import Experts, here
from trainer.model.layers import Linear


class ExpertsLoRA(nn.Module):
    """Experts whose matrices are W + s B A, A and B in float32. Shapes: those of `Experts`.

    Unlike beside a linear layer, B A is added to the matrices themselves, of all experts in each forward, and what
    comes of it is kept for backward. The statements are those of peft's `lora.layer.ParamWrapper`, one around `gate_up`
    and one around that for `down`: each makes its matrix once more to look at its shape (`register_parametrization`).

    Attributes:
        base: the frozen experts.
        a, b: by the name of a matrix (E, out, in): (r E, in), drawn as nn.Linear's weights are, and (out, r E), zeros.
    """

    def __init__(self, base: Experts, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.rank, self.scaling = base, rank, alpha / rank
        shapes = {name: getattr(base, name).shape for name in ("gate_up", "down")}
        self.a = nn.ModuleDict({name: Linear(d_in, rank * E, bias=False) for name, (E, _, d_in) in shapes.items()})
        self.b = nn.ModuleDict({name: Linear(rank * E, d_out, bias=False) for name, (E, d_out, _) in shapes.items()})
        for name in shapes:
            nn.init.kaiming_uniform_(_weight(self.a, name), a=math.sqrt(5))
            nn.init.zeros_(_weight(self.b, name))
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.made: dict[str, Tensor] = {}

    @property
    def gate_up_bias(self) -> nn.Parameter | None:
        """The experts'."""
        return self.base.gate_up_bias

    def forward(self, x: Tensor, count_E: Tensor, expert_S: Tensor | None) -> Tensor:
        for name in ("down", "gate_up"):
            self.factors[name] = self._factors(name)
            self._folded(name)
        self.base.adapted = self.matrix
        try:
            result: Tensor = self.base(x, count_E, expert_S)
            return result
        finally:
            self.base.adapted = None
            self.factors.clear()
            self.made.clear()

    def matrix(self, name: str) -> Tensor:
        """The sum, made where it is first asked for in a forward."""
        if name not in self.made:
            self.made[name] = self._folded(name)
        return self.made[name]

    def _folded(self, name: str) -> Tensor:
        """W + s B A of each expert, in W's dtype: peft's `_LoraFactorsProxy`."""
        lhs, rhs = self.factors[name]
        weight = here(getattr(self.base, name))
        with torch.autocast(weight.device.type, enabled=False):
            return torch.baddbmm(weight, lhs, rhs, alpha=self.scaling)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """B and A of each expert, (E, out, r) and (E, r, in), in the dtype of its matrix."""
        weight = getattr(self.base, name)
        a_Ed, b_dE = _weight(self.a, name), _weight(self.b, name)
        rhs = a_Ed.reshape(len(weight), -1, a_Ed.shape[-1])
        lhs = b_dE.reshape(b_dE.shape[0], -1, len(weight)).permute(2, 0, 1)
        return lhs.to(weight.dtype), rhs.to(weight.dtype)


def _weight(layers: nn.ModuleDict, name: str) -> Tensor:
    weight = layers[name].weight
    assert isinstance(weight, Tensor)
    return weight
