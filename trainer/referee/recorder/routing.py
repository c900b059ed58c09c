"""A real step whose router chooses as a recording assumes: every number as often as any other."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@contextmanager
def dealt_out() -> Iterator[None]:
    """What `topk` chooses of the last dimension of real numbers is dealt out: choice i of all is i modulo its length.

    The operator runs as ever, and allocates what it does; what it chose is then written over where it lies, past
    autograd, which has kept it for backward. So no row has a number twice, and the counts of any two numbers differ by
    one at most.
    """

    def dealt(topk: Callable[..., Any]) -> Callable[..., Any]:
        def chosen(x: torch.Tensor, k: int, dim: int = -1, *more: Any, **others: Any) -> Any:
            found = topk(x, k, dim, *more, **others)
            if x.is_floating_point() and x.dim() and dim in (-1, x.dim() - 1):
                choices = found[1].numpy()
                choices[...] = (np.arange(choices.size) % x.shape[-1]).reshape(choices.shape)
            return found

        return chosen

    method = torch.Tensor.topk
    with patch.object(torch, "topk", dealt(torch.topk)), patch.object(torch.Tensor, "topk", dealt(method)):
        yield
