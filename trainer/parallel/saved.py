"""Checkpoints that processes write together, and that any number of them reads in any layout.

Names, shapes and the order of rows are those of one process. A folder holds what torch.distributed.checkpoint writes,
and beside it a file of all that is small.
"""

from __future__ import annotations

import pickle
import shutil
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from trainer.files.checkpoint import (
    check_optimizer_class,
    checkpoint_path,
    read_checkpoint,
    restore,
    save_checkpoint,
    sync_folder,
    type_name,
    write_atomically,
)
from trainer.files.contents import CheckpointError, check_files, check_names, check_parts
from trainer.parallel.distributed import piece

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch.distributed.checkpoint.metadata import Metadata

    from trainer.parallel.distributed import Weights, World

RUN_FILE = "run.pt"  # in a sharded checkpoint: all that is not a large tensor, and the other files' checksums


def save_run(
    world: World, folder: Path, step: int, weights: Weights, optimizer: torch.optim.Optimizer, *, run: dict[str, Any]
) -> Path:
    """Write the checkpoint of `step`: a file or, from several processes, a folder; complete or absent.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    path = checkpoint_path(folder, step, sharded=world.size > 1)
    if world.size == 1:
        save_checkpoint(weights.model, optimizer, step, path, run)
        return path
    part = path.with_name(path.name + ".part")
    if world.rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    world.barrier()
    tensors, state = _flatten(weights, optimizer)
    try:
        save(tensors, storage_writer=FileSystemWriter(part))  # flushes each file to the disk
    except CheckpointException as error:
        raise OSError(f"{part}: cannot be written ({error})") from error
    if world.rank == 0:
        content = {
            "model": {},
            "optimizer": state,
            "optimizer_class": type_name(type(optimizer)),
            "iteration": step,
            "run": run,
            "files": {file.name: checksum(file) for file in sorted(part.iterdir())},
        }
        write_atomically(part / RUN_FILE, lambda file: torch.save(content, file))
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)
        sync_folder(folder)
    world.barrier()
    return path


def load_run(world: World, path: Path, weights: Weights, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Read a checkpoint, file or folder, of any number of processes in any layout; return `save_run`'s `run`.

    Raises:
        CheckpointError: incomplete, altered, foreign, or of another model or optimizer.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _load_sharded(world, path, weights, optimizer)
    content = read_checkpoint(path)
    if optimizer is not None and (weights.sharded or weights.stages is not None):
        check_names(content["optimizer"], _known(weights), str(path))
        _cut(content, weights, str(path))
    if weights.stages is not None:
        _own_tensors(content, weights, str(path))
    names = weights.names
    restore(content, weights.model, optimizer, str(path), lambda own, x, whole: weights.take(names[own], x, whole))
    run: dict[str, Any] = content.get("run", {})
    return run


def _own_tensors(content: dict[str, Any], weights: Weights, path: str) -> None:
    """Leave in `content` the tensors of this process's blocks, under the names that they have here."""
    stored = content["model"] if isinstance(content["model"], dict) else {}
    for name in [*weights.shapes, *stored]:
        theirs, ours = getattr(stored.get(name), "shape", None), weights.shapes.get(name)
        if theirs != ours:
            raise CheckpointError(
                f"{path}: of another model: {name} is {_shape(theirs)}, the model's is {_shape(ours)}"
            )
    content["model"] = {own: stored[name] for own, name in weights.names.items()}


def _known(weights: Weights) -> Collection[str]:
    """The names that the optimizer's state of a checkpoint may have: of stages those of the others too."""
    return weights.originals if weights.stages is None else weights.shapes


def _cut(content: dict[str, Any], weights: Weights, path: str) -> None:
    """Leave of the optimizer's state in `content` this process's parameters and its pieces of them; scalars stay."""
    state, groups = content["optimizer"].get("state"), content["optimizer"]["param_groups"]
    if not isinstance(state, dict) or not all(isinstance(values, dict) for values in state.values()):
        raise CheckpointError(f"{path}: its optimizer state does not fit this run's parameters: it has no state")
    at = {name: i for i, name in enumerate(name for group in groups for name in group["names"])}  # in the state's order
    left, known = {}, 0
    for group in groups:
        group["names"] = [name for name in group["names"] if name in weights.originals]
        group["params"] = list(range(known, known + len(group["names"])))
        for number, name in zip(group["params"], group["names"], strict=True):
            if at[name] in state:
                left[number] = {key: _piece(value, name, weights) for key, value in state[at[name]].items()}
        known += len(group["names"])
    content["optimizer"] |= {"state": left, "param_groups": [group for group in groups if group["names"]]}


def _piece(value: Any, name: str, weights: Weights) -> Any:
    original = weights.originals[name]
    if not isinstance(value, Tensor) or value.shape != original.shape:
        return value
    return piece(weights.dealt(name, value), original) if isinstance(original, DTensor) else weights.shard(name, value)


def _flatten(weights: Weights, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(name -> large tensor, the rest of the optimizer's state by name)."""
    tensors = {f"model.{name}": weights.in_order(name, tensor) for name, tensor in weights.state().items()}
    keys: dict[str, list[str]] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in weights.named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                keys.setdefault(name, []).append(key)
                tensors[f"optimizer.{name}.{key}"] = weights.in_order(name, weights.whole(name, value))
            else:
                scalars.setdefault(name, {})[key] = value
    state = {"keys": keys, "scalars": scalars, "param_groups": optimizer.state_dict()["param_groups"]}
    return tensors, state if weights.stages is None else _gathered(state, weights)


def _gathered(state: dict[str, Any], weights: Weights) -> dict[str, Any]:
    """The same with that of the other stages, names in the whole model's order."""
    assert weights.stages is not None
    states: list[dict[str, Any]] = [{}] * weights.stages.size()
    dist.all_gather_object(states, state, weights.stages.get_group())
    groups = [dict(group) for group in states[0]["param_groups"]]
    order, known = {name: i for i, name in enumerate(weights.shapes)}, 0
    for number, group in enumerate(groups):
        names = [name for each in states for name in each["param_groups"][number]["names"]]
        group |= {"names": sorted(names, key=order.__getitem__), "params": list(range(known, known + len(names)))}
        known += len(names)
    joined: dict[str, Any] = {"param_groups": groups}
    return joined | {kind: {k: x for each in states for k, x in each[kind].items()} for kind in ("keys", "scalars")}


def _load_sharded(
    world: World, path: Path, weights: Weights, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    if not (path / RUN_FILE).exists():
        raise CheckpointError(f"{path}: no checkpoint: {RUN_FILE} is missing")
    content = read_checkpoint(path / RUN_FILE)
    files = sorted(check_files(content.get("files"), str(path)).items())
    # Shared out, so that the whole is read once and not once a process.
    damaged = [name for name, crc in files[world.rank :: world.size] if checksum(path / name) != crc]
    if world.any(bool(damaged)):
        raise CheckpointError(
            f"{path}: altered since it was written (checksum of {', '.join(damaged) or 'another file'})"
        )
    own = weights.state()
    tensors = {f"model.{name}": weights.in_order(name, tensor) for name, tensor in own.items()}
    reader = _Reader(path)
    stored = reader.read_metadata().state_dict_metadata
    for name in [*weights.shapes, *(key.removeprefix("model.") for key in stored if key.startswith("model."))]:
        ours, theirs = weights.shapes.get(name), getattr(stored.get(f"model.{name}"), "size", None)
        if ours != theirs:
            raise CheckpointError(_other(str(path), name, theirs, ours))
    kept: dict[str, tuple[str, Tensor, Tensor]] = {}  # of the optimizer, by key: a name, what is there, what is read
    if optimizer is not None:
        check_optimizer_class(content, optimizer, str(path))
        state = content["optimizer"]
        check_names(state, _known(weights), str(path))
        check_parts(state, {key for key, x in stored.items() if isinstance(x, TensorStorageMetadata)}, str(path))
        groups = [(g, [name for name in g["names"] if name in weights.originals]) for g in state["param_groups"]]
        groups = [(group, names) for group, names in groups if names]
        if [names for _, names in groups] != [g["names"] for g in optimizer.param_groups]:
            raise CheckpointError(f"{path}: its optimizer state does not fit this run's parameters")
        for group, (values, _) in zip(optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in values.items() if key not in ("params", "names")})
        for name, parameter in weights.named.items():
            held = optimizer.state[parameter]
            held.update(state["scalars"].get(name, {}))
            for key in state["keys"].get(name, []):
                saved = stored[f"optimizer.{name}.{key}"]
                assert isinstance(saved, TensorStorageMetadata)
                if saved.size == weights.originals[name].shape:
                    held[key] = torch.zeros_like(parameter, dtype=saved.properties.dtype, requires_grad=False)
                    part = weights.whole(name, held[key])
                    tensors[f"optimizer.{name}.{key}"] = weights.in_order(name, part)
                    kept[f"optimizer.{name}.{key}"] = name, part, tensors[f"optimizer.{name}.{key}"]
                else:  # never a shard's: see `build_optimizer`
                    held[key] = parameter.new_zeros(saved.size, dtype=saved.properties.dtype)
                    tensors[f"optimizer.{name}.{key}"] = held[key]
    with warnings.catch_warnings():
        # It says that one process reads what several may have written: that is what is wanted.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            load(tensors, storage_reader=reader, no_dist=world.size == 1)
        except CheckpointException as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from error
    with torch.no_grad():  # what was dealt out was read into tensors of its own
        for name, part, read in [*((name, x, tensors[f"model.{name}"]) for name, x in own.items()), *kept.values()]:
            if read is not part:
                weights.take(name, part, read)
    run: dict[str, Any] = content.get("run", {})
    return run


def _other(path: str, name: str, theirs: Iterable[int] | None, ours: Iterable[int] | None) -> str:
    return f"{path}: of another model: {name} is {_shape(theirs)}, the model's is {_shape(ours)}"


def _shape(size: Iterable[int] | None) -> str:
    return "absent" if size is None else str(tuple(size))


def checksum(file: Path) -> int:
    """CRC-32 of a file, in pieces; 0 if there is none."""
    crc = 0
    if file.exists():
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                crc = zlib.crc32(chunk, crc)
    return crc


class _Reader(FileSystemReader):
    """torch's reader, whose metadata file is a pickle: looked through for anything but metadata before it is loaded."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                _MetadataOnly(file).load()
            except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, ValueError, TypeError) as error:
                raise CheckpointError(f"{self.path}: its metadata is broken or holds more than metadata") from error
        return super().read_metadata(*args, **kwargs)


METADATA = {
    "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # where Python 3.13 has them
}


class _MetadataOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in METADATA.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint's metadata")
        return super().find_class(module, name)
