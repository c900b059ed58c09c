"""estimate layouts: how to lay a run out on so many accelerators, the fastest way first."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import settings
from estimator.describe.units import GIB
from estimator.show.cli import model_of, parser
from estimator.show.formatting import STRATEGIES, dollars, duration, in_columns

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from estimator.answers.found_layouts import Layouts, Option
    from estimator.describe.model import ModelConfig

ROWS = 12
HEADER = ("", "layout", "micro-batch", "checkpointing", "step", "tokens/s each", "MFU", "needs", "free",
          "$ / 1e9 tokens", "bound by", "behind the first by")  # fmt: skip
LEFT = (0, 1, 3, 10, 11)


def run(argv: Sequence[str]) -> int:
    """`estimate layouts MODEL --gpu NAME --count N --global-batch-size N ...`.

    Raises:
        ConfigError: what is asked cannot be.
    """
    args = _parser().parse_args(argv)
    from estimator.answers.layouts import AXES, LAID_OUT, MEGATRON, search  # noqa: PLC0415 - sympy, which --help does without

    for name in ("count", "global_batch_size"):
        if getattr(args, name) is None:
            raise ConfigError(f"{name} is missing: give --{name.replace('_', '-')} N")
    given = {name: value for name in settings(Plan) if (value := getattr(args, name)) is not None}
    given.pop("data_parallel", None)  # --count says it
    base = MEGATRON if given.get("implementation") == "megatron" else LAID_OUT
    plan = base.replace(**{name: x for name, x in given.items() if name not in ("sharding", "shard_group")})
    several = {name: given[name] for name in ("sharding", "shard_group") if name in given}
    if several and args.count > 1:
        plan = plan.replace(data_parallel=args.count, **several)
    found = search(
        model_of(args),
        plan,
        args.gpu,
        count=args.count,
        global_batch_size=args.global_batch_size,
        fixed=[name for name in AXES if name in given],
        network=Run(network=args.network).network,
        price=args.price,
        progress=_progress if sys.stderr.isatty() else lambda _: None,
    )
    if args.json:
        json.dump(found.to_dict(), sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(said(found, args.count, args.gpu, args.rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    p = parser()
    p.prog = "estimate layouts"
    p.description = (
        "Every tensor and context parallelism within a node, pipeline, sharing of experts, sharding, group of shards, "
        "micro-batch and checkpointing on so many accelerators that fits, the fastest first. Those that are given as "
        "options stay as they are. Defaults "
        "are bf16, fused attention and optimizer, no clipping; with --implementation megatron those of Megatron-LM."
    )
    p.add_argument("--rows", type=int, default=ROWS, help="rows to print (default: %(default)s)")
    return p


def command(
    name: str, model: ModelConfig, plan: Plan, gpu: str, count: int, sequences: int, price: float | None
) -> str:
    """The command that prints the layouts of `plan`, `LAID_OUT` or `MEGATRON` with a length of its own."""
    from estimator.answers.request import Request  # noqa: PLC0415 - sympy, which --help does without

    given = plan if plan.implementation == "megatron" else Plan(seq_len=plan.seq_len)  # which says with what it goes
    asked = Request(name, model, given, gpu, count, global_batch_size=sequences).command()
    paid = "" if price is None else f" --price {price:g}"
    return asked.replace("estimate ", "estimate layouts ", 1) + paid


def _progress(done: float) -> None:
    sys.stderr.write(f"\r{done:4.0%} of the layouts" if done < 1 else "\r" + " " * 24 + "\r")
    sys.stderr.flush()


BESIDE = (
    "With tensor parallel, tokens are cut between the shared matrices and, where that can be, embedding and head are "
    "shared too (sequence_parallel, vocabulary_parallel)."
)


def said(found: Layouts, count: int, gpu: str, rows: int = ROWS) -> str:
    """The answer in a sentence, a row for each layout, and what was assumed and left out."""
    if not found.options:
        where = f"the least number on which it does is {found.smallest:,}" if found.smallest else "nor on any number"
        lines = [f"No layout fits on {count:,} x {Path(gpu).stem}; {where}.", ""]
    else:
        first = found.options[0]
        way = f"{layout(first)}, micro-batch {first.plan.batch_size}, checkpointing {first.plan.checkpointing}"
        speed = f"{duration(first.seconds)} a step, MFU {first.mfu:.0%}"
        lines = [f"Fastest of {len(found.options):,} that fit: {way}: {speed}."]
        least = (
            ""
            if found.smallest is None
            else f"The least number of accelerators on which it fits is {found.smallest:,}."
        )
        lines += [least, ""] if least else [""]
        table = [HEADER, *(row(o, first) for o in found.options[:rows])]
        lines += in_columns(table, LEFT)
        more = len(found.options) - rows
        lines += ["", "* no other is both faster and leaves more room."]
        lines += [f"{more} more: --rows."] if more > 0 else []
    if any(o.plan.sequence_parallel for o in found.options):
        lines.append(BESIDE)
    lines.append(f"Assumed: {found.network}.")
    if found.refused:
        total = sum(found.refused.values())
        top = sorted(found.refused.items(), key=lambda entry: -entry[1])[:4]
        lines.append(f"Left out: {total:,}; {'; '.join(f'{n:,} {why}' for why, n in top)}.")
    return "\n".join(lines) + "\n"


def layout(o: Option) -> str:
    """Tensor parallelism, the sharding, and of groups how many accelerators each has."""
    p = o.plan
    tensor = [f"tensor parallel {p.tensor_parallel}"] if p.tensor_parallel > 1 else []
    tensor += [f"pipeline of {p.pipeline_parallel}"] if p.pipeline_parallel > 1 else []
    tensor += [f"context parallel {p.context_parallel}"] if p.context_parallel > 1 else []
    tensor += [f"expert parallel {p.expert_parallel}"] if p.expert_parallel > 1 else []
    if p.copies == 1:
        return " x ".join(tensor) or "alone"
    groups = f" in {p.replicas} groups of {p.shards}" if p.shard_group and p.replicas > 1 else ""
    return " x ".join([*tensor, f"{STRATEGIES[p.sharding]}{groups}"])


def row(o: Option, first: Option) -> tuple[str, ...]:
    """A layout as cells under `HEADER`."""
    p = o.plan
    return (
        "*" if o.best else "",
        layout(o),
        f"{p.batch_size} x {p.grad_accumulation}",
        p.checkpointing,
        duration(o.seconds),
        f"{o.tokens_per_second:,.0f}",
        f"{o.mfu:.1%}",
        f"{o.needed / GIB:.1f} GiB",
        f"{o.headroom / GIB:.1f} GiB",
        "-" if o.dollars is None else dollars(o.dollars),
        o.bound,
        o.behind(first) or "-",
    )
