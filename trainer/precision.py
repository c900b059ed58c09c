"""What the precisions of a `Plan` need beside the model: autocast, a scale for the loss, master weights in float32."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}  # the dtype of matrix products
PARAMETERS = {"bf16": torch.bfloat16, "bf16-master": torch.bfloat16}  # where it is not float32


def autocast(precision: str, device: str) -> AbstractContextManager[Any]:
    """The context of forward and loss; backward runs outside of it."""
    return torch.autocast(device, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()


def loss_scaler(precision: str, device: str, **options: Any) -> torch.amp.GradScaler:
    """The scale of the loss in float16, whose smallest gradients would be 0; elsewhere it does nothing."""
    return torch.amp.GradScaler(device, enabled=precision == "fp16-mixed", **options)


def products_in(precision: str) -> torch.dtype:
    """The dtype of matrix products."""
    return AUTOCAST.get(precision) or PARAMETERS.get(precision, torch.float32)


class Masters:
    """Float32 copies of a model in half precision: the optimizer moves them, and the model takes them over, rounded.

    A step of 1e-3 of a weight is lost in bfloat16, whose numbers are 2^-8 apart; in the copy it adds up. Gradients are
    cast when all micro-batches are done or, with `fp32_gradients`, added in float32 as each of them comes.

    Attributes:
        model: a copy of the model whose parameters are the masters; buffers are shared.
        pairs: (parameter, master).
    """

    def __init__(self, model: nn.Module, *, fp32_gradients: bool) -> None:
        self.model = copy.deepcopy(model, {id(b): b for b in model.buffers()})
        self.fp32_gradients = fp32_gradients
        for p in self.model.parameters():
            p.data = p.detach().float()
        self.pairs = list(zip(model.parameters(), self.model.parameters(), strict=True))
        if fp32_gradients:
            for p, master in self.pairs:
                master.grad = torch.zeros_like(master)
                p.register_post_accumulate_grad_hook(_adds_to(master))  # type: ignore[no-untyped-call]  # torch's

    def take_gradients(self) -> None:
        """Hand the model's gradients to the masters."""
        for p, master in self.pairs:
            if p.grad is not None:
                master.grad = p.grad.float()
                p.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Copy the masters to the model, and clear the gradients."""
        for p, master in self.pairs:
            p.copy_(master)
            if self.fp32_gradients:
                assert master.grad is not None
                master.grad.zero_()
            else:
                master.grad = None

    def resident(self) -> Iterator[Tensor]:
        """What is alive from step to step."""
        for _, master in self.pairs:
            yield master
            if self.fp32_gradients and master.grad is not None:
                yield master.grad


def _adds_to(master: nn.Parameter) -> Any:
    def hook(p: Tensor) -> None:
        assert p.grad is not None
        assert master.grad is not None
        master.grad.add_(p.grad)
        p.grad = None

    return hook
