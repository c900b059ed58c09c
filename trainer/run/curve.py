"""A run's curve as text: validation loss over the steps, beside what token frequencies alone would have."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from trainer.files.data import read_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # the last line of a run that was killed, or that is writing it now
        record = json.loads(line)
        seconds += record.get("seconds", 0.0)
        if "valid_loss" in record:
            loss = record["valid_loss"]  # null where it is not finite
            rows.append((f"{record['step']:>8}{seconds:>9.0f}", math.nan if loss is None else loss))
    if not rows:
        raise ConfigError(f"{file}: no validation in it yet")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (unigram := read_manifest(Path(config["data"])).get("unigram_loss")) is not None:
        rows.append((f"{'unigram model':>17}", unigram))
    return "\n".join([f"{'step':>8}{'seconds':>9}  valid loss", *bars(rows)])


def bars(rows: Sequence[tuple[str, float]]) -> list[str]:
    """Each label with its value and a bar from 0, the greatest value's `WIDTH` long; none for what is not finite."""
    finite = [value if math.isfinite(value) else 0.0 for _, value in rows]
    scale = WIDTH / (max(finite) or 1.0)
    return [
        f"{label}  {value:>10.4f}  {'#' * round(scale * length)}".rstrip()
        for (label, value), length in zip(rows, finite, strict=True)
    ]
