"""What the precisions of a `Plan` need beside the model: autocast, a scale for the loss, master weights in float32."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from estimator.describe.plan import Plan

AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}  # the dtype of matrix products
PARAMETERS = {"bf16": torch.bfloat16, "bf16-master": torch.bfloat16}  # where it is not float32


def autocast(plan: Plan, device: str) -> AbstractContextManager[Any]:
    """The context of forward and loss; backward runs outside of it."""
    dtype = torch.bfloat16 if plan.autocast else AUTOCAST.get(plan.precision)
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


class ShardedScaler(torch.amp.GradScaler):
    """A scale of the loss where each process has a part of the gradients: an overflow in one is an overflow in all.

    PyTorch's own (`torch.distributed.fsdp.sharded_grad_scaler`) adds the processes' findings up, and a fused optimizer
    takes the 2 of two overflows for none.
    """

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, and ask the others whether theirs are finite."""
        super().unscale_(optimizer)
        if self.is_enabled():
            for found in self._found_inf_per_device(optimizer).values():
                dist.all_reduce(found, dist.ReduceOp.MAX)


def loss_scaler(precision: str, device: str, *, sharded: bool = False, **options: Any) -> torch.amp.GradScaler:
    """The scale of the loss in float16, whose smallest gradients would be 0; elsewhere it does nothing."""
    kind = ShardedScaler if sharded else torch.amp.GradScaler
    return kind(device, enabled=precision == "fp16-mixed", **options)


def products_in(precision: str) -> torch.dtype:
    """The dtype of matrix products."""
    if precision == "bf16-fsdp":
        return torch.bfloat16
    return AUTOCAST.get(precision) or PARAMETERS.get(precision, torch.float32)


def float32_copy(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters are float32; buffers are shared."""
    copied = copy.deepcopy(model, {id(b): b for b in model.buffers()})
    for p in copied.parameters():
        p.data = p.detach().float()
    return copied


class Masters:
    """Float32 copies of parameters in half precision: the optimizer moves them, and the model takes them over, rounded.

    A step of 1e-3 of a weight is lost in bfloat16, whose numbers are 2^-8 apart; in the copy it adds up. Gradients are
    cast when all micro-batches are done or, with `fp32_gradients`, added in float32 as each of them comes.

    Attributes:
        named: the copies, of parameters or of a process's shards of them, by name.
        pairs: (parameter, copy).
        mean: makes the copies' gradients the mean of all processes', in place, where nothing else has.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        named: Mapping[str, nn.Parameter],
        *,
        fp32_gradients: bool = False,
        mean: Callable[[Tensor], object] | None = None,
    ) -> None:
        self.named, self.fp32_gradients, self.mean = named, fp32_gradients, mean
        self.pairs = [(p, named[name]) for name, p in parameters.items()]
        if fp32_gradients:
            for p, master in self.pairs:
                master.grad = torch.zeros_like(master)
                p.register_post_accumulate_grad_hook(_adds_to(master))  # type: ignore[no-untyped-call]  # torch's

    def take_gradients(self) -> None:
        """Hand the parameters' gradients to the copies."""
        for p, master in self.pairs:
            if p.grad is not None:
                master.grad = p.grad.float()
                p.grad = None
            if self.mean is not None and master.grad is not None:
                self.mean(master.grad)

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the copies to the parameters, and clear their gradients."""
        for p, master in self.pairs:
            p.copy_(master)
            if self.fp32_gradients:
                assert master.grad is not None
                master.grad.zero_()
            else:
                master.grad = None


def _adds_to(master: nn.Parameter) -> Any:
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        assert master.grad is not None
        master.grad.add_(p.grad)
        p.grad = None

    return hook
