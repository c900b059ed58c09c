"""`LlamaAttention`, and attention that is written like it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from estimator.eager import autocast, ops
from estimator.eager.letters import ONE
from estimator.eager.linalg import matmul
from estimator.eager.pointwise import clamp_in_place, tanh
from estimator.eager.routing import greatest_last
from estimator.eager.tensor import FLOAT32, Locals, arguments
from estimator.eager.views import (
    cast,
    concatenate,
    contiguous_of,
    expand,
    repeat_heads,
    reshape,
    slice_last,
    transpose,
    view,
)
from estimator.models.attention import Attention, attend
from estimator.models.hugging_face.positions import apply_rotary, scale_of_positions, taken_apart
from estimator.models.layers import dropout, dropout_at
from estimator.models.norms import ScaleAndShift

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class HFAttention(Attention):
    """`LlamaAttention`; queries, keys and values are names of its frame to the end."""

    drops = False  # what comes out, in here

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.written = recipe.of_class
        undropped = self.written.undropped == recipe.parts.positions.kind
        self.scores = replace(recipe, dropout=recipe.dropout and not undropped)
        self.owned.sort(key=lambda x: isinstance(x, ScaleAndShift))  # projections, norms
        if self.written.out_first:
            self.owned.sort(key=lambda x: x is not self.out)

    def project(self, v: Locals, x: Tensor) -> None:
        """Queries, keys and values as names of the frame, (B, heads, T, e) each."""
        {"each": self.each, "viewed": self.viewed, "transposed": self.transposed, "whole": self.whole}[
            self.written.queries
        ](v, x)

    def heads(self, x: Tensor, heads: Size) -> Tensor:
        """(B, T, heads, e)."""
        return view(x, (*x.shape[:2], heads, self.e))

    def each(self, v: Locals, x: Tensor) -> None:
        """One after the other, with its norm."""
        normed = self.part.qk_norm != "none" and not self.part.qk_norm_late
        if self.part.fused:
            v.qkv = self.qkv(x)
            v.q, v.k, v.v = (slice_last(v.qkv, width) for width in self.widths)
            v.q = transpose(self.heads(v.q, self.h), 1, 2)
            v.k = transpose(self.heads(v.k, self.k_heads), 1, 2)
            v.v = transpose(self.heads(v.v, self.k_heads), 1, 2)
            return
        if normed:
            v.q = transpose(self.q_norm(self.heads(self.q(x), self.h)), 1, 2)
            v.k = transpose(self.k_norm(self.heads(self.k(x), self.k_heads)), 1, 2)
        else:
            v.q = transpose(self.heads(self.q(x), self.h), 1, 2)
            v.k = transpose(self.heads(self.k(x), self.k_heads), 1, 2)
        v.v = transpose(self.heads(self.v(x), self.k_heads), 1, 2)

    def viewed(self, v: Locals, x: Tensor) -> None:
        """All three, then the norms, then transposed."""
        v.q = self.heads(self.q(x), self.h)
        v.k = self.heads(self.k(x), self.k_heads)
        v.v = self.heads(self.v(x), self.k_heads)
        self.norms(v)
        v.q = transpose(v.q, 1, 2)
        v.k = transpose(v.k, 1, 2)
        v.v = transpose(v.v, 1, 2)

    def transposed(self, v: Locals, x: Tensor) -> None:
        """All three, transposed, then the norms."""
        v.q = transpose(self.heads(self.q(x), self.h), 1, 2)
        v.k = transpose(self.heads(self.k(x), self.k_heads), 1, 2)
        v.v = transpose(self.heads(self.v(x), self.k_heads), 1, 2)
        self.norms(v)

    def whole(self, v: Locals, x: Tensor) -> None:
        """All three, normed over their whole width or clamped, then heads."""
        normed = self.part.qk_norm == "width"
        v.q = self.q_norm(self.q(x)) if normed else self.q(x)
        v.k = self.k_norm(self.k(x)) if normed else self.k(x)
        v.v = self.v(x)
        if self.part.clip is not None:
            for clipped in (v.q, v.k, v.v):
                clamp_in_place(clipped)
        v.q = transpose(self.heads(v.q, self.h), 1, 2)
        v.k = transpose(self.heads(v.k, self.k_heads), 1, 2)
        v.v = transpose(self.heads(v.v, self.k_heads), 1, 2)

    def norms(self, v: Locals) -> None:
        """Of queries, then of keys, if the part has them here."""
        if self.part.qk_norm != "none":
            v.q = self.q_norm(v.q)
            v.k = self.k_norm(v.k)

    def rotate(self, v: Locals, cos: Tensor, sin: Tensor) -> None:
        """Queries and keys by their positions."""
        if self.written.partial != "before":
            apply_rotary(v, "q", "k", cos, sin, self.written)
            return
        width = cos.shape[-1]
        v.q_rot, v.q_pass = taken_apart(v.q, width)
        v.k_rot, v.k_pass = taken_apart(v.k, width)
        apply_rotary(v, "q_rot", "k_rot", cos, sin, self.written)
        v.q = concatenate((v.q_rot, v.q_pass))
        v.k = concatenate((v.k_rot, v.k_pass))

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        query_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """What comes out, and the weights of eager attention, which a block has a name for."""
        B, T, _ = x.shape
        self.project(v, x)
        if cos is not None and sin is not None:
            self.rotate(v, cos, sin)
        if self.part.qk_norm_late:
            self.norms(v)
        if query_scale is not None:
            v.q = ops.mul(v.q, scale_of_positions(query_scale, v.q.dtype))
        v.y, v.weights = self.attended(v.q, v.k, v.v, mask)
        v.y = reshape(v.y, (B, T, self.widths[0]))
        if self.out_norm is not None:
            v.y = self.out_norm(v.y)
        v.y = self.out(v.y)
        v.y = dropout_at(v.y, drops=self.recipe.dropout and (self.drops or "attention" in self.written.drops))
        return v.take("y"), None if v.weights is None else v.take("weights")

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, T, h, e) of (B, heads, T, e) each, and the weights that eager attention returns."""
        if self.recipe.attention.startswith("naive"):
            return self.eager(q, k, v, mask)
        return self.fused(q, k, v, mask), None

    def fused(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`sdpa_attention_forward`: keys and values are repeated for the queries' heads with a mask."""
        with arguments((q, k, v, mask)) as results, Locals() as w:
            w.k, w.v = (k, v) if mask is None else (repeat_heads(k, self.g), repeat_heads(v, self.g))
            w.y = attend(q, w.k, w.v, mask, self.scores)
            results.append(contiguous_of(transpose(w.y, 1, 2)))
        return results[0]

    def eager(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """`eager_attention_forward`."""
        with arguments((q, k, v, mask)) as results, Locals() as w:
            w.k, w.v = repeat_heads(k, self.g), repeat_heads(v, self.g)
            self.score(w, q)
            if mask is not None:
                w.weights = ops.add(w.weights, mask)
            self.softmax(w, q)
            self.dropped(w)
            w.y = matmul(w.weights, w.v)
            results.append((contiguous_of(transpose(w.y, 1, 2)), w.take("weights")))
        found: tuple[Tensor, Tensor] = results[0]
        return found

    def dropped(self, w: Locals) -> None:
        """Dropout of `w.weights`."""
        w.weights = dropout(w.weights, self.scores)

    def score(self, w: Locals, q: Tensor) -> None:
        """`w.weights` of queries and keys, before the mask."""
        w.weights = ops.mul_number(matmul(q, transpose(w.k, 2, 3)))
        if self.part.softcap is not None:
            w.weights = ops.div_number(w.weights)
            w.weights = tanh(w.weights)
            w.weights = ops.mul_number(w.weights)

    def softmax(self, w: Locals, q: Tensor) -> None:
        """Of `w.weights`, in fp32 and back to the queries' dtype."""
        w.weights = cast(ops.softmax(w.weights, FLOAT32), q.dtype)


class SinkAttention(HFAttention):
    """Eager attention of gpt-oss: a column of sinks among the scores, whose greatest is taken away from each row."""

    def softmax(self, w: Locals, q: Tensor) -> None:
        """Of `w.weights` and the sinks; `w.without` these."""
        assert self.sinks is not None
        b, h, t, keys = w.weights.shape
        w.sinks = expand(view(self.sinks, (ONE, h, ONE, ONE)), (b, h, t, ONE))
        w.combined = concatenate((w.weights, w.sinks))
        greatest, at = greatest_last(w.combined)
        at.discard()
        w.combined = ops.sub(w.combined, greatest)
        w.probabilities = ops.softmax(w.combined, autocast.fp32(q.machine, "cuda"))
        w.without = slice_last(w.probabilities, keys)

    def dropped(self, w: Locals) -> None:
        """In the values' dtype."""
        w.weights = cast(dropout(w.without, self.scores), w.v.dtype)
        del w.without


class OwnSoftmax(HFAttention):
    """Eager attention whose softmax is in the dtype of the scores, and goes to the values'."""

    def softmax(self, w: Locals, q: Tensor) -> None:
        """Of `w.weights`."""
        w.weights = ops.softmax(w.weights, autocast.fp32(q.machine, "cuda"))
        w.weights = cast(w.weights, w.v.dtype)


class WideScores(HFAttention):
    """Eager attention of queries and keys in fp32, and a softmax of what comes of them."""

    def score(self, w: Locals, q: Tensor) -> None:
        """`w.weights` of queries and keys."""
        w.weights = ops.mul_number(matmul(cast(q, FLOAT32), transpose(cast(w.k, FLOAT32), 2, 3)))

    def softmax(self, w: Locals, q: Tensor) -> None:
        """Of `w.weights`, and to the values' dtype."""
        w.weights = cast(ops.softmax(w.weights, autocast.fp32(q.machine, "cuda")), w.v.dtype)
