"""Frozen linear layers in 4 or 8 bits, as bitsandbytes 0.50 keeps and multiplies them; `trainer.model.quantised`.

The names are those of bitsandbytes/autograd/_functions.py and functional.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.plan import FULLY_SHARDED
from estimator.eager.autograd import Context, attach, record
from estimator.eager.ledger import Category, Gemm
from estimator.eager.letters import ONE, ZERO, ceiling, constant
from estimator.eager.linalg import linear, product
from estimator.eager.ops import python_number, wrapped_again
from estimator.eager.tensor import (
    BFLOAT16,
    BOOL,
    FLOAT16,
    FLOAT32,
    INT8,
    INT32,
    UINT8,
    Tensor,
    converted,
    op,
)
from estimator.eager.views import cast, reshape, transpose, view
from estimator.models.layers import Linear, Module

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
    from estimator.eager.tensor import Dtype, Locals
    from estimator.models.layers import Recipe

BLOCK = 64  # elements with a scale of their own (quantize_4bit's blocksize)
NESTED_BLOCK = 256  # scales with a scale of their own
CODE, NESTED_CODE = 16, 256  # numbers of a layer's table of 4-bit values, and of that of 8-bit scales


class Quantised4bit(Linear):
    """`bitsandbytes.nn.Linear4bit`: two elements a byte, a float32 scale for 64 of them, a table for the layer.

    With `nested` a scale is a byte too, and 256 of them have a float32; a mean and a second table come beside. Under
    `fully_shard` the packed codes are a parameter of a floating dtype (`quant_storage`), which it shares out and
    gathers with the others; scales and tables are no parameters, and whole on each accelerator.
    """

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        Module.__init__(self, base.machine, base.name)
        self.where, self.owned = base.where, [x for x in base.owned if x is not base.weight]
        self.shape, self.bias = base.weight.shape, base.bias
        self.settled: Tensor | None = None  # the bias as the first forward has cast it, beside one that is gathered
        self.nested = recipe.base_precision == "nf4-double"
        self.dtype = FLOAT32 if recipe.precision in ("fp32", "tf32") else BFLOAT16
        machine, where = self.machine, base.where
        with machine.ledger.at(where.module, where.block, "quantize_4bit"):
            machine.ledger.free(base.weight.storage)
            elements = machine.product(self.shape)
            blocks = ceiling(elements, BLOCK)

            def held(count: Size, dtype: Dtype) -> Tensor:
                return machine.empty((count,), dtype, category=Category.PARAMETER).hold()

            if recipe.parallel in FULLY_SHARDED:
                count = ceiling(elements, 2 * self.dtype.itemsize)
                self.packed = machine.empty((count, ONE), self.dtype, category=Category.PARAMETER).hold()
                self.packed.requires_grad = False
                self.owned.insert(0, self.packed)
                if self.bias is not None:
                    self.settled = machine.empty(self.bias.shape, BFLOAT16, category=Category.COMMUNICATION).hold()
            else:
                self.packed = held(ceiling(elements, 2), UINT8)
            self.absmax, self.code = held(blocks, UINT8 if self.nested else FLOAT32), held(constant(CODE), FLOAT32)
            if self.nested:
                self.offset, self.state2 = held(ONE, FLOAT32), held(ceiling(blocks, NESTED_BLOCK), FLOAT32)
                self.nested_code = held(constant(NESTED_CODE), FLOAT32)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        settle(self, x.dtype)
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

    def dequantised(self) -> Tensor:
        """`bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)`."""
        absmax = self.scales(in_place=True)
        weight = self.dequantize_4bit(absmax, self.dtype).hold()
        absmax.drop()
        weight.owners -= 1
        return weight

    def dequantize_4bit(self, absmax: Tensor, dtype: Dtype) -> Tensor:
        """The whole weight."""
        weight = self.machine.empty(self.shape, dtype)
        self.machine.kernel("dequantize_4bit", (self.packed, absmax), (weight,))
        return weight


class Quantised8bit(Linear):
    """`bitsandbytes.nn.Linear8bitLt` in training: a byte an element, a float32 scale for each row of the weight.

    Its input is kept by the function's context, checkpoint or not.
    """

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        Module.__init__(self, base.machine, base.name)
        self.where, self.owned = base.where, [x for x in base.owned if x is not base.weight]
        self.shape, self.bias = base.weight.shape, base.bias
        self.settled: Tensor | None = None  # the bias as the first forward has cast it, beside one that is gathered
        machine, where = self.machine, base.where
        with machine.ledger.at(where.module, where.block, "int8_vectorwise_quant"):
            machine.ledger.free(base.weight.storage)
            self.codes = machine.empty(self.shape, INT8, category=Category.PARAMETER).hold()
            self.scale = machine.empty(self.shape[:1], FLOAT32, category=Category.PARAMETER).hold()

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        settle(self, x.dtype)
        return self.matmul_8bit(x)

    @op
    def matmul_8bit(self, x: Tensor) -> Tensor:
        """`MatMul8bitFp` on the CPU, which makes the weight whole; `MatMul8bitLt` on CUDA, which multiplies in int8."""
        before = x.dtype

        def backward(c: Context, grad: Tensor) -> Gradients:
            c.grad = reshape(grad, (machine.product(grad.shape[:-1]), grad.shape[-1]))
            c.weight = self._whole(before)
            c.product = product("mm", cast(c.grad, before), c.weight)
            return [view(c.product, x_shape)]

        machine, x_shape = self.machine, x.shape
        node = record("MatMul8bitBackward", (x,), backward)
        if node is not None:
            node.keep(x)
        with machine.no_grad():
            if machine.device == "cpu":
                weight = self._whole(x.dtype).hold()
                out = linear(x, weight, self.bias)
                weight.drop()
            else:
                out = self._in_int8(x)
        return attach(node, out)

    def dequantised(self) -> Tensor:
        """`int8_vectorwise_dequant`: `A * stats.view(-1, 1) * 7.874e-3`, in float32; the CPU's product reads a copy."""
        machine = self.machine
        copy = converted(self.codes, FLOAT32).hold() if machine.casts_operands else None
        scaled = machine.empty(self.shape).hold()
        machine.kernel("mul", (self.codes, self.scale), (scaled,), arithmetic=scaled.numel)
        if copy is not None:
            copy.drop()
        with python_number(machine, FLOAT32):
            weight = machine.empty(self.shape).hold()
            machine.kernel("mul", (scaled,), (weight,), arithmetic=weight.numel)
        scaled.drop()
        weight.owners -= 1
        return weight

    def _whole(self, dtype: Dtype) -> Tensor:
        """`CB.to(dtype).mul_(SCB.unsqueeze(1).mul(1.0 / 127.0))`."""
        machine, column = self.machine, (self.shape[0], ONE)
        weight = converted(self.codes, dtype).hold()
        with wrapped_again(machine), python_number(machine, FLOAT32):
            scale = machine.empty(column).hold()
        # The CPU multiplies in float32 what is half as wide: from a copy, into a copy.
        wide = [machine.empty(self.shape).hold() for _ in range(2) if machine.casts_operands and dtype != FLOAT32]
        machine.kernel("mul_", (weight, scale), (weight,), arithmetic=weight.numel)
        for x in wide:
            x.drop()
        scale.drop()
        weight.owners -= 1
        return weight

    def _in_int8(self, x: Tensor) -> Tensor:
        """The input in float16 and then in int8 by rows, their product in int32, that in float16, and then as x is.

        Columns with outliers (LLM.int8()'s threshold), which depend on the data, are left out.
        """
        machine, width = self.machine, x.shape[-1]
        rows, out_features = machine.product(x.shape[:-1]), self.shape[0]
        half = cast(x, FLOAT16).hold()
        row_stats = machine.empty((rows,)).hold()
        codes = machine.empty((rows, width), INT8).hold()
        absolute = machine.empty((rows, width), FLOAT16).hold()
        outliers = machine.empty((rows, width), BOOL).hold()
        absolute.drop()
        machine.kernel("int8_vectorwise_quant", (half,), (codes, row_stats))
        outliers.drop()
        half.drop()
        whole = machine.empty((rows, out_features), INT32).hold()
        gemm = Gemm(ONE, rows, out_features, width)
        machine.kernel("int8_linear_matmul", (codes, self.codes), (whole,), gemm=gemm)
        out = machine.empty((rows, out_features), FLOAT16).hold()
        machine.kernel("int8_mm_dequant", (whole,), (out,))
        result = cast(out, x.dtype).hold()
        out.drop()
        whole.drop()
        codes.drop()
        row_stats.drop()
        result.owners -= 1
        return view(result, (*x.shape[:-1], out_features))


def settle(layer: Quantised4bit | Quantised8bit, dtype: Dtype) -> None:
    """The first forward casts a layer's bias to the dtype of its input, for good.

    Under `fully_shard` what it casts is the gathered one's data, which from then on is that copy, while the gathers go
    on beside it.
    """
    bias, copy = layer.bias, layer.settled
    if bias is None:
        return
    if copy is not None:
        if bias.dtype == dtype:
            copy.storage.nbytes = ZERO
        copy.storage.itemsize = dtype.itemsize
    elif bias.dtype != dtype:
        bias.storage.nbytes = dtype.itemsize * bias.numel
        bias.storage.itemsize, bias.dtype = dtype.itemsize, dtype
