"""Norms over the last dimension; `trainer.model.norms`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.pointwise import power
from estimator.eager.tensor import FLOAT32
from estimator.eager.views import cast
from estimator.models.layers import Module

if TYPE_CHECKING:
    from estimator.describe.parts import Norm
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Locals, Machine, Tensor
    from estimator.models.layers import Recipe


class ScaleAndShift(Module):
    """A weight and a bias, where the norm has them."""

    def __init__(self, machine: Machine, name: str, norm: Norm, *shape: Size) -> None:
        super().__init__(machine, name)
        self.plus_one = norm.weight == "plus-one"
        self.weight = self.parameter(*shape) if norm.weight != "none" else None
        self.bias = self.parameter(*shape) if norm.bias else None


class LayerNorm(ScaleAndShift):
    """Ba et al. 2016."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        if self.weight is not None and self.plus_one:
            return ops.layer_norm(x, ops.add_number(self.weight), self.bias)
        return ops.layer_norm(x, self.weight, self.bias)


class LayerNormOfHeads(ScaleAndShift):
    """LayerNorm with weights for each head."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.x = ops.layer_norm(x, None, None)
        if self.weight is not None:
            v.x = ops.mul(ops.add_number(self.weight) if self.plus_one else self.weight, v.x)
        return v.take("x") if self.bias is None else ops.add(v.x, self.bias)


class RMSNorm(ScaleAndShift):
    """Zhang and Sennrich 2019, in separate operators."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.scale = ops.rsqrt(ops.add_number(ops.mean_last(power(x))))
        if self.weight is None:
            return ops.mul(x, v.scale)
        if self.plus_one:
            v.weight = ops.add_number(self.weight)  # made first, and gone with the expression
            return ops.mul(v.weight, ops.mul(x, v.scale))
        return ops.mul(self.weight, ops.mul(x, v.scale))


class UpcastRMSNorm(ScaleAndShift):
    """The same in fp32, as `LlamaRMSNorm` of transformers has it: cast back, then multiplied with the weight."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        normed(v, x)
        assert self.weight is not None
        return ops.mul(self.weight, cast(v.x, x.dtype))


class LateRMSNorm(ScaleAndShift):
    """As `Olmo2RMSNorm` has it: multiplied with the weight, then cast back."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        normed(v, x)
        assert self.weight is not None
        return cast(ops.mul(self.weight, v.x), x.dtype)


class WideRMSNorm(ScaleAndShift):
    """As `HeliumRMSNorm` has it: multiplied with the weight in fp32, then cast back."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        normed(v, x)
        assert self.weight is not None
        return cast(ops.mul(cast(self.weight, FLOAT32), v.x), x.dtype)


class PlusOneRMSNorm(ScaleAndShift):
    """As `GemmaRMSNorm` has it: times 1 + w, all in fp32; `NanoChatRMSNorm` has no weight."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.wide = cast(x, FLOAT32)
        v.out = ops.mul(v.wide, ops.rsqrt(ops.add_number(ops.mean_last(power(v.wide)))))
        del v.wide
        if self.weight is not None:
            v.out = ops.mul(v.out, ops.add_number(cast(self.weight, FLOAT32)))
        v.out = cast(v.out, x.dtype)
        return v.take("out")


class CentredNorm(ScaleAndShift):
    """`CohereLayerNorm`: a LayerNorm in separate operators, in fp32."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        assert self.weight is not None
        v.x = cast(x, FLOAT32)
        v.mean = ops.mean_last(v.x)
        v.variance = ops.mean_last(power(ops.sub(v.x, v.mean)))
        v.x = ops.mul(ops.sub(v.x, v.mean), ops.rsqrt(ops.add_number(v.variance)))
        v.x = ops.mul(cast(self.weight, FLOAT32), v.x)
        v.x = cast(v.x, x.dtype)
        return v.take("x")


class LayerNormInFP32(ScaleAndShift):
    """`OlmoLayerNorm`: without a weight, of a copy in fp32."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return cast(ops.layer_norm(cast(x, FLOAT32), None, None), x.dtype)


class UncastLayerNorm(ScaleAndShift):
    """`NemotronLayerNorm1P`: where autocast is on, of copies in its dtype (CUDA's would widen them)."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        machine = x.machine
        lower = machine.autocast_dtype if machine.device == "cuda" else None
        assert self.weight is not None
        v.x, v.weight, v.bias = x, ops.add_number(self.weight), self.bias
        if lower is not None:
            v.x, v.weight, v.bias = cast(v.x, lower), cast(v.weight, lower), cast(v.bias, lower)
        with machine.autocast(None):
            return ops.layer_norm(v.x, v.weight, v.bias)


def normed(v: Locals, x: Tensor) -> None:
    """`v.x` is x in fp32 over its root mean square, `v.variance` stays."""
    v.x = cast(x, FLOAT32)
    v.variance = ops.mean_last(power(v.x))
    v.x = ops.mul(v.x, ops.rsqrt(ops.add_number(v.variance)))


# By `Written.norm`, what transformers has in place of an rms norm, of a LayerNorm without a weight, and of others.
WRITTEN: dict[str, type[ScaleAndShift]] = {
    "upcast": UpcastRMSNorm,
    "upcast-late": LateRMSNorm,
    "upcast-wide": WideRMSNorm,
}


def build_norm(machine: Machine, recipe: Recipe, name: str, norm: Norm, *shape: Size) -> ScaleAndShift:
    """The module of a declared norm over the last dimension, its weight of this shape."""
    written = recipe.written
    if written is not None and norm.kind == "rms":
        kind = WRITTEN[written.norm] if norm.weight == "plain" else PlusOneRMSNorm
    elif written is not None and written.norm == "centred":
        kind = CentredNorm
    elif norm.kind == "rms":
        kind = RMSNorm
    elif written is not None and written.norm and norm.weight != "plain":
        kind = LayerNormInFP32 if norm.weight == "none" else UncastLayerNorm
    else:
        kind = LayerNorm if len(shape) == 1 else LayerNormOfHeads
    return kind(machine, name, norm, *shape)
