"""Optimizers that update in place and allocate, beside their state, at most one scratch of a fixed size.

AdamW is Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", algorithm 2, with torch.optim.AdamW's
order: the weights shrink first, and eps joins the root after the bias correction.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from estimator.describe.checks import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

# Lion is four passes over three tensors and a scratch. On CPU a slice of each stays in the cache from the first pass to
# the last (benchmarks/bench_optim.py --slices). On CUDA a launch costs more than a miss: slices are large, to bound the
# scratch.
CPU_SLICE = 2**20  # elements, 4 MiB in fp32
CUDA_SLICE = 2**26  # elements, 256 MiB in fp32


MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW; torch.optim.AdamW's names


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

    def update(self, group: dict[str, Any], parameters: list[Tensor], scratch: Scratch) -> None:
        """Move `parameters`, those of `group` that have a gradient, in place."""
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
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p.grad.layout != torch.strided:
                    raise ConfigError(f"gradient layout = {p.grad.layout}: {type(self).__name__} takes torch.strided")
            self.update(group, parameters, scratch)
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

    def update(self, group: dict[str, Any], parameters: list[Tensor], scratch: Scratch) -> None:  # noqa: ARG002  # one pass needs no scratch
        """One fused multiply-add a parameter."""
        for p in parameters:
            t = self.state[p].get("step", 0)
            assert p.grad is not None
            p.add_(p.grad, alpha=-group["lr"] / math.sqrt(t + 1))
            self.state[p]["step"] = t + 1


class AdamW(InPlace):
    """Adam with decoupled weight decay. State: exp_avg and exp_avg_sq of the parameter's shape, step as a plain int.

    The arithmetic is one pass over the four tensors of a parameter, by PyTorch's own kernel (that of
    torch.optim.AdamW(fused=True)): seven passes of separate ops take twice as long even where every operand stays in
    the cache. Half precision is computed in float32 and rounded once.

    Args:
        params: parameters, or dictionaries of parameters with hyper-parameters of their own.
        lr: the learning rate, at least 0.
        betas: how much of the first and of the second moment a step keeps, each in [0, 1).
        eps: added to the root of the second moment, at least 0.
        weight_decay: at least 0; a weight shrinks by lr * weight_decay of itself before it moves.

    Raises:
        ConfigError: a hyper-parameter is out of its range, or a parameter is not of real floating-point numbers.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As its base's, for real floating-point parameters only.

        Raises:
            ConfigError: a hyper-parameter is out of its range, or a parameter of another dtype.
        """
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not p.is_floating_point():
                raise ConfigError(f"parameter dtype = {p.dtype}: AdamW takes real floating-point numbers")

    def update(self, group: dict[str, Any], parameters: list[Tensor], scratch: Scratch) -> None:  # noqa: ARG002  # the kernel needs no scratch
        """One call of the kernel for all parameters of a device, a dtype and an age: as a rule, for all."""
        alike: defaultdict[tuple[torch.device, torch.dtype, int], list[Tensor]] = defaultdict(list)
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"] = 0
                state.update((name, torch.zeros_like(p)) for name in MOMENTS)
            state["step"] += 1
            alike[p.device, p.dtype, state["step"]].append(p)
        for (device, _, t), ps in alike.items():
            grads = [local(p.grad).contiguous() for p in ps if p.grad is not None]
            written = [[local(x) for x in kind] for kind in (ps, *([self.state[p][k] for p in ps] for k in MOMENTS))]
            # The kernel walks memory, not indices: it takes copies of tensors whose elements are not in order.
            copies = [[x.contiguous() for x in kind] for kind in written]
            # On its own device, filled there: copying a number to CUDA would make the host wait.
            step = torch.full((), float(t), device=device)
            torch._fused_adamw_(  # what torch.optim.AdamW(fused=True) calls
                copies[0],
                grads,
                copies[1],
                copies[2],
                [],
                [step] * len(ps),
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            for x, copy in zip(chain(*written), chain(*copies), strict=True):
                if copy is not x:
                    x.copy_(copy)


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

    def update(self, group: dict[str, Any], parameters: list[Tensor], scratch: Scratch) -> None:
        """Four passes, slice by slice; a parameter without a flat view to slice goes whole, through its own scratch."""
        beta1, beta2 = group["betas"]
        for p in parameters:
            state = self.state[p]
            if not state:
                state["exp_avg"] = torch.zeros_like(p)
            assert p.grad is not None
            tensors = [local(x) for x in (p, p.grad, state["exp_avg"])]
            flat = all(x.is_contiguous() for x in tensors)
            for p_, g_, m, s in scratch.slices(tensors) if flat else [(*tensors, torch.empty_like(tensors[0]))]:
                p_.mul_(1 - group["lr"] * group["weight_decay"])
                torch.lerp(g_, m, beta1, out=s).sign_()
                p_.add_(s, alpha=-group["lr"])
                m.lerp_(g_, 1 - beta2)


def is_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter multiplies an input: of two dimensions or more, and no norm's weight or experts' biases."""
    return p.ndim >= 2 and not name.endswith(("_norm.weight", "_norm.bias", "_bias"))


def is_for_muon(name: str, p: Tensor) -> bool:
    """Whether `MuonAdamW` gives a parameter to Muon: the blocks' matrices, but not those of experts.

    `torch.optim.Muon` takes two dimensions only, and experts' are one tensor of three: one update of them all together
    would not make each expert's singular values alike.
    """
    return name.startswith("blocks.") and p.ndim == 2 and is_matrix(name, p)


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` for the matrices between embedding and head, `torch.optim.AdamW` for everything else.

    Which they are says `is_for_muon`.

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
        self.parts: list[torch.optim.Optimizer] = []  # torch's own refuse a list without parameters
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **shared))
        if others:
            self.parts.append(torch.optim.AdamW(others, **shared, **adamw))
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


def local(x: Tensor) -> Tensor:
    """The part of a sharded tensor (DTensor, under FSDP2) that this process holds: the update is element by element."""
    return x.to_local() if hasattr(x, "to_local") else x


def in_range(name: str, value: object, low: float, high: float) -> None:
    """Raise ConfigError unless `value` is a number in [low, high)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ConfigError(f"{name} = {value!r}: must be a number in [{low:g}, {high:g})")
