"""Adapters beside linear layers; `trainer.model.adapters`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.adapters import EXPERTS, check_targets, is_target
from estimator.eager import ops
from estimator.eager.indexing import div
from estimator.eager.letters import ONE, letter
from estimator.eager.linalg import linear
from estimator.eager.tensor import FLOAT32, Locals, op
from estimator.eager.views import cast, clone, transpose, view
from estimator.models.expert_adapters import ExpertsLoRA
from estimator.models.experts import Experts, SparseFeedForward
from estimator.models.layers import Embedding, Head, Linear, Module, NormedLinear, dropout_at
from estimator.models.quantised import Quantised4bit, Quantised8bit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.eager.tensor import Dtype, Tensor
    from estimator.models.layers import Recipe

letter("r", "rank of the adapters' matrices")


class LoRA(Module):
    """x W^T + s (x A^T) B^T, A and B in fp32."""

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        super().__init__(base.machine, base.name)
        rank, where = base.machine.shapes.letters["r"], base.where
        (d_out, d_in), before = base.widths, base.machine.dtype
        self.drops = recipe.adapter_dropout
        self.base = self.child(base)
        base.machine.dtype = FLOAT32  # peft's autocast_adapter_dtype
        self._place = where.module, where.block, where.op
        with base.machine.ledger.at(*self._place):
            self.a = self.child(Linear(base.machine, "a", d_in, rank, bias=False))
            self.b = self.child(Linear(base.machine, "b", rank, d_out, bias=False))
        base.machine.dtype, base.name = before, "base"

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.result = self.base(x)
        before = v.result.dtype
        v.x = cast(x, self.a.weight.dtype)
        v.result = ops.add(v.result, ops.mul_number(self.b(self.a(dropout_at(v.x, drops=self.drops)))))
        return cast(v.take("result"), before)


class DoRA(LoRA):
    """m / |W + s B A| times what LoRA computes, the norms without a gradient; `trainer.model.adapters.DoRA`."""

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        super().__init__(base, recipe)
        with base.machine.ledger.at(*self._place):
            self.magnitude = ops.parameter(base.machine, (base.weight.shape[0],), FLOAT32)
        self.owned.append(self.magnitude)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.result = self.base(x)
        before = v.result.dtype
        v.x = cast(x, self.a.weight.dtype)
        if self.drops:
            v.x = ops.dropout(v.x)
        else:
            v.base_result = v.result
        v.result = ops.add(v.result, self._scaled(v.x, None if self.drops else v.base_result))
        return cast(v.take("result"), before)

    @op
    def _scaled(self, x: Tensor, base_result: Tensor | None) -> Tensor:
        machine, width = self.machine, self.a.weight.shape[1]
        with Locals() as v:
            v.x_eye = machine.empty((width, width), self.a.weight.dtype)
            v.lora_weight = transpose(self.b(self.a(v.x_eye)), 0, 1)
            del v.x_eye
            v.lora_weight = cast(v.take("lora_weight"), x.dtype)
            v.weight = self._whole_weight()
            v.weight = cast(v.take("weight"), x.dtype)
            v.norms = self._norms(v.weight, v.lora_weight.alias())
            v.scale = view(div(self.magnitude, v.norms), (ONE, v.norms.shape[0]))
            v.lora_result = self.b(self.a(x))
            if base_result is None:
                v.base_result = linear(x, v.weight, None)
            elif self.base.bias is not None:
                v.base_result = ops.sub(base_result, self.base.bias)
            else:
                v.base_result = base_result
            v.left = ops.mul(ops.add_number(v.scale), v.base_result)  # an expression's first term waits for the second
            return ops.add(v.left, ops.mul_number(ops.mul(v.scale, v.lora_result)))

    def _whole_weight(self) -> Tensor:
        return self.base.weight

    @op
    def _norms(self, weight: Tensor, lora_weight: Tensor) -> Tensor:
        with Locals() as v:
            v.weight = ops.elementwise("add", weight, ops.with_number("mul", lora_weight))
            norms = self.machine.empty((weight.shape[0],), weight.dtype)
            self.machine.kernel("linalg_vector_norm", (v.weight,), (norms,), arithmetic=2 * weight.numel)
            return norms


class OnQuantised(LoRA):
    """What adapters on a quantised layer begin with: peft's `lora.bnb.Linear4bit.forward`, `Linear8bitLt.forward`."""

    def __init__(self, base: Linear, recipe: Recipe) -> None:
        super().__init__(base, recipe)
        quantised = QUANTISED[recipe.base_precision](base, recipe)
        self.clones = recipe.base_precision != "int8"
        self.base, self.owned = quantised, [quantised if x is base else x for x in self.owned]

    def begin(self, v: Locals, x: Tensor) -> Dtype | None:
        """Name the layer's result and the adapter's input; the dtype that the sum is to have, None for its own."""
        v.result = self.base(x)
        if self.clones:
            v.result = clone(v.result)
        # `torch.is_autocast_enabled()`, without a device, asks of CUDA's.
        converts = self.machine.device == "cpu" or self.machine.autocast_dtype is None
        expected = v.result.dtype
        v.x = cast(x, self.a.weight.dtype) if converts else x
        return expected if converts else None


class QuantisedLoRA(OnQuantised):
    """LoRA on a quantised layer."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        expected = self.begin(v, x)
        v.output = ops.mul_number(self.b(self.a(dropout_at(v.x, drops=self.drops))))
        if expected is not None:
            v.output = cast(v.output, expected)
        v.result = ops.add(v.result, v.output)
        return v.take("result")


class QuantisedDoRA(OnQuantised, DoRA):
    """DoRA on a quantised layer, whose weight is made whole once more for the norms and, with dropout, the product."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        expected = self.begin(v, x)
        if self.drops:
            v.x = ops.dropout(v.x)
        else:
            v.base_result = v.result
        v.result = ops.add(v.result, self._scaled(v.x, None if self.drops else v.base_result))
        if expected is not None:
            v.result = cast(v.result, expected)
        return v.take("result")

    def _whole_weight(self) -> Tensor:
        base = self.base
        assert isinstance(base, Quantised4bit | Quantised8bit)
        return base.dequantised()


class Saved(Module):
    """A module that is frozen and a copy of it that is trained and run: peft's `ModulesToSaveWrapper`."""

    def __init__(self, original: Embedding | Linear) -> None:
        super().__init__(original.machine, original.name)
        machine, (rows, columns) = self.machine, original.weight.shape
        self.child(original)
        with machine.ledger.inside(original.name):
            if isinstance(original, Linear):
                kind = NormedLinear if isinstance(original, Head) and original.normed else Linear
                copy: Embedding | Linear = kind(machine, "copy", columns, rows, bias=original.bias is not None)
            else:
                copy = Embedding(machine, "copy", rows, columns)
        self.copy, self.weight = self.child(copy), copy.weight

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return self.copy(x)


QUANTISED: dict[str, type[Quantised4bit | Quantised8bit]] = {
    "nf4": Quantised4bit,
    "nf4-double": Quantised4bit,
    "int8": Quantised8bit,
}
KINDS = {"lora": LoRA, "dora": DoRA}
ON_QUANTISED = {"lora": QuantisedLoRA, "dora": QuantisedDoRA}


def linear_layers(module: Module) -> Iterator[tuple[Module, str, Linear]]:
    """(owner, attribute, layer) of every linear layer below a module."""
    for name, inner in list(vars(module).items()):
        if isinstance(inner, Linear) and any(inner is x for x in module.owned):
            yield module, name, inner
    for inner in module.owned:
        if isinstance(inner, Module):
            yield from linear_layers(inner)


def stacked_experts(module: Module) -> Iterator[tuple[SparseFeedForward, Experts]]:
    """(owner, experts) of every mixture below a module."""
    for inner in module.owned:
        if isinstance(inner, SparseFeedForward):
            yield inner, inner.experts
        elif isinstance(inner, Module):
            yield from stacked_experts(inner)


def adapt(model: Module, recipe: Recipe) -> None:
    """Put an adapter beside every linear layer that the recipe names; all else is frozen."""
    layers, experts = list(linear_layers(model)), list(stacked_experts(model))
    names = (name for _, name, _ in layers)
    check_targets(recipe.adapter_targets, (*names, *(EXPERTS for _ in experts)))
    for p in model.parameters():
        p.requires_grad = False
    for mixture, stacked in experts if is_target(recipe.adapter_targets, EXPERTS) else ():
        mixture.experts = of_experts = ExpertsLoRA(stacked, recipe)
        mixture.owned = [of_experts if x is stacked else x for x in mixture.owned]
    for owner, name, base in layers:
        quantises = recipe.base_precision != "none" and name != "head"
        if quantises or is_target(recipe.adapter_targets, name):
            adapted: Module
            if not is_target(recipe.adapter_targets, name):
                adapted = QUANTISED[recipe.base_precision](base, recipe)
            else:
                adapted = (ON_QUANTISED if quantises else KINDS)[recipe.adapter](base, recipe)
            setattr(owner, name, adapted)
            owner.owned = [adapted if x is base else x for x in owner.owned]
    for name in filter(None, recipe.modules_to_save.split(",")):
        original = getattr(model, name)
        saved = Saved(original)
        setattr(model, name, saved)
        model.owned = [saved if x is original else x for x in model.owned]
