"""Frozen linear layers in 4 or 8 bits, as bitsandbytes 0.50 keeps and multiplies them; `trainer.model.quantised`.

The names are those of bitsandbytes/autograd/_functions.py and functional.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import Context, attach, record
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE, ceiling
from estimator.eager.linalg import linear
from estimator.eager.tensor import BFLOAT16, FLOAT32, UINT8, Tensor, op
from estimator.eager.views import cast, transpose
from estimator.models.layers import Linear, Module

if TYPE_CHECKING:
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Dtype, Locals
    from estimator.models.layers import Recipe

BLOCK = 64  # elements with a scale of their own (quantize_4bit's blocksize)
NESTED_BLOCK = 256  # scales with a scale of their own
CODE, NESTED_CODE = 16, 256  # numbers of a layer's table of 4-bit values, and of that of 8-bit scales


class Quantised4bit(Linear):
    """`bitsandbytes.nn.Linear4bit`: two elements a byte, a float32 scale for 64 of them, a table for the layer.

    With `nested` a scale is a byte too, and 256 of them have a float32; a mean and a second table come beside.
    """

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        Module.__init__(self, base.machine, base.name)
        self.where, self.owned = base.where, [x for x in base.owned if x is not base.weight]
        self.shape, self.bias = base.weight.shape, base.bias
        self.nested = recipe.base_precision == "nf4-double"
        self.dtype = FLOAT32 if recipe.precision in ("fp32", "tf32") else BFLOAT16
        machine, where = self.machine, base.where
        with machine.ledger.at(where.module, where.block, "quantize_4bit"):
            machine.ledger.free(base.weight.storage)
            elements = machine.product(self.shape)
            blocks = ceiling(elements, BLOCK)

            def held(count: object, dtype: Dtype) -> Tensor:
                return machine.empty((count * ONE,), dtype, category=Category.PARAMETER).hold()  # type: ignore[operator]

            self.packed = held(ceiling(elements, 2), UINT8)
            self.absmax, self.code = held(blocks, UINT8 if self.nested else FLOAT32), held(CODE, FLOAT32)
            if self.nested:
                self.offset, self.state2 = held(1, FLOAT32), held(ceiling(blocks, NESTED_BLOCK), FLOAT32)
                self.nested_code = held(NESTED_CODE, FLOAT32)

    def forward(self, v: Locals, x: Tensor) -> Tensor:  # noqa: ARG002 - the frame is inside
        settle(self.bias, x.dtype)
        return cast(self.matmul_4bit(x), x.dtype)

    @op
    def matmul_4bit(self, x: Tensor) -> Tensor:
        """`MatMul4Bit`: the weight is made whole for the product, and once more for backward; x is not kept."""

        def backward(c: Context, grad: Tensor) -> Gradients:
            absmax = self.scales(in_place=True)
            weight = self.dequantize_4bit(absmax, self.dtype)
            absmax.drop()
            c.weight = cast(weight, grad.dtype)
            return [linear(grad, transpose(c.weight, 0, 1), None)]

        machine = self.machine
        node = record("MatMul4BitBackward", (x,), backward)
        with machine.kernel_of():
            absmax = self.scales(in_place=False)
            weight = self.dequantize_4bit(absmax, x.dtype).hold()
            out = linear(x, weight, self.bias)
            weight.drop()
            absmax.drop()
        return attach(node, out)

    def scales(self, *, in_place: bool) -> Tensor:
        """The scales in float32, held: nested ones are made that first, and their mean is added, in place or not."""
        if not self.nested:
            return self.absmax.hold()
        machine = self.machine
        absmax = machine.empty(self.absmax.shape, FLOAT32).hold()
        machine.kernel("dequantize_blockwise", (self.absmax, self.state2), (absmax,))
        if in_place:
            machine.kernel("add_", (absmax,), (absmax,))
            return absmax
        total = machine.empty(self.absmax.shape, FLOAT32).hold()
        machine.kernel("add", (absmax,), (total,))
        absmax.drop()
        return total

    def dequantize_4bit(self, absmax: Tensor, dtype: Dtype) -> Tensor:
        """The whole weight."""
        weight = self.machine.empty(self.shape, dtype)
        self.machine.kernel("dequantize_4bit", (self.packed, absmax), (weight,))
        return weight


def settle(bias: Tensor | None, dtype: Dtype) -> None:
    """The first forward casts a layer's bias to the dtype of its input, for good."""
    if bias is not None and bias.dtype != dtype:
        bias.storage.nbytes = dtype.itemsize * bias.numel
        bias.storage.itemsize, bias.dtype = dtype.itemsize, dtype
