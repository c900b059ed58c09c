"""Checkpoints: complete or absent on disk, checked on the way in, and never a program."""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trainer.files.contents import CheckpointError, check_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

type_name = "{0.__module__}.{0.__qualname__}".format


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike[str] | IO[bytes],
    run: dict[str, Any] | None = None,
) -> None:
    """Write weights, optimizer state and iteration to a path, by `write_atomically`, or to a binary file object.

    Args:
        model: its `state_dict`; a tied matrix is written once.
        optimizer: its `state_dict` and its class's name.
        iteration: steps done.
        out: a path, whose older content stays until the new one is complete, or a binary file object.
        run: what else a run needs to go on exactly: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        OSError: the disk is full or the path cannot be written; an older file at `out` is untouched.
    """
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "optimizer_class": type_name(type(optimizer)),
        "iteration": iteration,
        "run": run or {},
    }
    if isinstance(out, (str, os.PathLike)):
        write_atomically(Path(out), lambda part: _write(content, part))
    else:
        torch.save(content, out)


def _write(content: dict[str, Any], path: Path) -> None:
    # Through a file object: given a path, torch reports a full disk as a RuntimeError about positions.
    with path.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # After a failed write torch still tries to end its archive, and reports that this failed as well.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def load_checkpoint(
    src: str | os.PathLike[str] | IO[bytes], model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> int:
    """Copy a checkpoint into `model` and `optimizer` (None: weights only) and return its iteration.

    Raises:
        CheckpointError: truncated, altered, foreign, or of another model or optimizer; both are then untouched.
        OSError: the path cannot be read.
    """
    return restore(read_checkpoint(src), model, optimizer, str(src))


def read_checkpoint(src: str | os.PathLike[str] | IO[bytes]) -> dict[str, Any]:
    """The verified content of a checkpoint, tensors on the CPU: what `save_checkpoint` wrote.

    Raises:
        CheckpointError: truncated, altered or foreign.
        OSError: the path cannot be read.
    """
    if isinstance(src, (str, os.PathLike)):
        with Path(src).open("rb") as file:
            return _read(file, str(src))
    return _read(src, str(src))


# What zipfile, torch and the restricted unpickler raise on bytes that are not what they expect.
_BROKEN = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, ValueError, EOFError, LookupError)
_FOREIGN = (pickle.UnpicklingError, TypeError, AttributeError, AssertionError, ArithmeticError)


def _read(file: IO[bytes], name: str) -> dict[str, Any]:
    start = file.tell()
    try:
        # torch writes a zip archive with a CRC-32 of each member, but does not compare it on reading: a flipped bit
        # in a weight loads without a word.
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except _BROKEN as error:
        raise CheckpointError(f"{name}: no checkpoint, or a truncated one ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{name}: altered since it was written (checksum of {damaged})")
    file.seek(start)
    try:
        # weights_only: tensors and plain containers are rebuilt, nothing else is called.
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (*_BROKEN, *_FOREIGN) as error:
        raise CheckpointError(f"{name}: holds more than tensors and plain values, or is no checkpoint") from error
    if not isinstance(content, dict) or not {"model", "optimizer", "iteration"} <= content.keys():
        raise CheckpointError(f"{name}: no checkpoint: model, optimizer and iteration are not all in it")
    return content


def restore(
    content: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    name: str,
    place: Callable[[str, Tensor, Tensor], object] = lambda _, own, whole: own.copy_(whole),
) -> int:
    """Copy what `read_checkpoint` gave into `model` and `optimizer`: all of it or, with CheckpointError, nothing.

    Args:
        content: of the file.
        model: its tensors are overwritten.
        optimizer: its state is replaced; None: weights only.
        name: of the file, for messages.
        place: copies into the model's tensor of a name, which may hold a part of it only, the file's whole one.
    """
    weights, iteration = content["model"], content["iteration"]
    if type(iteration) is not int or not isinstance(weights, dict):
        raise CheckpointError(f"{name}: no checkpoint: iteration or model has the wrong type")
    own = model.state_dict()
    for key in [*own, *weights]:
        if key not in weights or key not in own:
            raise CheckpointError(f"{name}: of another model: {key} is only in the {_holder(key in own)}")
        if not isinstance(weights[key], Tensor) or weights[key].shape != own[key].shape:
            theirs, ours = tuple(getattr(weights[key], "shape", ())), tuple(own[key].shape)
            raise CheckpointError(f"{name}: of another model: {key} is {theirs}, the model's is {ours}")
        if weights[key].layout != torch.strided or weights[key].is_floating_point() != own[key].is_floating_point():
            kinds = f"{weights[key].dtype}, the model's is {own[key].dtype}".replace("torch.", "")
            raise CheckpointError(f"{name}: of another model: {key} is {kinds}")
    if optimizer is not None:
        check_optimizer_class(content, optimizer, name)
        check_state(content["optimizer"], optimizer, name)
        optimizer.load_state_dict(content["optimizer"])
    with torch.no_grad():
        for key, tensor in own.items():
            place(key, tensor, weights[key])
    return iteration


def check_optimizer_class(content: dict[str, Any], optimizer: torch.optim.Optimizer, name: str) -> None:
    """Raise CheckpointError if another class of optimizer wrote the file, whose state this one would misread."""
    wanted, found = type_name(type(optimizer)), content.get("optimizer_class")
    if found is not None and found != wanted:
        raise CheckpointError(f"{name}: of another optimizer: {found}, this run's is {wanted}")


def _holder(in_model: bool) -> str:
    return "model" if in_model else "file"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a new file beside `path`, flush it to the disk and rename it to `path`.

    POSIX's rename replaces in one step, so `path` is at every moment the old file or the new one, whole. Without the
    fsync before it, a power cut could leave the new name on data that never reached the disk; without the one after
    it, the old name.

    Raises:
        OSError: it cannot be written, or something stands there that is no file, such as a device.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: cannot be written: it is no file")
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to the disk, where the system lets a folder be opened (POSIX)."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checkpoint_path(folder: Path, step: int, *, sharded: bool = False) -> Path:
    """Where a run keeps the checkpoint of `step`: a file, or a folder if it is written by many processes."""
    return folder / (f"step_{step:08d}" + ("" if sharded else ".pt"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first: what was renamed is complete."""
    return [path for _, path in sorted(_steps(folder))]


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)(\.pt)?", path.name):
            yield int(match[1]), path


def random_states() -> dict[str, Any]:
    """The states of torch's generators, CPU and every CUDA device, as tensors."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_states(states: dict[str, Any]) -> None:
    """Undo what was drawn since `random_states`; CUDA's only on a machine with as many devices."""
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])


def export_safetensors(model: nn.Module, path: str | os.PathLike[str], metadata: dict[str, str] | None = None) -> None:
    """Write the weights as a safetensors file, atomically; of tied matrices one, the others named in its metadata.

    The same weights give the same bytes.

    `safetensors.torch.load_model` reads it back into a model of the same configuration.
    """
    from safetensors import SafetensorError  # noqa: PLC0415  (an extra of the trainer, wanted only here)
    from safetensors.torch import save_model  # noqa: PLC0415

    def write(part: Path) -> None:
        save_model(model, str(part), metadata)
        sort_header(part)

    try:
        write_atomically(Path(path), write)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error


def sort_header(path: Path) -> None:
    """Put the entries of a safetensors file's header in order: the library's metadata comes in a random one.

    The format: the header's length in 8 bytes, little-endian; the header, JSON padded with spaces; the tensors.
    """
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        ordered = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > length:
            raise OSError(f"{path}: its header has {length} bytes, in order it would have {len(ordered)}")
        file.seek(8)
        file.write(ordered.ljust(length))
