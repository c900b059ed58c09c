"""SGD and AdamW that update in place and hold, beside their state, one scratch of a fixed size.

Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, with the bias corrections of Kingma
and Ba 2015 written as torch.optim.AdamW writes them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# AdamW is seven passes over four tensors. On CPU a slice of each stays in the cache from the first pass to the last;
# on CUDA a launch costs more than a miss, so slices are large there and only bound the scratch.
CPU_SLICE = 2**18  # elements: 1 MiB a tensor in fp32
CUDA_SLICE = 2**26  # elements: 256 MiB in fp32


class _InPlace(torch.optim.Optimizer):
    """What both optimizers share: validated groups, the closure, the walk over the parameters that have a gradient."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, after the group's hyper-parameters have been validated.

        Raises:
            ValueError: a hyper-parameter is out of its range.
        """
        self._validate({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def _validate(self, group: dict[str, Any]) -> None:
        _in_range("lr", group["lr"], 0.0, math.inf)

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in place.

        Args:
            closure: evaluates the model again and returns the loss; runs with gradients enabled.

        Returns:
            What the closure returned, None without one.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.layout != torch.strided:
                    raise ValueError(
                        f"gradient layout = {parameter.grad.layout}: {type(self).__name__} needs dense ones"
                    )
                self._update(group, parameter, parameter.grad)
        self._end_step()
        return loss

    def _end_step(self) -> None:
        """Let go of what only this step needed."""


class SGD(_InPlace):
    """Gradient descent whose step decays: p -= lr / sqrt(t + 1) * gradient, t counted from 0 for each parameter."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        t = state.get("step", 0)
        parameter.add_(gradient, alpha=-group["lr"] / math.sqrt(t + 1))
        state["step"] = t + 1


class AdamW(_InPlace):
    """Adam with decoupled weight decay. State a parameter: exp_avg and exp_avg_sq of its shape, step as a plain int.

    Contiguous parameters go slice by slice through one scratch; others, whose slices are no views, go whole, through a
    scratch of their own size.

    Args:
        params: parameters, or dictionaries of parameters with their own hyper-parameters.
        lr: the learning rate, at least 0.
        betas: decay of the first and of the second moment, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0; the parameter shrinks by lr * weight_decay before the update.

    Raises:
        ValueError: a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _validate(self, group: dict[str, Any]) -> None:
        super()._validate(group)
        beta1, beta2 = group["betas"]
        _in_range("betas[0]", beta1, 0.0, 1.0)
        _in_range("betas[1]", beta2, 0.0, 1.0)
        _in_range("eps", group["eps"], 0.0, math.inf)
        _in_range("weight_decay", group["weight_decay"], 0.0, math.inf)

    def _update(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        lr, (beta1, beta2) = group["lr"], group["betas"]
        # p -= lr / c1 * m / (sqrt(v) / r + eps) with c1 = 1 - beta1^t, r = sqrt(1 - beta2^t): multiplied through by r,
        # the root needs no division of its own, which saves a pass.
        root = math.sqrt(1 - beta2 ** state["step"])
        rate = lr / (1 - beta1 ** state["step"]) * root
        eps, shrink = group["eps"] * root, 1 - lr * group["weight_decay"]
        for p, g, m, v, scratch in self._slices(parameter, gradient, state["exp_avg"], state["exp_avg_sq"]):
            p.mul_(shrink)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            torch.sqrt(v, out=scratch).add_(eps)
            p.addcdiv_(m, scratch, value=-rate)

    def _slices(self, *tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
        parameter = tensors[0]
        if not all(t.is_contiguous() for t in tensors):
            return [(*tensors, torch.empty_like(parameter))]
        key = parameter.device, parameter.dtype
        if key not in self._scratch:
            alike = (p.numel() for g in self.param_groups for p in g["params"] if (p.device, p.dtype) == key)
            most = CPU_SLICE if parameter.device.type == "cpu" else CUDA_SLICE
            self._scratch[key] = parameter.new_empty(min(most, max(alike)))
        scratch = self._scratch[key]
        size = len(scratch)
        pieces = zip(*(torch.split(t.view(-1), size) for t in tensors), strict=True)
        return ((*piece, scratch[: len(piece[0])]) for piece in pieces)

    def _end_step(self) -> None:
        self._scratch.clear()


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value < high:
        raise ValueError(f"{name} = {value!r}: must be at least {low:g} and below {high:g}")
