"""Clipping by the global norm (Pascanu et al. 2013), without a wait for the device and without a copy of a gradient."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from estimator.describe.checks import ConfigError
from trainer.optim.optimizers import in_range, local

if TYPE_CHECKING:
    from collections.abc import Iterable


@torch.no_grad()
def gradient_clipping(parameters: Tensor | Iterable[Tensor], max_norm: float, eps: float = 1e-6) -> Tensor:
    """Scale all gradients, in place, so that their common l2 norm is at most `max_norm`; return the norm before.

    The factor is min(1, max_norm / (norm + eps)) and is always multiplied in: to ask first whether it is below 1 would
    make the host wait for the device in each step, and x * 1 is x. If the norm is not finite the factor is 1: the
    gradients stay as they are, and the returned norm is the report; who reads it decides whether to stop.

    Args:
        parameters: one tensor or any iterable of them, on any devices and of any dtypes; those without a gradient are
            passed over. Of sharded ones (DTensor) the norm is that of all shards together.
        max_norm: the greatest norm that is left, above 0.
        eps: keeps the quotient finite, at least 0.

    Returns:
        The norm of all gradients together before clipping, a scalar on the first gradient's device; 0 if there is none.

    Raises:
        ConfigError: max_norm or eps is out of its range.
    """
    in_range("max_norm", max_norm, 0, math.inf)
    in_range("eps", eps, 0, math.inf)
    if max_norm == 0:
        raise ConfigError("max_norm = 0: must be above 0")
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]  # a generator can be walked only once
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    device = gradients[0].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    if hasattr(norm, "full_tensor"):  # a DTensor: every process has the sum over its own shards only
        norm = norm.full_tensor()
    factor = torch.where(norm.isfinite(), (max_norm / (norm + eps)).clamp(max=1.0), 1.0)
    for g in gradients:
        local(g).mul_(factor.to(g.device))
    return norm
