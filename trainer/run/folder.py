"""A run's folder: who may write there, where it can go on from, and what is kept."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError
from trainer.files.checkpoint import checkpoints
from trainer.files.prepare import write_whole

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from trainer.parallel.distributed import World
    from trainer.run.settings import TrainConfig

LOCK = ".lock"
# What may differ from the checkpoint that a run goes on from: nothing that is computed depends on it.
FREE = (
    "out", "eval_every", "eval_batches", "save_every", "keep", "log_every", "device", "sharding", "tensorboard",
    "resume", "force", "changed",
    "plan.context_parallel", "plan.expert_parallel", "plan.tensor_parallel", "plan.sequence_parallel",
    "plan.vocabulary_parallel", "plan.pipeline_parallel", "plan.pipeline_schedule", "plan.virtual_stages",
)  # fmt: skip


@contextmanager
def locked(folder: Path, world: World) -> Iterator[None]:
    """Inside, the run's folder is this run's: the system lets go of the lock when the process ends, however it does.

    Raises:
        ConfigError: another process trains there.
    """
    if world.rank or os.name != "posix":
        yield
        return
    import fcntl  # noqa: PLC0415 - POSIX only

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise ConfigError(
                f"out = {folder}: process {file.read().strip() or 'unknown'} trains there; wait for it, or give "
                "another folder"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def check_settings(before: dict[str, Any], config: TrainConfig, source: Path) -> None:
    """Raise ConfigError if the run would be computed by other settings than those of the checkpoint `source`."""
    old, new = dict(_flat(before)), dict(_flat(config.to_dict()))
    changes = [
        f"{name} = {new.get(name)!r} (there {old[name]!r})"
        for name in old
        if not {name, name.split(".")[0]} & {*FREE} and name in new and old[name] != new[name]
    ]
    if changes:
        raise ConfigError(f"{source}: was made with other settings: {'; '.join(changes)}; --changed if that is meant")


def _flat(table: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", list(value) if isinstance(value, tuple) else value


def start_point(config: TrainConfig, world: World) -> Path | None:
    """The checkpoint to go on from, None for a new run.

    Raises:
        ConfigError: there is none to go on from, or there is one and going on was not asked for.
    """
    found = checkpoints(config.out)
    if config.resume and not found:
        raise ConfigError(f"resume = True: there is no checkpoint in {config.out}")
    if found and not config.resume:
        raise ConfigError(f"out = {config.out}: holds {found[-1].name}; --resume to go on, or give another folder")
    world.barrier()  # nobody writes before all have looked
    if world.rank == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        for part in config.out.glob("step_*.part"):  # of a run that was killed in the middle of a save
            remove(part)
    return found[-1] if found else None


def keep_inputs(config: TrainConfig) -> None:
    """Put beside the checkpoints what going on and generating need: configuration and tokenizer."""
    write_whole(config.out / "config.json", (json.dumps(config.to_dict(), indent=2, allow_nan=False) + "\n").encode())
    tokenizer = config.data / "tokenizer.json"
    if tokenizer.exists():
        write_whole(config.out / "tokenizer.json", tokenizer.read_bytes())


def newest(config: TrainConfig) -> str:
    """Where the run could go on from, in words."""
    found = checkpoints(config.out)
    return f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        # Renamed first: a folder that is removed piece by piece must not look like a checkpoint meanwhile.
        remove(path.replace(path.with_name(path.name + ".part")))


def remove(path: Path) -> None:
    """Remove a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
