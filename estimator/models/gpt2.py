"""GPT-2: LayerNorm with bias, learned positions, GELU, biases, a tied head. Mirrors `trainer.model.decoder.GPT2`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.views import reshape, split, transpose, view
from estimator.models.layers import LayerNorm, Linear, Module, Positions, Transformer, attend, dropout

if TYPE_CHECKING:
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import Recipe


class Attention(Module):
    """Multi-head attention with one fused projection."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "attention")
        self.recipe = recipe
        size = machine.shapes.letters
        self.h, self.e = size["h"], size["e"]
        with self.inside():
            self.qkv = self.child(Linear(machine, "qkv", size["d"], 3 * size["d"], bias=True))
            self.out = self.child(Linear(machine, "out", size["d"], size["d"], bias=True))

    def forward(self, v: Locals, x: Tensor, mask: Tensor | None) -> Tensor:
        B, T, d = x.shape
        v.q, v.k, v.v = split(self.qkv(x), d, 3)
        v.q = transpose(view(v.q, (B, T, self.h, self.e)), 1, 2)
        v.k = transpose(view(v.k, (B, T, self.h, self.e)), 1, 2)
        v.v = transpose(view(v.v, (B, T, self.h, self.e)), 1, 2)
        v.y = attend(v.q, v.k, v.v, mask, self.recipe)
        return dropout(self.out(reshape(transpose(v.y, 1, 2), (B, T, d))), self.recipe)


class FeedForward(Module):
    """down(gelu(up(x)))."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "ffn")
        self.recipe = recipe
        size = machine.shapes.letters
        with self.inside():
            self.up = self.child(Linear(machine, "up", size["d"], size["f"], bias=True))
            self.down = self.child(Linear(machine, "down", size["f"], size["d"], bias=True))

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return dropout(self.down(ops.activation("gelu", self.up(x))), self.recipe)


class Block(Module):
    """Pre-norm block."""

    def __init__(self, machine: Machine, index: int, recipe: Recipe) -> None:
        super().__init__(machine, f"blocks.{index}", index)
        with self.inside():
            d = machine.shapes.letters["d"]
            self.attention_norm = self.child(LayerNorm(machine, "attention_norm", d))
            self.attention = self.child(Attention(machine, recipe))
            self.ffn_norm = self.child(LayerNorm(machine, "ffn_norm", d))
            self.ffn = self.child(FeedForward(machine, recipe))

    def forward(self, v: Locals, x: Tensor, mask: Tensor | None) -> Tensor:
        v.x = ops.add(x, self.attention(self.attention_norm(x), mask))
        return ops.add(v.x, self.ffn(self.ffn_norm(v.x)))


class GPT2(Transformer):
    """Radford et al. 2019."""

    def build(self) -> None:
        size = self.machine.shapes.letters
        self.positions = self.child(Positions(self.machine, "positions", size["C"], size["d"]))
        self.blocks = [self.child(Block(self.machine, i, self.recipe)) for i in range(len(self.machine.stack.kinds))]
        self.final_norm = self.child(LayerNorm(self.machine, "final_norm", size["d"]))

    def forward(self, v: Locals, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        v.x = dropout(ops.add(self.embedding(ids), self.positions(ids.shape[1])), self.recipe)
        v.mask = self.mask(ids)
        for block in self.blocks:
            v.x = block(v.x, v.mask)
        return self.logits_or_loss(self.final_norm(v.x), targets)
