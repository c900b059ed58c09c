"""Frozen linear layers in 4 or 8 bits, by bitsandbytes: Dettmers et al. 2023, "QLoRA", and 2022, "LLM.int8()".

bitsandbytes is imported where a layer is quantised, so that everything else does without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from estimator.describe.checks import ConfigError
from trainer.model.layers import Linear

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NAMES = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers


def quantise(model: nn.Module, base_precision: str, dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> None:
    """Put bitsandbytes' layers in the place of a model's frozen linear layers but the head, as transformers does.

    `dtype` is what the weights come in, and what they are made of again. `storage` is what the packed codes of 4 bits
    pass for: `fully_shard` shares out parameters of a floating dtype only (bitsandbytes' `quant_storage`).

    Raises:
        ConfigError: bitsandbytes is not installed, or its kernel on the CPU has not the width of a layer.
    """
    if base_precision == "none":
        return
    try:
        import bitsandbytes as bnb  # noqa: PLC0415  (a development extra, wanted only here)
    except ImportError as error:
        raise ConfigError(
            f"base_precision = {base_precision!r}: takes bitsandbytes, which is not installed; pip install bitsandbytes"
        ) from error
    for path, base in list(model.named_modules()):
        owner, _, name = path.rpartition(".")
        if isinstance(base, Linear) and not base.weight.requires_grad and "head" not in path.split("."):
            setattr(model.get_submodule(owner), name, _quantised(bnb, base, base_precision, dtype, storage))


def _quantised(bnb: Any, base: Linear, base_precision: str, dtype: torch.dtype, storage: torch.dtype) -> nn.Module:
    d_out, d_in = base.weight.shape
    device = base.weight.device
    if device.type == "cpu" and base_precision != "int8" and d_in % 2:
        raise ConfigError(
            f"base_precision = {base_precision!r}: a layer reads {d_in} numbers; the CPU's kernel takes even widths"
        )
    weight = base.weight.detach().to(dtype)
    if storage.is_floating_point and weight.numel() % (2 * storage.itemsize):
        raise ConfigError(
            f"base_precision = {base_precision!r}: {weight.numel()} codes of 4 bits are no whole number of {storage}, "
            f"which fully_shard takes them for; allowed are multiples of {2 * storage.itemsize}"
        )
    with torch.device("meta"):
        if base_precision == "int8":
            layer = bnb.nn.Linear8bitLt(d_in, d_out, bias=False, has_fp16_weights=False, threshold=6.0)
        else:
            layer = bnb.nn.Linear4bit(d_in, d_out, bias=False, quant_storage=storage)
    if base_precision == "int8":
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=base_precision == "nf4-double",
            quant_type="nf4",
            quant_storage=storage,
            module=layer,
        )
    layer.bias = base.bias
    quantised: nn.Module = layer.to(device)
    return quantised


def is_quantised(module: nn.Module) -> bool:
    """Whether it is one of bitsandbytes' layers."""
    return type(module).__name__ in NAMES


def dequantised(layer: Any) -> Tensor:
    """A linear layer's weight as numbers: peft's `dequantize_module_weight`."""
    if not is_quantised(layer):
        weight: Tensor = layer.weight
        return weight
    import bitsandbytes as bnb  # noqa: PLC0415  (a development extra, wanted only here)

    if type(layer).__name__ == "Linear4bit":
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if layer.state.SCB is None:
        layer.state.SCB = layer.weight.SCB
    return bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.state.SCB)


def scales(model: nn.Module) -> Iterator[Tensor]:
    """What quantised layers keep beside their codes: scales, tables, and the scales of scales."""
    layers: list[Any] = [module for module in model.modules() if is_quantised(module)]
    for layer in layers:
        if type(layer).__name__ == "Linear4bit":
            state = layer.quant_state
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)
        else:
            held = (layer.state.SCB, layer.weight.SCB, layer.state.CB, layer.weight.CB)
            yield from (t for t in held if isinstance(t, Tensor))


def number_of_parameters(model: nn.Module) -> int:
    """Parameters, shared ones once; of quantised weights those that they stand for."""
    packed = {id(x.weight): _elements(x) for x in model.modules() if is_quantised(x)}
    return sum(packed.get(id(p), p.numel()) for p in model.parameters())


def _elements(layer: Any) -> int:
    return int(layer.in_features * layer.out_features)


def flop_formulas() -> dict[Any, Any]:
    """What `FlopCounterMode` is to count of bitsandbytes' own products, which it does not see into."""
    try:
        import bitsandbytes  # noqa: F401, PLC0415  (which registers them)
    except ImportError:
        return {}

    def product(a: Iterable[int], _: Any, shape: Any, *args: Any, **more: Any) -> int:  # noqa: ARG001
        rows = 1
        for size in a:
            rows *= size
        return 2 * rows * shape[0]

    return {torch.ops.bitsandbytes.gemm_4bit: product}
