"""`sdpa_attention_forward`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.tensor import Tensor, arguments
from estimator.eager.views import contiguous_of, transpose
from estimator.models.attention import attend

if TYPE_CHECKING:
    from estimator.models.layers import Recipe


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, recipe: Recipe) -> Tensor:
    """(B, T, h, e)."""
    with arguments((q, k, v, mask)) as results:
        results.append(contiguous_of(transpose(attend(q, k, v, mask, recipe), 1, 2)))
    return results[0]
