"""What a user's function returns, as a training step."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from trainer.optim.precision import PARAMETERS, autocast
from trainer.referee.measure import Step, build_optimizer, trained

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from trainer.referee.recorder.assumptions import Assumptions

PRECISIONS = ("fp32", "tf32", "bf16", "bf16-mixed", "fp16-mixed")  # of a module of one's own


COMPILED = "torch.compile is left out: this is the step without it; compiled, kernels are fused and less is kept"


class ModuleStep(Step):
    """A step of a module with a loss of its own, run as a plan says.

    Args:
        module: what is trained.
        loss: `loss(module, *inputs)` is a tensor without dimensions.
        inputs: what a micro-batch is.
        p: micro-batches, optimizer, clipping and precision.
        device: what `autocast` and the optimizer's implementation are asked of.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[..., Tensor], inputs: tuple[Any, ...], p: Plan, device: str = "cpu"
    ) -> None:
        self.loss, self.given = loss, inputs
        tensors: Any = tuple(x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor)) or (torch.zeros(1),)
        super().__init__(module, build_optimizer(trained(module), p, device), tensors, p)

    def forward(self) -> Tensor:
        """The loss of one micro-batch, divided by their number."""
        with autocast(self.plan, self.inputs[0].device.type):
            loss = self.loss(self.module, *self.given)
        if not isinstance(loss, torch.Tensor):
            raise ConfigError(f"the loss is a {type(loss).__name__}: must be a tensor without dimensions")
        if loss.numel() != 1 or not loss.requires_grad:
            why = f"has the shape {tuple(loss.shape)}" if loss.numel() != 1 else "depends on no parameter"
            raise ConfigError(f"the loss {why}: must be one number that parameters with a gradient are trained by")
        return loss if self.plan.grad_accumulation == 1 else loss / self.plan.grad_accumulation


def as_step(built: Any, plan: Plan | None = None, device: str = "cpu") -> Any:
    """The step that `built` is, or that it makes with `plan` on `device`.

    Raises:
        ConfigError: it is nothing that can be trained.
    """
    if callable(built) and all(hasattr(built, name) for name in ("model", "optimizer", "inputs")):
        return built
    if isinstance(built, nn.Module):
        raise ConfigError("build returned a module alone: return (module, loss, inputs)")
    if not (isinstance(built, tuple) and len(built) == 3 and isinstance(built[0], nn.Module) and callable(built[1])):
        kind = type(built).__name__
        raise ConfigError(f"build returned a {kind}: must be (module, loss, inputs), a module, or a step")
    module, loss, inputs = built
    p = plan or Plan()
    if not any(x.requires_grad for x in module.parameters()):
        raise ConfigError("the module has no parameter that is trained: nothing of it wants a gradient")
    if p.precision not in PRECISIONS:
        raise ConfigError(f"precision = {p.precision!r}: allowed for a module of your own are {', '.join(PRECISIONS)}")
    if p.precision in PARAMETERS:
        module, inputs = module.to(PARAMETERS[p.precision]), in_dtype(inputs, PARAMETERS[p.precision])
    for name, mesh in ((n, getattr(x, "device_mesh", None)) for n, x in module.named_parameters()):
        if mesh is not None and mesh.device_type != device:
            raise ConfigError(
                f"{name} is shared out on a mesh of {mesh.device_type}, and the rules are {device}'s: let build take "
                "`device` and give it to init_device_mesh, or choose the mesh's rules with --device"
            )
    if device != "cpu":
        module, inputs = module.to(device), tree_map_only(torch.Tensor, lambda x: x.to(device), inputs)
    return ModuleStep(module, loss, inputs if isinstance(inputs, tuple) else (inputs,), p, device)


def in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    """The inputs with those of real numbers in `dtype`, as a module whose parameters are in it takes them."""
    return tree_map_only(torch.Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)


def check(step: Any, device: str = "cpu") -> None:
    """Whether a step can be recorded.

    Raises:
        ConfigError: a parameter, buffer or input is on another device than `device`.
    """
    named = [*step.model.named_parameters(), *step.model.named_buffers()]
    named += [("an input", x) for x in tree_leaves(step.inputs) if isinstance(x, torch.Tensor)]
    for name, x in named:
        if x.device.type != device:
            raise ConfigError(
                f"{name} is on the device {x.device}, and the rules are those of {device}: let the function take "
                '"device", which it is given, and build there; it takes no memory'
            )


@contextmanager
def eager(step: Any, assumptions: Assumptions | None = None) -> Iterator[None]:
    """Run what `torch.compile` has wrapped as it would run without; `assumptions` are told so."""
    compiled = [m for m in step.model.modules() if hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None)]
    if hasattr(getattr(step, "loss", None), "_torchdynamo_orig_callable"):
        compiled.append(step.loss)
    if compiled and assumptions is not None:
        assumptions.notes[COMPILED] = None
    with torch.compiler.set_stance("force_eager"):
        yield
