"""What is printed and written of the errors on published runs: tables, a file of rows, the spread of the residuals.

    validate-estimates --published     (or python -m estimator.studies.published_report)

Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.studies.published import (
    by_plan,
    calibrated,
    grouped,
    judged,
    overall,
    overall_of,
    quantile,
    stacks,
    summary,
    worst,
)
from estimator.studies.published_plot import plot
from estimator.studies.runs import NAMES, left_out
from estimator.timing.intervals import FEW, PLAN, REGIMES, STATED, spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from estimator.studies.published import Judged

SEVERAL = 3  # stacks of a regime, for it not to be one stack's own
ENOUGH = 20  # runs of a regime whose 5th and 95th percentile mean something
HEADER = "| stack | runs | count as | median error | 90th percentile | bias |\n|---|---:|---:|---:|---:|---:|\n"


def table() -> str:
    """The errors as a Markdown table: by stack, their mean, and by what most of the time goes to."""
    regimes = grouped(lambda j: j.regime)
    found = [*stacks(), overall(), *(summary(regimes[name], f"all that are {name}") for name in sorted(regimes))]
    return HEADER + "".join(
        f"| {s.group} | {s.count} | {s.independent:.0f} | {s.median:.1%} | {s.percentile_90:.1%} | {s.bias:+.1%} |\n"
        for s in found
    )


def plain() -> str:
    """A sentence: the same by the plan alone."""
    mean = overall_of(by_plan())[0]
    return (
        "By the plan alone, without what a source says of its attention kernel, its fused kernels, its fp32 and its "
        f"network, the mean of the medians is {mean.median:.1%} and of the 90th percentiles {mean.percentile_90:.1%}: "
        "the interval of an estimate is of that kind unless those are given.\n"
    )


def calibrated_table() -> str:
    """Those errors as a Markdown table, beside what they were."""
    names = ["stack", "rows", "median error before", "any three: middle", "ninth of ten", "within the interval"]
    names += ["at a quarter, half, three quarters", "90th percentile", "the most telling three", "best one factor"]
    lines = [f"| {' | '.join(names)} |\n|---{'|---:' * (len(names) - 1)}|\n"]
    lines += [
        f"| {stack} | {c.errors.count} | {c.before:.1%} | {c.others[0]:.1%} | {c.others[1]:.1%} | {c.covered:.0%} "
        f"| {c.errors.median:.1%} | {c.errors.percentile_90:.1%} | {c.telling:.1%} | {c.one_factor:.1%} |\n"
        for stack, c in calibrated().items()
    ]
    return "".join(lines)


def missing() -> str:
    """The published rows that no plan describes, as a Markdown table."""
    lines = ["| source | rows left out | why |\n|---|---:|---|\n"]
    for source, reasons in left_out().items():
        lines += [f"| {source} | {count} | {reason} |\n" for reason, count in reasons.items()]
    return "".join(lines)


def worst_rows(count: int = 10) -> str:
    """Those runs as a Markdown table."""
    lines = ["| stack | model | T | B | accelerators | tokens/s measured | predicted | error |\n"]
    lines.append("|---|---|---:|---:|---|---:|---:|---:|\n")
    for j in worst(count):
        r = j.run
        sizes = f"{r.row['model']} {r.model.num_layers} x {r.model.d_model}"
        lines.append(
            f"| {r.stack} | {sizes} | {r.plan.tokens(r.model):,} | {r.plan.batch_size} "
            f"| {r.plan.accelerators} | {r.measured:,.0f} | {j.predicted:,.0f} | {j.error:+.1%} |\n"
        )
    return "".join(lines)


def layouts() -> str:
    """The runs in Megatron's layouts as a Markdown table: seconds of a step as published and as predicted."""
    lines = ["| source | model | accelerators | layout | recomputed | step measured | predicted | error in time |\n"]
    lines.append("|---|---|---:|---|---|---:|---:|---:|\n")
    for j in judged():
        r, p = j.run, j.run.plan
        if p.implementation != "megatron":
            continue
        seconds = r.tokens / r.measured
        axes = [f"tensor {p.tensor_parallel}", f"pipeline {p.pipeline_parallel}", f"data {p.data_parallel}"]
        axes += [f"{p.virtual_stages} parts a stage"] if p.virtual_stages > 1 else []
        axes += ["sequence parallel"] if p.sequence_parallel else []
        kept = {"block": "all", "selective": "attention's core"}[p.checkpointing]
        lines.append(
            f"| {NAMES[r.source]}, {r.software} | {r.row['model']} | {p.accelerators:,} | {', '.join(axes)} | {kept} "
            f"| {seconds:.2f} s | {seconds * (1 + j.error) ** -1:.2f} s | {1 / (1 + j.error) - 1:+.1%} |\n"
        )
    return "".join(lines)


def report(count: int = 10) -> str:
    """Everything that the command prints and writes, in Markdown."""
    return (
        f"Predicted tokens per second against {len(judged())} published training runs of {len(stacks())} stacks; no "
        f"efficiency was fitted to them. Each stack weighs the same.\n\n{table()}\n{plain()}\nThe worst rows:\n\n"
        f"{worst_rows(count)}\nWith factors by part from three rows of each stack of six or more (`estimate calibrate "
        f"--log`):\n\n{calibrated_table()}\nPublished rows that no plan describes:\n\n{missing()}"
    )


def records() -> list[dict[str, Any]]:
    """One flat record a run, for a file."""
    return [
        {
            "source": j.run.row["source"],
            "stack": j.run.stack,
            "model": j.run.row["model"],
            "accelerator": j.run.accelerator,
            "accelerators": j.run.plan.accelerators,
            "seq_len": j.run.plan.tokens(j.run.model),
            "batch_size": j.run.plan.batch_size,
            "measured": j.run.measured,
            "predicted": j.predicted,
            "regime": j.regime,
            "error": j.error,
        }
        for j in judged()
    ]


def residuals() -> str:
    """`data/residuals.toml`: between which factors on the predicted time nine published runs of ten lie.

    With what the sources state, and by the plan alone; by regime where there are enough runs in it, and over all. Each
    stack weighs the same, so that the many runs of one do not speak for the others. Of a regime with fewer: all of
    them.
    """
    how = "`python -m estimator.studies.published_report --residuals`"
    lines = [f"# Measured time over predicted, 5th and 95th percentile: {how}.\n"]
    for name_of, runs, how in (
        (STATED, judged(), ", their recipes as stated"),
        (PLAN, by_plan(), " by the plan alone"),
    ):
        of_regime = grouped(lambda j: j.regime, runs)
        enough = {name for name, of in of_regime.items() if len(of) >= ENOUGH and len(_stacks(of)) >= SEVERAL}
        for name, members in {**{x: of_regime[x] for x in of_regime if x in enough}, "all": list(runs)}.items():
            shares = Counter[str]()
            for j in members:
                shares[j.run.stack] += j.run.weight  # type: ignore[assignment]
            ratios = np.array([1 + j.error for j in members])  # of times, the inverse of that of tokens per second
            weights = np.array([j.run.weight / shares[j.run.stack] for j in members])
            low, high = (quantile(ratios, weights, q) for q in (0.05, 0.95))
            kind = "" if name == "all" else f" {name}"
            said = (
                f"Errors on {len(members)}{kind} published runs of {len(shares)} stacks{how}, listed in "
                "validation/published.md."
            )
            rows = json.dumps(said, allow_nan=False)
            lines.append(f"\n[{name_of}.{name}]\nlow = {min(low, 1):.3f}\nhigh = {max(high, 1):.3f}\nrows = {rows}\n")
        for name in (x for x in REGIMES if x in of_regime and x not in enough):
            ratios = np.array([1 + j.error for j in of_regime[name]])
            low, high = ratios.min(), ratios.max()
            of_stacks = _stacks(of_regime[name])
            said = (
                f"{len(ratios)} of them {'is' if len(ratios) == 1 else 'are'} {name}, of {len(of_stacks)} "
                f"stack{'s' if len(of_stacks) > 1 else ''}, "
                + (f"at {low:.2f}" if len(ratios) == 1 else f"between {low:.2f} and {high:.2f}")
                + " of the predicted time: too few for an interval of their own."
            )
            rows = json.dumps(said, allow_nan=False)
            lines.append(f"\n[{name_of}.{FEW}.{name}]\nlow = {low:.3f}\nhigh = {high:.3f}\nrows = {rows}\n")
    return "".join(lines)


def _stacks(of: Iterable[Judged]) -> set[str]:
    return {j.run.stack for j in of}


def coverage() -> str:
    """Which part of the published runs lie within the interval that is given for nine of ten, as a Markdown table.

    By what most of the step goes to, and by how much of it messages and the host take; each stack weighs the same.
    """
    lines = ["| runs | as stated | of stacks | within | by the plan alone | of stacks | within |\n|---|"]
    lines.append("---:|" * 6 + "\n")
    groups: dict[str, Callable[[Judged], bool]] = {name: partial(_is, name) for name in REGIMES}
    for low, high in pairwise((0.0, 0.1, 0.2, 0.3, 1.0)):
        groups[f"messages and host {low:.0%} to {high:.0%} of the step"] = partial(_waits, low, high)
    for name, belongs in groups.items():
        cells = []
        for of, stated in ((judged(), True), (by_plan(), False)):
            members = [j for j in of if belongs(j)]
            cells += [str(len(members)), str(len(_stacks(members))), _within(members, stated=stated)]
        lines.append(f"| {name} | {' | '.join(cells)} |\n")
    return "".join(lines)


def _is(name: str, j: Judged) -> bool:
    return j.regime == name


def _waits(low: float, high: float, j: Judged) -> bool:
    return low <= (j.parts["communication"] + j.parts["launch"]) / sum(j.parts.values()) < high


def _within(members: list[Judged], *, stated: bool) -> str:
    if not members:
        return ""
    count = Counter(j.run.stack for j in members)
    weights = np.array([1 / count[j.run.stack] for j in members])
    ends = [spread(j.parts, stated=stated)[0] for j in members]
    within = np.array([low <= 1 + j.error <= high for j, (low, high) in zip(members, ends, strict=True)])
    return f"{weights @ within / weights.sum():.0%}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command: print the table and the worst rows, and write them and the plot where it is told; 0 when done."""
    parser = argparse.ArgumentParser(
        prog="validate-estimates --published",
        description="How far the predicted time is from the training runs that others published.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write published.md and published.svg to DIR")
    parser.add_argument("--worst", type=int, default=10, metavar="N", help="rows to list (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures to FILE")
    parser.add_argument("--ablation", action="store_true", help="add what each part of the model is worth, off alone")
    parser.add_argument("--residuals", action="store_true", help="print estimator/data/residuals.toml, and stop")
    args = parser.parse_args(argv)
    if args.residuals:
        sys.stdout.write(residuals())
        return 0
    if args.worst < 1:
        parser.error(f"--worst = {args.worst}: must be at least 1")
    text = report(args.worst)
    sys.stdout.write(text)
    if args.ablation:
        from estimator.studies import ablation  # noqa: PLC0415 - only for this

        sys.stdout.write(f"\nEach part switched off alone:\n\n{ablation.table()}")
    try:
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "published.md").write_text(text, encoding="utf-8")
            (args.out / "published.svg").write_text(plot(), encoding="utf-8")
        if args.json:
            args.json.write_text(json.dumps(records(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        parser.error(f"cannot write {error.filename!r}: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
