"""Adapters as safetensors files: small, beside the weights that they were trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer.files.checkpoint import write_atomically
from trainer.files.contents import CheckpointError
from trainer.model.adapters import adapter_parameters, take_originals

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from torch import Tensor, nn


def save_adapters(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write the adapters of a model, nothing else of it, as a safetensors file, atomically.

    Raises:
        OSError: the path cannot be written.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  (an extra of the trainer, wanted only here)
    from safetensors.torch import save_file  # noqa: PLC0415

    tensors = {name: p.detach().contiguous() for name, p in adapter_parameters(model).items()}
    try:
        write_atomically(Path(path), lambda part: save_file(tensors, str(part), metadata))
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def load_adapters(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy what `save_adapters` wrote into the adapters of a model of the same configuration and plan.

    Raises:
        CheckpointError: no safetensors file, or of other adapters; the model is then untouched.
    """
    _copy(_read(path), adapter_parameters(model), path)


def load_base(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Copy a model's weights (`export_safetensors`) into one that has adapters beside its layers, or none.

    Raises:
        CheckpointError: no safetensors file, or of another model; the model is then untouched.
    """
    adapters = adapter_parameters(model)
    names = {name: name.replace(".base.", ".").replace(".original.", ".") for name, _ in model.named_parameters()}
    own = {names[name]: p for name, p in model.named_parameters() if name not in adapters}
    _copy(_read(path), own, path)
    take_originals(model)


def _read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError  # noqa: PLC0415  (an extra of the trainer, wanted only here)
    from safetensors.torch import load_file  # noqa: PLC0415

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def _copy(found: Mapping[str, Tensor], wanted: Mapping[str, nn.Parameter], path: object) -> None:
    missing, more = [name for name in wanted if name not in found], [name for name in found if name not in wanted]
    if missing or more:
        said = f"{missing[0]} is missing" if missing else f"{more[0]} is none of the model's"
        raise CheckpointError(f"{path}: of another model: {said}")
    for name, p in wanted.items():
        if found[name].shape != p.shape:
            raise CheckpointError(
                f"{path}: of another model: {name} is {tuple(found[name].shape)}, not {tuple(p.shape)}"
            )
    with torch.no_grad():
        for name, p in wanted.items():
            p.copy_(found[name])
