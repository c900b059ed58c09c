"""Multi-head latent attention; `trainer.model.latent`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.describe.parts import Norm
from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.views import concatenate, expand, reshape, split, transpose, view
from estimator.models.attention import attend
from estimator.models.layers import Linear, Module, dropout
from estimator.models.norms import build_norm
from estimator.models.positions import rotate

if TYPE_CHECKING:
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import Recipe


class LatentAttention(Module):
    """DeepSeek-V2, section 2.1, as it is trained."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "attention")
        self.recipe, a, size = recipe, recipe.parts.attention, machine.shapes.letters
        self.h, self.nope, self.rope, self.value = size["h"], size["e_n"], size["e_r"], size["e_v"]
        self.rank, self.latent = size["d_c"], a.latent
        queries, norm = machine.product((self.h, self.nope + self.rope)), Norm("rms")
        with self.inside():
            if a.latent == "keys":
                self.q = self.child(Linear(machine, "q", size["d"], queries, bias=False))
            else:
                self.q_down = self.child(Linear(machine, "q_down", size["d"], size["d_q"], bias=a.bias))
                self.q_norm = self.child(build_norm(machine, recipe, "q_norm", norm, size["d_q"]))
                self.q_up = self.child(Linear(machine, "q_up", size["d_q"], queries, bias=False))
            self.kv_down = self.child(Linear(machine, "kv_down", size["d"], self.rank + self.rope, bias=a.bias))
            self.kv_norm = self.child(build_norm(machine, recipe, "kv_norm", norm, self.rank))
            both = machine.product((self.h, self.nope + self.value))
            self.kv_up = self.child(Linear(machine, "kv_up", self.rank, both, bias=False))
            self.wide = machine.product((self.h, self.value))
            self.out = self.child(Linear(machine, "out", self.wide, size["d"], bias=a.out_bias))

    def queries(self, x: Tensor) -> Any:
        """(B, T, h e)."""
        return self.q(x) if self.latent == "keys" else self.q_up(self.q_norm(self.q_down(x)))

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
        v.q = view(self.queries(x), (B, T, self.h, self.nope + self.rope))
        v.q_nope, v.q_rope = split(v.q, (self.nope, self.rope))
        v.latent, v.k_rope = split(self.kv_down(x), (self.rank, self.rope))
        v.kv = view(self.kv_up(self.kv_norm(v.latent)), (B, T, self.h, self.nope + self.value))
        v.k_nope, v.v = split(v.kv, (self.nope, self.value))
        v.k_rope = view(v.k_rope, (B, T, ONE, self.rope))
        if cos is not None and sin is not None:
            pairs = self.recipe.parts.positions.pairs
            v.q_rope = rotate(v.q_rope, cos, sin, pairs)
            v.k_rope = rotate(v.k_rope, cos, sin, pairs)
        v.q = concatenate((v.q_nope, v.q_rope))
        if query_scale is not None:
            v.q = ops.mul(v.q, query_scale)
        v.q = transpose(v.q, 1, 2)
        v.k = transpose(concatenate((v.k_nope, expand(v.k_rope, (B, T, self.h, self.rope)))), 1, 2)
        v.v = transpose(v.v, 1, 2)
        v.y = attend(v.q, v.k, v.v, mask, self.recipe, bias)
        return dropout(self.out(reshape(transpose(v.y, 1, 2), (B, T, self.wide))), self.recipe)
