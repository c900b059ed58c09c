"""validate-estimates --time: predicted against measured seconds of training steps that calibration has not seen."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.hardware.accelerators import accelerator
from estimator.timing.roofline import efficiency
from estimator.timing.speed import step_times
from trainer.referee.calibrate import calibrate, usual_seconds, write_profile
from trainer.referee.measure import build_step
from trainer.system.heap import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

MEDIAN, WORST = 0.10, 0.25  # of the error: what is promised of a machine that was calibrated
CASES = (
    (ModelConfig("gpt2", 4, 128, 4, 512, 128), Plan(batch_size=4)),
    (ModelConfig("gpt2", 4, 256, 4, 1000, 256), Plan(batch_size=2, precision="bf16")),
    (ModelConfig("gpt2", 2, 512, 8, 1000, 512), Plan(batch_size=1, attention="sdpa")),
    (ModelConfig("gpt2", 2, 768, 12, 2000, 64), Plan(batch_size=16, precision="bf16", attention="sdpa")),
    (ModelConfig("gpt2", 1, 1024, 16, 1000, 128), Plan(batch_size=4)),
    (ModelConfig("llama", 4, 128, 4, 512, 64, d_ff=384), Plan(batch_size=16)),
    (
        ModelConfig("llama", 3, 256, 8, 1000, 512, 4, d_ff=704),
        Plan(batch_size=2, attention="sdpa", checkpointing="block"),
    ),
    (ModelConfig("llama", 2, 384, 6, 1500, 128, d_ff=1024), Plan(batch_size=8, precision="bf16")),
    (ModelConfig("llama", 2, 512, 8, 1000, 256, d_ff=1408), Plan(batch_size=4, precision="bf16", attention="sdpa")),
    (ModelConfig("llama", 1, 1024, 16, 1000, 64, d_ff=2816), Plan(batch_size=8, optimizer_impl="foreach")),
)


@dataclass(frozen=True, slots=True)
class Timed:
    """A case: predicted and measured seconds of an optimizer step."""

    model: ModelConfig
    plan: Plan
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def measured(profile: Path, device: str, budget: float, case: tuple[ModelConfig, Plan]) -> Timed:
    """One case: the median of the steps that `budget` seconds have room for, as calibration measures its kernels."""
    m, p = case
    predicted = sum(float(x[0]) for x in step_times(m, p, profile).values())
    return Timed(m, p, predicted, usual_seconds(build_step(m, p, device), device, budget))


def report(rows: list[Timed], console: Console) -> bool:
    """Print the cases; whether the errors are within what is promised."""
    table = Table("family", "width", "tokens", "batch", "plan", "measured", "predicted", "error", box=None)
    for r in rows:
        sizes = (str(r.model.d_model), str(r.plan.tokens(r.model)), str(r.plan.batch_size))
        seconds = (f"{1e3 * r.measured:,.1f} ms", f"{1e3 * r.predicted:,.1f} ms", f"{r.error:+.1%}")
        table.add_row(r.model.family, *sizes, f"{r.plan.precision} {r.plan.attention}", *seconds)
    console.print(table)
    errors = [abs(r.error) for r in rows]
    console.print(f"median error {statistics.median(errors):.1%}, worst {max(errors):.1%}", highlight=False)
    return statistics.median(errors) <= MEDIAN and max(errors) <= WORST


def to_json(rows: list[Timed], origin: str) -> dict[str, Any]:
    """Everything that was found, with where and when."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "origin": origin,
        "cases": [
            {"model": r.model.to_dict(), "plan": r.plan.to_dict(), "predicted": r.predicted, "measured": r.measured}
            for r in rows
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if the errors are within what is promised, 1 if not, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="validate-estimates --time",
        description="Predicted against measured seconds of training steps that calibration has not seen.",
        allow_abbrev=False,
    )
    parser.add_argument("--profile", type=Path, help="what `estimate calibrate` wrote (default: it is measured now)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each case (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device = cuda: this PyTorch sees no CUDA device; allowed here is cpu")
    keep_freed_memory()
    console = Console()
    with TemporaryDirectory() as folder:
        profile = args.profile or Path(folder) / "machine.toml"
        if args.profile is None:
            write_profile(profile, calibrate(args.device))
        try:
            origin = efficiency(accelerator(profile)).origin
            cases = track(CASES, "training steps", console=console, transient=True)
            rows = [measured(profile, args.device, args.budget, case) for case in cases]
        except ConfigError as error:
            parser.error(str(error))
    within = report(rows, console)
    console.print(f"{origin} Load average now {os.getloadavg()[0]:.1f}.", highlight=False)
    if args.json:
        args.json.write_text(json.dumps(to_json(rows, origin), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return 0 if within else 1
