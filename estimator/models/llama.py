"""Llama: RMSNorm, RoPE, SwiGLU, grouped-query attention; with biases on q, k and v it is Qwen2.

Mirrors `trainer.model.decoder.Llama`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sympy import Rational

from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.tensor import Locals, arguments
from estimator.eager.views import concatenate, repeat_heads, reshape, split, transpose, view
from estimator.models.layers import Linear, Module, RMSNorm, Transformer, attend, dropout

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe


def half(size: Size) -> Size:
    """size / 2."""
    return size * Rational(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`trainer.model.decoder.rotate`."""
    with arguments((x, cos, sin)) as results, Locals() as v:
        v.a, v.b = split(x, half(x.shape[-1]), 2)
        first = ops.sub(ops.mul(v.a, cos), ops.mul(v.b, sin))
        results.append(concatenate((first, ops.add(ops.mul(v.a, sin), ops.mul(v.b, cos)))))
        return results[0]


class Attention(Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "attention")
        self.recipe, bias = recipe, recipe.qkv_bias
        size = machine.shapes.letters
        self.h, self.k_heads, self.g, self.e = size["h"], size["k"], size["g"], size["e"]
        wide, narrow = machine.product((self.h, self.e)), machine.product((self.k_heads, self.e))
        self.wide = wide
        with self.inside():
            self.q = self.child(Linear(machine, "q", size["d"], wide, bias=bias))
            self.k = self.child(Linear(machine, "k", size["d"], narrow, bias=bias))
            self.v = self.child(Linear(machine, "v", size["d"], narrow, bias=bias))
            self.out = self.child(Linear(machine, "out", wide, size["d"], bias=False))

    def forward(self, v: Locals, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        v.q = view(self.q(x), (B, T, self.h, self.e))
        v.k = view(self.k(x), (B, T, self.k_heads, self.e))
        v.v = transpose(view(self.v(x), (B, T, self.k_heads, self.e)), 1, 2)
        v.q = transpose(rotate(v.q, cos, sin), 1, 2)
        v.k = transpose(rotate(v.k, cos, sin), 1, 2)
        v.k = repeat_heads(v.k, self.g)
        v.v = repeat_heads(v.v, self.g)
        v.y = attend(v.q, v.k, v.v, mask, self.recipe)
        return dropout(self.out(reshape(transpose(v.y, 1, 2), (B, T, self.wide))), self.recipe)


class FeedForward(Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "ffn")
        self.recipe = recipe
        size = machine.shapes.letters
        with self.inside():
            self.gate = self.child(Linear(machine, "gate", size["d"], size["f"], bias=False))
            self.up = self.child(Linear(machine, "up", size["d"], size["f"], bias=False))
            self.down = self.child(Linear(machine, "down", size["f"], size["d"], bias=False))

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return dropout(self.down(ops.mul(ops.activation("silu", self.gate(x)), self.up(x))), self.recipe)


class Block(Module):
    """Pre-norm block."""

    def __init__(self, machine: Machine, index: int, recipe: Recipe) -> None:
        super().__init__(machine, f"blocks.{index}", index)
        with self.inside():
            d = machine.shapes.letters["d"]
            self.attention_norm = self.child(RMSNorm(machine, "attention_norm", d))
            self.attention = self.child(Attention(machine, recipe))
            self.ffn_norm = self.child(RMSNorm(machine, "ffn_norm", d))
            self.ffn = self.child(FeedForward(machine, recipe))

    def forward(self, v: Locals, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        v.x = ops.add(x, self.attention(self.attention_norm(x), cos, sin, mask))
        return ops.add(v.x, self.ffn(self.ffn_norm(v.x)))


class Llama(Transformer):
    """Touvron et al. 2023."""

    def build(self) -> None:
        size = self.machine.shapes.letters
        self.blocks = [self.child(Block(self.machine, i, self.recipe)) for i in range(len(self.machine.stack.kinds))]
        self.final_norm = self.child(RMSNorm(self.machine, "final_norm", size["d"]))
        self.tables = [self.buffer(size["C"], half(size["e"])) for _ in ("cos", "sin")]

    def forward(self, v: Locals, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        v.x = dropout(self.embedding(ids), self.recipe)
        T = ids.shape[1]
        v.cos, v.sin = (table.view((T, ONE, table.shape[1]), (table.stride[0], *table.stride)) for table in self.tables)
        v.mask = self.mask(ids)
        for block in self.blocks:
            v.x = block(v.x, v.cos, v.sin, v.mask)
        return self.logits_or_loss(self.final_norm(v.x), targets)
