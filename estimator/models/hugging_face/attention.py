"""`LlamaAttention`, and attention that is written like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.linalg import scaled_dot_product_attention
from estimator.eager.tensor import Locals
from estimator.eager.views import contiguous, reshape, transpose, unsqueeze, view
from estimator.models.attention import Attention
from estimator.models.hugging_face.positions import rotated
from estimator.models.norms import ScaleAndShift

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class HFAttention(Attention):
    """`LlamaAttention`; queries, keys and values are names of its frame to the end."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.owned.sort(key=lambda x: isinstance(x, ScaleAndShift))  # projections, norms

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        query_scale: Tensor | None,
    ) -> Tensor:
        B, T, _ = x.shape
        v.q = transpose(view(self.q(x), (B, T, self.h, self.e)), 1, 2)
        v.k = transpose(view(self.k(x), (B, T, self.k_heads, self.e)), 1, 2)
        v.v = transpose(view(self.v(x), (B, T, self.k_heads, self.e)), 1, 2)
        if cos is not None and sin is not None:
            with Locals() as inner:
                inner.cos, inner.sin = unsqueeze(cos, 1), unsqueeze(sin, 1)
                inner.q, inner.k = rotated(v.q, inner.cos, inner.sin), rotated(v.k, inner.cos, inner.sin)
                v.q, v.k = inner.q, inner.k
        v.y = scaled_dot_product_attention(v.q, v.k, v.v, mask, drops=self.recipe.dropout)
        v.y = contiguous(transpose(v.y, 1, 2))
        v.y = reshape(v.y, (B, T, self.widths[0]))
        return self.out(v.y)
