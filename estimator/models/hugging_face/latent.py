"""Multi-head latent attention: `DeepseekV3Attention`, and attention that is written like it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.tensor import Locals, arguments
from estimator.eager.views import (
    concatenate,
    contiguous_of,
    copy_into_last,
    expand,
    reshape,
    slice_last,
    split,
    transpose,
    unsqueeze,
    view,
)
from estimator.models.attention import attend
from estimator.models.hugging_face.positions import apply_rotary, rotate_complex
from estimator.models.latent import LatentAttention

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


class HFLatentAttention(LatentAttention):
    """`DeepseekV3Attention`."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.written = recipe.of_class

    def forward(  # type: ignore[override]  # its block takes the weights too
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        query_scale: Tensor | None,
    ) -> tuple[Tensor, None]:
        """What comes out; fused attention returns no weights."""
        B, T, _ = x.shape
        v.q = transpose(view(self.queries(x), (B, T, self.h, self.nope + self.rope)), 1, 2)
        v.q_pass, v.q_rot = split(v.q, (self.nope, self.rope))
        v.compressed = self.kv_down(x)
        v.kv, v.k_rot = split(v.compressed, (self.rank, self.rope))
        v.kv = self.kv_norm(v.kv)
        v.kv = view(v.kv, (B, ONE, T, self.rank))
        v.k_rot = view(v.k_rot, (B, ONE, T, self.rope))
        assert cos is not None
        if sin is None:
            rotate_complex(v, cos)
        elif self.recipe.parts.positions.pairs == "neighbours":
            rotate_apart(v, cos, sin)
        else:
            apply_rotary(v, "q_rot", "k_rot", cos, sin, self.written)
        v.query = concatenate((v.q_pass, v.q_rot))
        v.key, v.value = self.expanded(v.kv, v.k_rot)
        v.y = self.attended(v.query, v.key, v.value, mask)
        v.y = reshape(v.y, (B, T, self.wide))
        v.y = self.out(v.y)
        return v.take("y"), None

    def expanded(self, kv: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """`expand_kv`: keys and values, (B, h, T, e_n + e_r) and (B, h, T, e_v)."""
        with arguments((kv, k_rot)) as results, Locals() as v:
            B, _, T, _ = kv.shape
            v.kv = transpose(view(self.kv_up(kv), (B, T, self.h, self.nope + self.value)), 1, 2)
            v.k_nope, v.value = split(v.kv, (self.nope, self.value))
            v.k_rot = expand(k_rot, (B, self.h, T, self.rope))
            v.key = kv.machine.empty((B, self.h, T, self.nope + self.rope), v.kv.dtype)
            copy_into_last(v.key, v.k_nope)
            copy_into_last(v.key, v.k_rot)
            results += [v.take("key"), v.take("value")]
        return results[0], results[1]

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`sdpa_attention_forward`, (B, T, h, e_v)."""
        with arguments((q, k, v, mask)) as results, Locals() as w:
            w.y = attend(q, k, v, mask, self.recipe)
            results.append(contiguous_of(transpose(w.y, 1, 2)))
        return results[0]


def rotate_apart(v: Locals, cos: Tensor, sin: Tensor) -> None:
    """`apply_rotary_pos_emb_interleave`: neighbours in `v.q_rot` and `v.k_rot` are rotated, and end up in halves."""
    with Locals() as w:
        half = cos.shape[-1] / 2
        w.cos, w.sin = unsqueeze(slice_last(cos, half), 1), unsqueeze(slice_last(sin, half), 1)
        w.q1, w.q2 = slice_last(v.q_rot, half, step=2), slice_last(v.q_rot, half, step=2)
        w.k1, w.k2 = slice_last(v.k_rot, half, step=2), slice_last(v.k_rot, half, step=2)
        w.q, w.k = (turned(w.q1, w.q2, w.cos, w.sin), turned(w.k1, w.k2, w.cos, w.sin))
        v.q_rot, v.k_rot = w.q, w.k


def turned(a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """torch.cat([a * cos - b * sin, b * cos + a * sin], -1)."""
    first = ops.sub(ops.mul(a, cos), ops.mul(b, sin))
    return concatenate((first, ops.add(ops.mul(b, cos), ops.mul(a, sin))))
