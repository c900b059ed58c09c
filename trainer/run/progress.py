"""What a run says while it goes: a live line, JSON lines, TensorBoard."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from estimator.describe.checks import ConfigError
from trainer.files.prepare import write_whole

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

LINE = "loss {loss:.4f}  lr {lr:.2e}  {tokens_per_second:,.0f} tokens/s  MFU {mfu}  {left} left"


class Reporter:
    """Writes the records of a run. On a terminal one line is redrawn; elsewhere a line comes each `log_every` steps.

    Args:
        folder: where metrics.jsonl goes; records of steps after `start`, of a run that got further than its last
            checkpoint, are dropped from it.
        start: steps done before.
        steps: steps in all.
        log_every: steps between lines.
        tensorboard: write TensorBoard's files as well.
        quiet: say and write nothing, as all processes but the first do.

    Raises:
        ConfigError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: Path, start: int, steps: int, log_every: int, *, tensorboard: bool = False, quiet: bool = False
    ) -> None:
        self.steps, self.log_every, self.quiet = steps, log_every, quiet
        self.console = Console(quiet=quiet, highlight=False)
        self.progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=start, line="")
        self.board: SummaryWriter | None = None
        if quiet:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  (an extra)
            except ImportError as error:
                raise ConfigError(
                    "tensorboard = True: not installed; pip install 'transformer-estimator[tensorboard]'"
                ) from error
            self.board = SummaryWriter(folder / "tensorboard", purge_step=start + 1)
        metrics = folder / "metrics.jsonl"
        old = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if start and metrics.exists() else []
        write_whole(metrics, "".join(line for line in old if _step(line) <= start).encode())
        self.file = metrics.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        if not self.quiet:
            self.file.close()
        if self.board is not None:
            self.board.close()

    def say(self, text: str) -> None:
        """Print `text` above the live line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def record(self, **values: Any) -> None:
        """Append one record, with its `step`, to the files; in JSON what is not finite is null."""
        if self.quiet:
            return
        plain = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in values.items()}
        self.file.write(json.dumps(plain, allow_nan=False) + "\n")
        self.file.flush()
        if self.board is not None:
            for name, value in values.items():
                if name != "step":
                    self.board.add_scalar(name, value, values["step"])

    def step(self, step: int, seconds_left: float, **values: Any) -> None:
        """Record a step done, and show it."""
        self.record(step=step, **values)
        shown = f"{100 * values['mfu']:.1f} %" if values.get("mfu") is not None else "-"
        line = LINE.format(**{**values, "mfu": shown, "left": duration(seconds_left)})
        self.progress.update(self.task, completed=step, line=line)
        if self.progress.disable and (step % self.log_every == 0 or step == self.steps):
            self.say(f"step {step}/{self.steps}  {line}")


def _step(line: str) -> float:
    """The step of a line; infinite for one that a crash cut short, so that it is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the way a clock shows them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
