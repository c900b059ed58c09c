"""A run's curve as text: validation loss over the steps, beside what token frequencies alone would have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError, shown
from trainer.files.data import read_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

WIDTH = 60  # characters of the longest bar


def curve(folder: Path) -> str:
    """A line for each validation of the run in `folder`, and the unigram model's where the corpus is still there.

    The seconds are those of training steps, without validations and checkpoints.

    Raises:
        ConfigError: the folder holds no run, or one without a validation yet.
    """
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; a run of `python -m trainer train` writes it")
    seconds, rows = 0.0, []
    for record in records(file):
        seconds += record.get("seconds", 0.0)
        if "valid_loss" in record:
            loss = record["valid_loss"]  # null where it is not finite
            rows.append((f"{record['step']:>8}{seconds:>9.0f}", math.nan if loss is None else loss))
    if not rows:
        raise ConfigError(f"{file}: no validation in it yet")
    if (unigram := read_manifest(corpus_of(folder)).get("unigram_loss")) is not None:
        rows.append((f"{'unigram model':>17}", unigram))
    return "\n".join([f"{'step':>8}{'seconds':>9}  valid loss", *bars(rows)])


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's metrics, each an object of numbers.

    Raises:
        ConfigError: one is something else.
    """
    with file.open("rb") as lines:
        for at, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return  # the last line of a run that was killed, or that is writing it now
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{file}, line {at}: not JSON ({error})") from error
            if not isinstance(record, dict) or not all(map(_is_number, record.values())):
                raise ConfigError(f"{file}, line {at}: must be an object of numbers, is {shown(record)}")
            if "valid_loss" in record and type(record.get("step")) is not int:
                raise ConfigError(f"{file}, line {at}: a validation without its step")
            yield record


def _is_number(x: object) -> bool:
    return x is None or type(x) in (int, float)


def corpus_of(folder: Path) -> Path:
    """The corpus of the run in `folder`.

    Raises:
        ConfigError: the run's configuration does not say it.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    data = config.get("data") if isinstance(config, dict) else None
    if not isinstance(data, str):
        raise ConfigError(f"{file}: data = {shown(data)}: must be a folder's path")
    return Path(data)


def bars(rows: Sequence[tuple[str, float]]) -> list[str]:
    """Each label with its value and a bar from 0, the greatest value's `WIDTH` long; none for what is not finite."""
    finite = [value if math.isfinite(value) else 0.0 for _, value in rows]
    scale = WIDTH / (max(finite) or 1.0)
    return [
        f"{label}  {value:>10.4f}  {'#' * round(scale * length)}".rstrip()
        for (label, value), length in zip(rows, finite, strict=True)
    ]
