"""The assignment's Transformer, with the outputs that its account counts noted as they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.parts import Norm
from estimator.eager import ops
from estimator.eager.linalg import linear, matmul
from estimator.eager.ops import log_softmax
from estimator.eager.views import reshape, transpose, view
from estimator.models.layers import Embedding, Linear, Module
from estimator.models.norms import RMSNorm

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor


class Textbook(Module):
    """ids, targets (B, T) -> the loss. `outputs` are the bytes of each component that the assignment lists.

    A block: two RMSNorms; q, k and v; the scores; the softmax; the weighted sum; the output projection; W1; SiLU; W2.
    Then the final norm, the logits and the cross entropy, which it counts as large as the logits.
    """

    def __init__(self, machine: Machine, num_layers: int) -> None:
        super().__init__(machine, "")
        size = machine.shapes.letters
        d, hidden = size["d"], 4 * size["d"]
        self.h, self.e = size["h"], size["e"]
        self.outputs: list[Size] = []
        self.blocks = [
            {
                "norm1": RMSNorm(machine, "norm", Norm(), d),
                **{name: Linear(machine, name, d, d, bias=False) for name in "qkvo"},
                "norm2": RMSNorm(machine, "norm", Norm(), d),
                "w1": Linear(machine, "w1", d, hidden, bias=False),
                "w2": Linear(machine, "w2", hidden, d, bias=False),
            }
            for _ in range(num_layers)
        ]
        self.norm = RMSNorm(machine, "norm", Norm(), d)
        self.vocabulary = Embedding(machine, "vocabulary", size["V"], d)

    def counted(self, x: Tensor) -> Tensor:
        """x, whose bytes the assignment counts."""
        self.outputs.append(x.dtype.itemsize * x.numel)
        return x

    def forward(self, v: Locals, ids: Tensor, targets: Tensor) -> Tensor:
        B, T = ids.shape
        v.x = self.vocabulary(ids)
        for block in self.blocks:
            v.n = self.counted(block["norm1"](v.x))
            q, k, w = (view(self.counted(block[name](v.n)), (B, T, self.h, self.e)) for name in "qkv")
            v.q, v.k, v.v = (transpose(x, 1, 2) for x in (q, k, w))
            v.scores = self.counted(matmul(v.q, transpose(v.k, -2, -1)))
            v.weights = self.counted(ops.softmax(v.scores))
            v.y = self.counted(matmul(v.weights, v.v))
            v.y = reshape(transpose(v.y, 1, 2), (B, T, v.x.shape[-1]))
            v.x = ops.add(v.x, self.counted(block["o"](v.y)))
            v.n = self.counted(block["norm2"](v.x))
            v.hidden = self.counted(block["w1"](v.n))
            v.hidden = self.counted(ops.activation("silu", v.hidden))
            v.x = ops.add(v.x, self.counted(block["w2"](v.hidden)))
        v.n = self.counted(self.norm(v.x))
        with self.machine.ledger.inside("head"):
            v.logits = self.counted(linear(v.n, self.vocabulary.weight, None))
        return self.counted(log_softmax(v.logits))
