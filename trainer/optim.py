"""SGD and AdamW that update in place and hold, beside their state, one scratch of a fixed size.

AdamW is Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, with torch.optim.AdamW's
order: the weights shrink first, and eps joins the root after the bias correction.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from estimator.config import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# AdamW is seven passes over four tensors and a scratch. On CPU a slice of each stays in the cache from the first pass
# to the last; from 2**18 to 2**22 elements it is about as fast, below that the starting of the ops shows
# (benchmarks/bench_optim.py --slices). On CUDA a launch costs more than a miss: slices are large, to bound the scratch.
CPU_SLICE = 2**20  # elements, 4 MiB in fp32
CUDA_SLICE = 2**26  # elements, 256 MiB in fp32

# A call of compiled code costs 0.1 ms before it begins: as much as the seven passes over some 2**16 elements.
COMPILED_FROM = 2**18  # elements


class InPlace(torch.optim.Optimizer):
    """What both optimizers share: validated groups, closures, the walk over the parameters that have a gradient."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim.Optimizer's, but validates the group's hyper-parameters first.

        Raises:
            ConfigError: a hyper-parameter is out of its range.
        """
        self.validate({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def validate(self, group: dict[str, Any]) -> None:
        """Raise ConfigError if a hyper-parameter of `group` is out of its range."""
        in_range("lr", group["lr"], 0, math.inf)

    def update(self, group: dict[str, Any], p: Tensor, g: Tensor, scratch: Scratch) -> None:
        """Move the parameter `p`, whose gradient is `g`, in place."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, in place.

        Args:
            closure: evaluates the model again and returns the loss; it runs with gradients enabled.

        Returns:
            What the closure returned, None without one.

        Raises:
            ConfigError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scratch = Scratch(self.param_groups)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.layout != torch.strided:
                    raise ConfigError(f"gradient layout = {p.grad.layout}: {type(self).__name__} takes torch.strided")
                self.update(group, p, p.grad, scratch)
        return loss


class SGD(InPlace):
    """Gradient descent whose step decays: p -= lr / sqrt(t + 1) * g, with t counted from 0 for each parameter.

    Args:
        params: parameters, or dictionaries of parameters with a learning rate of their own.
        lr: the learning rate, at least 0.

    Raises:
        ConfigError: lr is out of its range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    def update(self, group: dict[str, Any], p: Tensor, g: Tensor, scratch: Scratch) -> None:  # noqa: ARG002  # one pass needs no scratch
        """One fused multiply-add a parameter."""
        t = self.state[p].get("step", 0)
        p.add_(g, alpha=-group["lr"] / math.sqrt(t + 1))
        self.state[p]["step"] = t + 1


class AdamW(InPlace):
    """Adam with decoupled weight decay. State: exp_avg and exp_avg_sq of the parameter's shape, step as a plain int.

    Contiguous parameters go slice by slice through one scratch. Others have no flat view to slice: they go whole,
    through a scratch of their own size.

    Args:
        params: parameters, or dictionaries of parameters with hyper-parameters of their own.
        lr: the learning rate, at least 0.
        betas: how much of the first and of the second moment a step keeps, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0; a weight shrinks by lr * weight_decay of itself before it moves.
        compiled: on CPU, let torch.compile make one pass of the seven for contiguous parameters of at least
            COMPILED_FROM elements. Needs a C++ compiler, and some ten seconds at the first step.

    Raises:
        ConfigError: a hyper-parameter is out of its range.
    """

    compiled = False  # torch's Optimizer copies and pickles its groups and state only: a copy goes uncompiled

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        compiled: bool = False,
    ) -> None:
        self.compiled = compiled
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def validate(self, group: dict[str, Any]) -> None:
        """Raise ConfigError if a hyper-parameter of `group` is out of its range."""
        super().validate(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ConfigError(f"betas = {betas!r}: must be a pair of numbers")
        for i, beta in enumerate(betas):
            in_range(f"betas[{i}]", beta, 0, 1)
        in_range("eps", group["eps"], 0, math.inf)
        in_range("weight_decay", group["weight_decay"], 0, math.inf)

    def update(self, group: dict[str, Any], p: Tensor, g: Tensor, scratch: Scratch) -> None:
        """Seven passes, slice by slice, or one compiled pass."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] += 1
        (beta1, beta2), t = group["betas"], state["step"]
        # p -= lr / c * m / (sqrt(v) / r + eps) with c = 1 - beta1^t and r = sqrt(1 - beta2^t). Multiplied through by r
        # the root needs no division of its own, which saves a pass.
        r = math.sqrt(1 - beta2**t)
        shrink, rate, eps = 1 - group["lr"] * group["weight_decay"], group["lr"] / (1 - beta1**t) * r, group["eps"] * r

        tensors = [local(x) for x in (p, g, state["exp_avg"], state["exp_avg_sq"])]
        flat = all(x.is_contiguous() for x in tensors)
        if self.compiled and flat and tensors[0].device.type == "cpu" and tensors[0].numel() >= COMPILED_FROM:
            # As a tensor they are inputs of the compiled code; as floats constants of it, compiled anew each step.
            numbers = torch.tensor(
                [shrink, 1 - beta1, 1 - beta2, rate, eps], dtype=torch.promote_types(p.dtype, torch.float32)
            )
            compiled_update()(*(x.view(-1) for x in tensors), numbers)
            return
        for p_, g_, m, v, s in scratch.slices(tensors) if flat else [(*tensors, torch.empty_like(tensors[0]))]:
            p_.mul_(shrink)
            m.lerp_(g_, 1 - beta1)
            v.mul_(beta2).addcmul_(g_, g_, value=1 - beta2)
            torch.sqrt(v, out=s).add_(eps)
            p_.addcdiv_(m, s, value=-rate)


class Lion(InPlace):
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms": every weight moves by the same amount.

    State: exp_avg, of the parameter's shape; half of AdamW's.

    Args:
        params: parameters, or dictionaries of parameters with hyper-parameters of their own.
        lr: the learning rate, at least 0; the paper takes 3 to 10 times less than for AdamW.
        betas: how much of the average the sign sees and how much of it a step keeps, each in [0, 1).
        weight_decay: at least 0; a weight shrinks by lr * weight_decay of itself before it moves.

    Raises:
        ConfigError: a hyper-parameter is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def validate(self, group: dict[str, Any]) -> None:
        """Raise ConfigError if a hyper-parameter of `group` is out of its range."""
        super().validate(group)
        for i, beta in enumerate(group["betas"]):
            in_range(f"betas[{i}]", beta, 0, 1)
        in_range("weight_decay", group["weight_decay"], 0, math.inf)

    def update(self, group: dict[str, Any], p: Tensor, g: Tensor, scratch: Scratch) -> None:
        """Four passes, slice by slice."""
        state = self.state[p]
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
        beta1, beta2 = group["betas"]
        tensors = [local(x) for x in (p, g, state["exp_avg"])]
        flat = all(x.is_contiguous() for x in tensors)
        for p_, g_, m, s in scratch.slices(tensors) if flat else [(*tensors, torch.empty_like(tensors[0]))]:
            p_.mul_(1 - group["lr"] * group["weight_decay"])
            torch.lerp(g_, m, beta1, out=s).sign_()
            p_.add_(s, alpha=-group["lr"])
            m.lerp_(g_, 1 - beta2)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the matrices between embedding and head, `torch.optim.AdamW` for everything else.

    One optimizer to the outside: two parameter groups, one state. Muon makes an update's singular values alike (Jordan
    et al. 2024), which is meant for matrices that map one hidden vector to another; an embedding is none.

    Args:
        matrices: the parameters for Muon, all of two dimensions.
        others: those for AdamW.
        lr: the learning rate of both; "match_rms_adamw" makes one figure right for either.
        weight_decay: of both.
        **adamw: further arguments of torch.optim.AdamW, such as `foreach`.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        others: Sequence[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        **adamw: Any,
    ) -> None:
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts = (
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(others, **shared, **adamw),
        )
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # torch's takes closures, which two parts would run twice
        """Update both parts; each works on this optimizer's own group and state, which may have been loaded since."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step(closure)


class Scratch:
    """A step's one buffer for each device and dtype: a slice long, or as the largest parameter where that is less."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.parameters = [local(p) for group in groups for p in group["params"]]
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def slices(self, tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Flat slices of contiguous `tensors` of one size, side by side, and as much of the scratch."""
        device, dtype = tensors[0].device, tensors[0].dtype
        if (device, dtype) not in self.buffers:
            largest = max(p.numel() for p in self.parameters if (p.device, p.dtype) == (device, dtype))
            size = min(CPU_SLICE if device.type == "cpu" else CUDA_SLICE, largest)
            self.buffers[device, dtype] = torch.empty(size, device=device, dtype=dtype)
        scratch = self.buffers[device, dtype]
        for together in zip(*(torch.split(x.view(-1), len(scratch)) for x in tensors), strict=True):
            yield (*together, scratch[: len(together[0])])


@cache
def compiled_update() -> Callable[..., None]:
    """AdamW's update of one flat parameter as one loop, compiled when first called, and then for any length."""

    def update(p: Tensor, g: Tensor, m: Tensor, v: Tensor, numbers: Tensor) -> None:
        shrink, w1, w2, rate, eps = numbers.unbind()
        m.copy_(m + w1 * (g - m))
        v.copy_(v + w2 * (g * g - v))
        p.copy_(p * shrink - rate * m / (v.sqrt() + eps))

    return torch.compile(update, dynamic=True, fullgraph=True)


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor, under FSDP2) that this process holds: the update is element by element."""
    return x.to_local() if hasattr(x, "to_local") else x


def in_range(name: str, value: object, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is a number in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ConfigError(f"{name} = {value!r}: must be a number in [{low:g}, {high:g})")
