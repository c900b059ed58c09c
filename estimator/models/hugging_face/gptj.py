"""`GPTJForCausalLM` and `CodeGenForCausalLM`: sines and cosines are one table, repeated for each rotation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.letters import ONE, constant
from estimator.eager.tensor import Locals, arguments
from estimator.eager.views import cast, clone, concatenate, split, transpose, unsqueeze, view
from estimator.models.block import Block
from estimator.models.hugging_face.attention import WideScores
from estimator.models.hugging_face.decoder import HFDecoder
from estimator.models.hugging_face.positions import repeated, rotated, taken_apart

if TYPE_CHECKING:
    from estimator.eager.tensor import Machine, Tensor
    from estimator.models.layers import Recipe

SHARDS = 4  # `CodeGenAttention.mp_num`


class GPTJAttention(WideScores):
    """`GPTJAttention`."""

    drops = True

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        if not self.part.fused:
            self.owned = [self.k, self.v, self.q, self.out]

    def project(self, v: Locals, x: Tensor) -> None:
        """Queries and keys by token, values by head."""
        v.q = self.heads(self.q(x), self.h)
        v.k = self.heads(self.k(x), self.k_heads)
        v.v = transpose(self.heads(self.v(x), self.k_heads), 1, 2)

    def rotate(self, v: Locals, cos: Tensor, sin: Tensor) -> None:
        """A part of each head, before queries and keys are by head too."""
        width = 2 * cos.shape[-1]
        v.k_rot, v.k_pass = taken_apart(v.k, width)
        v.q_rot, v.q_pass = taken_apart(v.q, width)
        v.k_rot = self.turned(v.k_rot, cos, sin)
        v.q_rot = self.turned(v.q_rot, cos, sin)
        v.k = concatenate((v.k_rot, v.k_pass))
        v.q = concatenate((v.q_rot, v.q_pass))
        v.q = transpose(v.q, 1, 2)
        v.k = transpose(v.k, 1, 2)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`apply_rotary_pos_emb`."""
        with arguments((x, cos, sin)) as results, Locals() as w:
            w.sin = repeated(unsqueeze(sin, 2))
            w.cos = repeated(unsqueeze(cos, 2))
            results.append(rotated(x, w.cos, w.sin, self.written))
        return results[0]


class GPTJBlock(Block):
    """`GPTJBlock`."""

    build_attention = staticmethod(GPTJAttention)
    positional = 1

    def forward(self, v: Locals, x: Tensor, *where: Tensor | None) -> Tensor:
        v.residual = x
        v.x = self.attention_norm(x)
        v.y, v.weights = self.attention(v.x, *where[:-1])
        v.ffn = self.ffn(v.x)
        return ops.add(ops.add(v.y, v.ffn), v.residual)


class GPTJ(HFDecoder):
    """`GPTJForCausalLM`."""

    build_block = GPTJBlock
    drops_embedding = True

    def rotary_tables(self) -> list[Tensor]:
        """Sines and cosines of all positions, side by side."""
        size = self.machine.shapes.letters
        return [self.buffer(size["C"], size[self.recipe.rotated])]

    def rotary(self, v: Locals, name: str, table: Tensor) -> tuple[Tensor, Tensor]:
        """`GPTJRotaryEmbedding`: what positions have of it, in the stream's dtype."""
        with Locals() as w:
            w.both = self.machine.empty((ONE, *v.positions.shape, table.shape[1]), table.dtype)
            self.machine.kernel("index", (v.positions, w.both), (w.both,))
            if not self.recipe.of_class.tables_fp32:
                w.both = cast(w.both, v.x.dtype)
            half = table.shape[1] / 2
            v.sin, v.cos = split(w.both, (half, half))
        return v.cos, v.sin


class CodeGenAttention(GPTJAttention):
    """`CodeGenAttention`: one projection, whose result is made of four parts, each of queries, values and keys."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, recipe)
        self.owned = [self.out, self.qkv]

    def project(self, v: Locals, x: Tensor) -> None:
        """Where a part is more than one head, that queries, values and keys are by head takes a copy of each."""
        shape = x.shape[:2]
        if self.machine.at_most(self.h, constant(SHARDS)):
            v.qkv = view(self.qkv(x), (*shape, self.h, 3 * self.e))
            v.q, v.v, v.k = split(v.qkv, (self.e, self.e, self.e))
        else:
            v.qkv = self.qkv(x)
            v.q, v.v, v.k = split(v.qkv, self.widths)
            v.q = clone(self.heads(v.q, self.h))
            v.k = clone(self.heads(v.k, self.h))
            v.v = clone(self.heads(v.v, self.h))
        v.v = transpose(v.v, 1, 2)

    def rotate(self, v: Locals, cos: Tensor, sin: Tensor) -> None:
        """In fp32."""
        super().rotate(v, cos, sin)
        v.q = cast(v.q, v.v.dtype)
        v.k = cast(v.k, v.v.dtype)


class CodeGenBlock(GPTJBlock):
    """`CodeGenBlock`."""

    build_attention = staticmethod(CodeGenAttention)


class CodeGen(GPTJ):
    """`CodeGenForCausalLM`."""

    build_block = CodeGenBlock
