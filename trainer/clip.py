"""Clipping by the global norm (Pascanu et al. 2013), without a wait for the device and without a copy of a gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable


@torch.no_grad()
def gradient_clipping(parameters: Tensor | Iterable[Tensor], max_norm: float, eps: float = 1e-6) -> Tensor:
    """Scale all gradients, in place, so that their common l2 norm is at most `max_norm`; return the norm before.

    The factor is min(1, max_norm / (norm + eps)) and is always multiplied in: to ask first whether it is below 1 would
    make the host wait for the device in each step, and x * 1 is x. If the norm is not finite the factor is 1: the
    gradients stay as they are, and the returned norm is the report; who reads it decides whether to stop.

    Args:
        parameters: one tensor or any iterable of them; those without a gradient are passed over.
        max_norm: the greatest norm that is left, above 0.
        eps: keeps the quotient finite, at least 0.

    Returns:
        The norm of all gradients together before clipping, a scalar tensor on the first gradient's device.

    Raises:
        ValueError: max_norm or eps is out of its range.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm = {max_norm!r}: must be above 0")
    if not eps >= 0:
        raise ValueError(f"eps = {eps!r}: must be at least 0")
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    gradients = [p.grad for p in parameters if p.grad is not None]  # a generator can be walked only once
    if not gradients:
        return torch.zeros(())
    norms = [torch.linalg.vector_norm(g) for g in gradients]
    device = gradients[0].device
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
    factor = torch.where(norm.isfinite(), (max_norm / (norm + eps)).clamp(max=1.0), 1.0)
    for g in gradients:
        g.mul_(factor.to(g.device))
    return norm
