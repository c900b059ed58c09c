"""What a checkpoint holds, of unknown origin: looked through before anything of it is used."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from estimator.describe.checks import ConfigError, shown
from estimator.describe.model import ModelConfig
from trainer.optim.eight_bit import BLOCK
from trainer.optim.optimizers import local

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import nn

GREATEST = 2**53  # of a count of steps: floats hold whole numbers up to here


class CheckpointError(ConfigError):
    """A file is no complete checkpoint, or not one of this model; the message names the file and what is wrong."""


def check_state(state: Any, optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise CheckpointError unless `state` is what an optimizer with these groups and parameters could have written.

    Args:
        state: as `Optimizer.state_dict` gives it, of unknown origin.
        optimizer: this run's.
        name: of the file, for messages.
    """

    def need(what: object, said: str) -> None:
        if not what:
            raise CheckpointError(f"{name}: its optimizer state does not fit this run's parameters: {said}")

    need(type(state) is dict and type(state.get("state")) is dict, "it has no state")
    groups, ours = state.get("param_groups"), optimizer.state_dict()["param_groups"]
    need(type(groups) is list and all(type(group) is dict for group in groups), "it has no groups of parameters")
    need(len(groups) == len(ours), f"it has {len(groups)} groups of parameters, this run {len(ours)}")
    kept: dict[tuple[int, bool], dict[str, Any]] = {}  # of a group's matrices, and of its rows, all alike
    known = set()
    for number, (group, own) in enumerate(zip(groups, ours, strict=True)):
        listed = group.get("params")
        need(type(listed) is list and all(type(index) is int for index in listed), f"group {number} lists none")
        need(listed == own["params"], f"group {number} is not of the same parameters")
        for field, value in group.items():
            if field in own and field != "params":
                need(_alike(value, own[field]), f"{field} of group {number} is {shown(value)}, here {own[field]!r}")
        for index, parameter in zip(listed, optimizer.param_groups[number]["params"], strict=True):
            known.add(index)
            values = state["state"].get(index, {})
            need(type(values) is dict, f"that of parameter {index} is a {type(values).__name__}")
            for key, value in values.items():
                said = _wrong(key, value, parameter)
                need(not said, f"{key} of parameter {index} {said}")
            kinds = _kinds(values)
            first = kept.setdefault((number, parameter.ndim > 1), kinds) if kinds else kinds
            said = f"of parameter {index} it keeps {_listed(kinds)}, of another {_listed(first)}"
            need(not kinds or kinds == first, said)
    need(state["state"].keys() <= known, "it is of more parameters")


def check_names(state: Any, known: Collection[str], name: str) -> None:
    """Raise CheckpointError unless each group of an optimizer's state names its parameters, all of them known."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    named = [group.get("names") if isinstance(group, dict) else None for group in groups or [None]]
    if not isinstance(groups, list) or not all(
        isinstance(names, list) and all(isinstance(x, str) and x in known for x in names) for names in named
    ):
        raise CheckpointError(f"{name}: its optimizer state does not name this run's parameters")


def check_files(files: Any, name: str) -> dict[str, int]:
    """The checksum of each file of a checkpoint, or CheckpointError."""
    if not isinstance(files, dict) or not all(
        isinstance(file, str) and file == Path(file).name and type(crc) is int for file, crc in files.items()
    ):
        raise CheckpointError(f"{name}: it does not say the checksums of its files")
    return files


def check_parts(state: Mapping[str, Any], stored: Collection[str], name: str) -> None:
    """Raise CheckpointError unless the small part of an optimizer's state is numbers, and the large part is stored."""
    keys, scalars = state.get("keys"), state.get("scalars")
    if not isinstance(keys, dict) or not isinstance(scalars, dict):
        raise CheckpointError(f"{name}: its optimizer state does not say what it keeps")
    for parameter, kept in keys.items():
        for key in kept if isinstance(kept, list) else [None]:
            if f"optimizer.{parameter}.{key}" not in stored:
                raise CheckpointError(f"{name}: its optimizer state is without {shown(key)} of {parameter}")
    for parameter, values in scalars.items():
        for key, value in values.items() if isinstance(values, dict) else [("all", values)]:
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            if value is not None and (type(number) not in (int, float) or not 0 <= number < GREATEST):
                raise CheckpointError(f"{name}: {key} of {parameter} is {shown(value)}, must be a number of at least 0")


def _kinds(values: Mapping[str, Any]) -> dict[str, Any]:
    """What each value is: a tensor's type of numbers, or its own class."""
    return {key: x.dtype if isinstance(x, Tensor) else type(x) for key, x in values.items()}


def _listed(kinds: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} ({str(kind).removeprefix('torch.')})" for key, kind in sorted(kinds.items()))


def _alike(value: Any, own: Any) -> bool:
    """Whether a hyper-parameter of a file is of the kind that this run's has."""
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, bool)
    if isinstance(own, int | float):
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(own, tuple | list):
        same = type(value) in (tuple, list) and len(value) == len(own)
        return same and all(_alike(x, y) for x, y in zip(value, own, strict=True))
    return type(value) is type(own)


def _wrong(key: str, value: Any, parameter: Tensor) -> str:
    """What is wrong with a value that is kept of a parameter; nothing if it can be."""
    if value is None:
        return ""
    if type(value) in (int, float):
        return "" if 0 <= value < GREATEST else f"is {shown(value)}, must be a number of at least 0"
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return f"is a {type(value).__name__}, must be a tensor or a number"
    if not _fits(key, value, parameter):
        return f"has the shape {tuple(value.shape)}, the parameter has {tuple(parameter.shape)}"
    if value.dtype != torch.uint8 if key in CODES else not value.is_floating_point():
        return f"is of {str(value.dtype).removeprefix('torch.')}"
    if key not in CODES and not bool(torch.isfinite(local(value)).all()):
        return "is not finite"
    return ""


CODES = ("code1", "code2")  # of the 8-bit AdamW, whose scales are of blocks
SCALES = ("absmax1", "absmax2")
SUMMED = {"row_var": -1, "col_var": -2}  # Adafactor's, and the dimension that is summed up


def _fits(key: str, value: Tensor, parameter: Tensor) -> bool:
    """Whether it has the shape of what is kept under that name: kernels take it for granted."""
    if key == "step":
        return value.numel() == 1
    if key in SCALES:
        return value.shape == (-(-parameter.numel() // BLOCK),)
    if key in SUMMED and parameter.ndim > 1:
        shape = list(parameter.shape)
        shape[SUMMED[key]] = 1
        return list(value.shape) == shape
    return value.shape == parameter.shape


def check_run(run: Any, name: str) -> None:
    """Raise CheckpointError unless `run` is what `python -m trainer train` puts beside weights and optimizer.

    Args:
        run: of the file.
        name: of the file, for messages.
    """
    kinds = {"step": int, "config": dict, "model": dict, "random": dict, "scaler": dict}
    for field, kind in kinds.items():
        found = run.get(field) if isinstance(run, dict) else None
        if type(found) is not kind:
            raise CheckpointError(f"{name}: its run.{field} is a {type(found).__name__}, must be a {kind.__name__}")
    if not 0 <= run["step"] < GREATEST:
        raise CheckpointError(f"{name}: its run.step is {shown(run['step'])}, must be at least 0")
    check_model(run["model"], name)
    if not _plain(run["config"]):
        raise CheckpointError(f"{name}: its run.config holds more than plain values")
    if not all(type(x) in (int, float) and math.isfinite(x) for x in run["scaler"].values()):
        raise CheckpointError(f"{name}: its run.scaler holds more than numbers")
    others = run["random"].get("cuda", [])
    states = [run["random"].get("cpu"), *(others if isinstance(others, list) else [others])]
    if not all(isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 1 for x in states):
        raise CheckpointError(f"{name}: its run.random must hold the generators' states, rows of bytes")
    if states[0].shape != torch.get_rng_state().shape:
        own = torch.get_rng_state().numel()
        raise CheckpointError(
            f"{name}: its run.random.cpu has {states[0].numel()} bytes, a generator's state has {own}"
        )


def check_model(model: Any, name: str) -> None:
    """Raise CheckpointError unless `model` says a configuration in plain values.

    Args:
        model: of the file.
        name: of the file, for messages.
    """
    known = {f.name for f in fields(ModelConfig)}
    if type(model) is not dict or not _plain(model):
        raise CheckpointError(f"{name}: its run.model holds more than plain values")
    needed = [f.name for f in fields(ModelConfig) if f.default is MISSING and f.default_factory is MISSING and f.init]
    if missing := next((field for field in needed if field not in model), None):
        raise CheckpointError(f"{name}: its run.model has no {missing}")
    if strange := next((field for field in model if field not in known), None):
        raise CheckpointError(f"{name}: its run.model has a field {shown(strange)} that no model has")


def _plain(value: Any) -> bool:
    """Whether a value is one that JSON has: comparing two of them is a yes or a no."""
    if isinstance(value, dict):
        return all(type(key) is str and _plain(x) for key, x in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def check_finite(model: nn.Module, name: str) -> None:
    """Raise CheckpointError unless each weight is a number: nothing can go on from one that is not.

    Args:
        model: with the weights of the file; a process's shards are its part of them.
        name: of the file, for messages.
    """
    for parameter, value in model.named_parameters():
        if not bool(torch.isfinite(local(value)).all()):
            raise CheckpointError(f"{name}: {parameter} is not finite")
