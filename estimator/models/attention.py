"""Causal attention; `trainer.model.attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.parts import Norm
from estimator.describe.plan import alignment_on_cuda, fused_on_cuda
from estimator.eager import autocast, ops
from estimator.eager.attention import attention_math
from estimator.eager.letters import ONE, constant
from estimator.eager.linalg import MASK_ALIGNMENT, matmul, scaled_dot_product_attention
from estimator.eager.pointwise import clamp, sigmoid, soft_cap
from estimator.eager.tensor import FLOAT32, Locals, Tensor, arguments
from estimator.eager.views import cast, concatenate, expand, repeat_heads, reshape, slice_last, split, transpose, view
from estimator.models.layers import Linear, Module, dropout
from estimator.models.norms import build_norm
from estimator.models.positions import rotate_part
from estimator.parallel.context import gathered
from estimator.parallel.sequence import over_part
from estimator.parallel.tensor import share

if TYPE_CHECKING:
    from collections.abc import Mapping

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine
    from estimator.models.layers import Recipe


FLASH_HAS_NONE = 3  # dimensions of a mask: `check_attn_mask_shape` of aten/src/ATen/native/transformers/sdp_utils_cpp.h


def fused_kernel(kernel: str, device: str, *, masked: bool) -> str:
    """`kernel`, but that on CUDA flash takes no mask, and the memory-efficient kernel comes next."""
    return fused_on_cuda(half=True, masked=masked) if (kernel, device) == ("flash", "cuda") else kernel


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    recipe: Recipe,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    repeats: bool = True,
) -> Tensor:
    """By separate ops or by SDPA, with `enable_gqa` if it `repeats` keys and values of fewer heads."""
    machine = q.machine
    kernel = fused_kernel(recipe.attention, machine.device, masked=mask is not None)
    if (kernel, recipe.attention) == ("efficient", "flash"):  # in its place, if it takes heads of this width
        align = constant(alignment_on_cuda(half=True))
        kernel = "efficient" if machine.divides(align, q.shape[-1]) else "math"
    if k.shape[1] is not q.shape[1] and (kernel == "efficient" or (kernel == "flash" and not repeats)):
        kernel = "math"  # that takes as many heads of keys as of queries
    if kernel == "math" or (kernel == "flash" and mask is not None and len(mask.shape) == FLASH_HAS_NONE):
        return attention_math(q, k, v, mask, drops=recipe.dropout, repeats=repeats)
    if not recipe.attention.startswith("naive"):
        efficient = kernel == "efficient"
        pads = efficient and mask is not None and not machine.divides(constant(MASK_ALIGNMENT), q.shape[-2])
        return scaled_dot_product_attention(q, k, v, mask, drops=recipe.dropout, efficient=efficient, pads=pads)
    assert mask is not None
    with arguments((q, k, v, mask, bias, sinks)) as results, Locals() as names:
        names.scores = matmul(q, transpose(k, -2, -1))
        names.scores = ops.mul_number(names.scores)
        if recipe.parts.attention.softcap is not None:
            names.scores = soft_cap(names.scores)
        if bias is not None:
            names.scores = ops.add(names.scores, bias)
        names.scores = ops.masked_fill(names.scores, mask)
        if sinks is not None:
            b, h, t, _ = names.scores.shape
            column = expand(view(sinks, (ONE, h, ONE, ONE)), (b, h, t, ONE))
            names.scores = concatenate((names.scores, column))
        if recipe.attention == "naive-fp32":
            names.weights = cast(ops.softmax(names.scores, FLOAT32), q.dtype)
        else:
            names.weights = ops.softmax(names.scores, autocast.fp32(machine, "cuda"))
        if sinks is not None:
            names.weights = slice_last(names.weights, mask.shape[-1])
        names.weights = dropout(names.weights, recipe)
        results.append(matmul(names.weights, v))
        return results[0]


class Attention(Module):
    """Attention with one projection each for queries, keys and values, or one for all."""

    linear = Linear

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "attention")
        self.recipe, a = recipe, recipe.parts.attention
        self.part = a
        size = machine.shapes.letters
        self.h, self.k_heads, self.g, self.e = size["h"], size["k"], size["g"], size["e"]
        if recipe.tensor_parallel:
            self.k_heads = share(machine, self.k_heads)
            self.h = machine.product((self.k_heads, self.g))
        wide, narrow = machine.product((self.h, self.e)), machine.product((self.k_heads, self.e))
        self.widths = (wide, narrow, narrow)
        with self.inside():
            if a.fused:
                self.qkv = self.child(self.linear(machine, "qkv", size["d"], wide + 2 * narrow, bias=a.bias))
            else:
                self.q = self.child(self.linear(machine, "q", size["d"], wide, bias=a.bias))
                self.k = self.child(self.linear(machine, "k", size["d"], narrow, bias=a.bias))
                self.v = self.child(self.linear(machine, "v", size["d"], narrow, bias=a.bias))
            if a.qk_norm != "none":
                shapes = {
                    "head": ((self.e,), (self.e,)),
                    "head-own": ((self.h, self.e), (self.k_heads, self.e)),
                    "width": ((wide,), (narrow,)),
                }[a.qk_norm]
                self.q_norm, self.k_norm = (
                    self.child(build_norm(machine, recipe, name, a.qk_norm_kind, *shape))
                    for name, shape in zip(("q_norm", "k_norm"), shapes, strict=True)
                )
            self.out_gate = None
            if a.out_gate:
                self.out_gate = self.child(Linear(machine, "out_gate", size["d"], wide, bias=False))
            self.out_norm = self.child(
                build_norm(machine, recipe, "out_norm", Norm("rms"), wide) if a.out_norm else None
            )
            self.out = self.child(self.linear(machine, "out", wide, size["d"], bias=a.out_bias))
        self.sinks = self.parameter(self.h) if a.sinks else None
        if recipe.tensor_parallel:
            self.cut(size)

    def cut(self, size: Mapping[str, Size]) -> None:
        """Each rank has its part of the heads."""
        wide, narrow = (self.machine.product((size[heads], self.e)) for heads in ("h", "k"))
        sequence = self.recipe.sequence_parallel
        if self.part.fused:
            self.qkv.cut_by("output", wide + 2 * narrow, sequence=sequence)
        else:
            for layer, width in ((self.q, wide), (self.k, narrow), (self.v, narrow)):
                layer.cut_by("output", width, sequence=sequence)
        if self.out_gate is not None:
            self.out_gate.cut_by("output", wide, sequence=sequence)
        if self.part.qk_norm == "head":  # one weight for all heads, of which a rank has some
            for norm in (self.q_norm, self.k_norm):
                over_part(norm, local=True)
        self.out.cut_by("input", wide, sequence=sequence)

    def project(self, v: Locals, x: Tensor) -> None:
        """Queries, keys and values as names of the frame."""
        clips = self.part.clip is not None
        if self.part.fused:
            with Locals() as inner:
                inner.qkv = self.qkv(x)
                if clips:
                    inner.qkv = clamp(inner.qkv, both=True)
                v.q, v.k, v.v = split(inner.qkv, self.widths)
        else:
            v.q = self.q(x)
            v.k = self.k(x)
            v.v = self.v(x)
        if self.part.qk_norm == "width":
            self.normed(v)
        if clips and not self.part.fused:
            a, b, c = clamp(v.q, both=True).hold(), clamp(v.k, both=True).hold(), clamp(v.v, both=True).hold()
            v.q, v.k, v.v = a, b, c
            for clamped in (a, b, c):
                clamped.drop()

    def normed(self, v: Locals) -> None:
        """q, k = q_norm(q), k_norm(k): both are made before a name is bound again."""
        a = self.q_norm(v.q).hold()
        b = self.k_norm(v.k).hold()
        v.q, v.k = a, b
        a.drop()
        b.drop()

    def forward(
        self,
        v: Locals,
        x: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        query_scale: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        B, T, _ = x.shape
        self.project(v, x)
        v.q = view(v.q, (B, T, self.h, self.e))
        v.k = view(v.k, (B, T, self.k_heads, self.e))
        v.v = transpose(view(v.v, (B, T, self.k_heads, self.e)), 1, 2)
        by_head = self.part.qk_norm.startswith("head")
        if by_head and not self.part.qk_norm_late:
            self.normed(v)
        if cos is not None and sin is not None:
            pairs = self.recipe.parts.positions.pairs
            v.q = rotate_part(v.q, cos, sin, pairs)
            v.k = rotate_part(v.k, cos, sin, pairs)
            if by_head and self.part.qk_norm_late:
                self.normed(v)
        if query_scale is not None:
            v.q = ops.mul(v.q, query_scale)
        if self.recipe.context_parallel:
            v.k = gathered(v.k, self.machine.shapes.letters["T"])
            v.v = transpose(gathered(transpose(v.v, 1, 2), self.machine.shapes.letters["T"]), 1, 2)
        v.q, v.k = transpose(v.q, 1, 2), transpose(v.k, 1, 2)
        v.k = repeat_heads(v.k, self.g)
        v.v = repeat_heads(v.v, self.g)
        v.y = attend(v.q, v.k, v.v, mask, self.recipe, bias, self.sinks)
        y = reshape(transpose(v.y, 1, 2), (B, T, self.widths[0]))
        if self.out_gate is not None:  # y is bound anew, and what attention found let go
            y = v.y = ops.mul(y, sigmoid(self.out_gate(x)))
        return dropout(self.out(y if self.out_norm is None else self.out_norm(y)), self.recipe)
