"""validate-estimates: run real training steps and hold every estimate against what PyTorch did.

Exact figures (bytes and FLOPs) must be equal to the last one: a difference is a rule of PyTorch that the symbolic step
does not know, and the exit status is 1. On CUDA what the allocator has given out and has reserved is compared as well;
these come from a model of it, and are in the table only.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import random
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from estimator.accounting.accounts import account, sizes_for
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.parts import FAMILIES
from estimator.describe.plan import Plan
from estimator.describe.settings import choices
from estimator.hardware.accelerators import accelerator
from estimator.memory.device import memory
from estimator.show.output import guarded
from estimator.studies import device, published_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.hardware.accelerators import Accelerator

QUANTITIES = (
    "parameters",
    "parameter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "saved_bytes",
    "peak_bytes",
    "forward_flops",
    "backward_flops",
)
MODELLED = ("allocated_bytes", "reserved_bytes")  # on CUDA; they decide nothing about exactness
FUSED = ("forward_flops", "backward_flops")  # FlopCounterMode counts nothing for the CPU's flash attention


@dataclass(frozen=True)
class Row:
    """One quantity of one case: what was estimated and what was measured; None where it cannot be measured."""

    case: int
    quantity: str
    estimate: int
    measurement: int | None

    @property
    def difference(self) -> int | None:
        """Estimate less measurement."""
        return None if self.measurement is None else self.estimate - self.measurement


def compare(m: ModelConfig, p: Plan, device: str = "cpu", case: int = 0) -> list[Row]:
    """Estimate and measure one model and plan."""
    from trainer.referee.measure import measure  # noqa: PLC0415 - torch, which --published does without

    form, sizes = account(m, p, device), sizes_for(m, p)
    values = form.values(sizes)
    estimates = {q: getattr(values, {"saved_bytes": "activation_bytes"}.get(q, q)) for q in QUANTITIES}
    if device == "cuda":
        on_device = memory(form, values, sizes, this_accelerator())
        estimates |= dict(zip(MODELLED, (on_device.allocated, on_device.reserved), strict=True))
    measured = measure(m, p, device, timed_steps=0).to_dict()
    if p.attention_kernel(device) == "flash":
        measured |= dict.fromkeys(FUSED)
    return [Row(case, q, estimate, measured[q]) for q, estimate in estimates.items()]


def this_accelerator() -> Accelerator | None:
    """This machine's CUDA device in the catalogue; None where it is not there."""
    import torch  # noqa: PLC0415 - which --published does without

    try:
        return accelerator(torch.cuda.get_device_name())
    except ConfigError:
        return None


def cases(count: int, seed: int = 0) -> Iterator[tuple[ModelConfig, Plan]]:
    """`count` models and plans of each family: first the edges (sizes of 1, V below T), then at random."""
    rng = random.Random(seed)  # noqa: S311 - shapes, not secrets
    edges = [
        {"B": 1},
        {"T": 1},
        {"h": 1},
        {"L": 1},
        {"V": 1},
        {"B": 1, "T": 1, "h": 1, "L": 1},
        {"V": 3, "T": 13},
        {"B": 1, "L": 2},
    ]
    for i in range(count):
        for family in FAMILIES:
            yield _case(family, rng, edges[i] if i < len(edges) else {}, i)


def _case(family: str, rng: random.Random, fixed: dict[str, int], turn: int) -> tuple[ModelConfig, Plan]:
    """A small odd-sized model, and a plan; over the turns every combination of recipe comes up."""

    def size(letter: str, *choices: int) -> int:
        return fixed.get(letter, rng.choice(choices))

    B, T, h, L = size("B", 2, 3, 5), size("T", 4, 7, 13), size("h", 2, 3, 4), size("L", 1, 2, 3, 4)
    V, C = size("V", 17, 101, 997), T + rng.choice((0, 0, 3))
    if FAMILIES[family].attention.fused:  # heads fill the width, and have keys of their own
        m = ModelConfig(family, L, h * rng.choice((1, 3, 8)), h, V, C, tie_embeddings=rng.random() < 0.7)
    else:
        k = rng.choice([k for k in range(1, h + 1) if h % k == 0])
        e = rng.choice((2, 4, 6))
        d = rng.choice((h * e, rng.randint(3, 40)))
        tied, bias = rng.random() < 0.3, rng.random() < 0.3
        m = ModelConfig(family, L, d, h, V, C, k, e, rng.randint(3, 70), tied, bias)
    optimizers = (("adamw", "loop"), ("adamw", "foreach"), ("adamw", "fused"), ("adamw", "bundled"), ("sgd", "bundled"))
    optimizer, implementation = optimizers[turn % 5]
    recipes = choices(Plan)
    # tf32 differs in time only, bf16-fsdp takes several processes
    precision = rng.choice(("fp32", "fp32", *(x for x in recipes["precision"] if x not in ("tf32", "bf16-fsdp"))))
    checkpointing = rng.choice(recipes["checkpointing"][1:]) if turn // 10 % 2 else "none"
    p = Plan(
        batch_size=B,
        seq_len=T,
        precision=precision,
        fp32_gradients=precision == "bf16-master" and rng.random() < 0.5,
        attention=(("naive", "naive-fp32"), ("sdpa", "sdpa-math"))[turn // 5 % 2][turn // 20 % 2],
        dropout=rng.choice((0.0, 0.0, 0.1)),
        loss=rng.choice(recipes["loss"]),
        checkpointing=checkpointing,
        checkpoint_every=rng.choice((1, 2)) if checkpointing != "none" else 1,
        optimizer=optimizer,
        optimizer_impl=implementation,
        grad_accumulation=rng.choice((1, 1, 2, 3)),
        max_grad_norm=rng.choice((None, None, 1.0)),
    )
    return m.replace(sliding_window=rng.choice((None, None, rng.randint(1, T)))), p


def describe(m: ModelConfig, p: Plan) -> str:
    """A case in a line."""
    run = f"B{p.batch_size} T{p.tokens(m)}"
    sizes = f"{run} L{m.num_layers} d{m.d_model} h{m.num_heads} k{m.num_kv_heads} e{m.e}"
    sizes += f" f{m.d_ff}" if m.d_ff else ""
    sizes += f" E{m.num_experts} K{m.experts_per_token} f_e{m.d_expert}" if m.num_experts else ""
    sizes += f" window {m.sliding_window}" if m.sliding_window else ""
    recipe = f"{p.precision}{' fp32 gradients' if p.fp32_gradients else ''} {p.attention} {p.checkpointing}"
    recipe = f"{recipe}{f' every {p.checkpoint_every}' if p.checkpoint_every > 1 else ''} {p.loss}"
    recipe = f"{recipe} {p.optimizer}-{p.optimizer_impl} x{p.grad_accumulation}"
    extra = f"{' dropout' if p.dropout else ''}{' clip' if p.max_grad_norm else ''}"
    return f"{m.family} {sizes} V{m.vocab_size} {recipe}{extra}"


def validate(chosen: Sequence[tuple[ModelConfig, Plan]], device: str, console: Console) -> list[list[Row]]:
    """The rows of each case, with a progress bar."""
    out = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("real training steps", total=len(chosen))
        for i, (m, p) in enumerate(chosen):
            out.append(compare(m, p, device, i))
            progress.advance(task)
    return out


def report(chosen: Sequence[tuple[ModelConfig, Plan]], rows: Sequence[Sequence[Row]], console: Console) -> int:
    """Print a table a quantity and every case that differs; returns the number of exact figures that differ."""
    import torch  # noqa: PLC0415 - which --published does without

    table = Table(title=f"estimate against PyTorch {torch.__version__}, {len(chosen)} configurations")
    for name in ("quantity", "measured", "exact", "sum of estimates", "sum of measurements", "greatest difference"):
        table.add_column(name, justify="left" if name == "quantity" else "right", no_wrap=name == "quantity")
    wrong = 0
    for quantity in dict.fromkeys(r.quantity for case in rows for r in case):
        mine = [r for case in rows for r in case if r.quantity == quantity and r.difference is not None]
        bad = [r for r in mine if r.difference]
        wrong += len(bad) if quantity in QUANTITIES else 0
        greatest = max((abs(r.difference or 0) for r in mine), default=0)
        sums = (sum(r.estimate for r in mine), sum(r.measurement or 0 for r in mine))
        table.add_row(quantity, *(f"{x:,}" for x in (len(mine), len(mine) - len(bad), *sums, greatest)))
    console.print(table)
    for (m, p), case in zip(chosen, rows, strict=True):
        for r in case:
            if r.difference and r.quantity in QUANTITIES:
                figures = f"{r.estimate:,} != {r.measurement:,} ({r.difference:+,})"
                console.print(f"[red]{describe(m, p)}: {r.quantity} {figures}")
    return wrong


def to_json(chosen: Sequence[tuple[ModelConfig, Plan]], rows: Sequence[Sequence[Row]], device: str) -> dict[str, Any]:
    """Everything that was found, with where and when."""
    import torch  # noqa: PLC0415 - which --published does without

    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cases": [
            {
                "model": m.to_dict(),
                "plan": p.to_dict(),
                "figures": {r.quantity: {"estimate": r.estimate, "measurement": r.measurement} for r in case},
            }
            for (m, p), case in zip(chosen, rows, strict=True)
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if every exact figure is equal, 1 if one is not, 2 for bad arguments."""
    return guarded("validate-estimates", lambda: _answer(sys.argv[1:] if argv is None else list(argv)))


def _answer(argv: list[str]) -> int:
    if "--published" in argv:
        return published_report.main([word for word in argv if word != "--published"])
    if "--import" in argv:
        return device.main([word for word in argv if word != "--import"])
    if "--time" in argv and find_spec("torch") is not None:
        from trainer.referee import validate_time  # noqa: PLC0415 - which needs torch

        return validate_time.main([word for word in argv if word != "--time"])
    parser = argparse.ArgumentParser(
        prog="validate-estimates",
        description="Run real training steps and hold every estimate against what PyTorch did.",
        allow_abbrev=False,
    )
    parser.add_argument("--cases", type=int, default=20, help="configurations of each family (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the random shapes (default: %(default)s)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--published", action="store_true", help="predicted time against published runs (no torch)")
    parser.add_argument(
        "--import", action="store_true", dest="imported", help="a file of tools/device_check.py beside its predictions"
    )
    parser.add_argument("--time", action="store_true", help="predicted against measured seconds, after `calibrate`")
    args = parser.parse_args(argv)
    console = Console()
    if args.cases < 1:
        parser.error(f"--cases = {args.cases}: must be at least 1")
    if find_spec("torch") is None:
        parser.error("torch is missing: pip install 'transformer-estimator[trainer]'")
    import torch  # noqa: PLC0415 - which --published does without

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device = cuda: this PyTorch sees no CUDA device; allowed here is cpu")
    try:
        chosen = list(cases(args.cases, args.seed))
        rows = validate(chosen, args.device, console)
    except ConfigError as error:
        parser.error(str(error))
    wrong = report(chosen, rows, console)
    if args.json:
        args.json.write_text(
            json.dumps(to_json(chosen, rows, args.device), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
    measured = sum(r.difference is not None and r.quantity in QUANTITIES for case in rows for r in case)
    console.print(f"{measured - wrong} of {measured} figures are equal to the last byte and FLOP")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
