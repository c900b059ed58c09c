"""How far the predicted time is from the training runs that others published: by stack, the worst rows, a plot.

A stack is a source, a card and the software: its runs share what nobody wrote down, so that many runs of one stack say
little more than a few. Each stack weighs the same, however many runs it has.

    validate-estimates --published     (or python -m estimator.studies.published)

Needs no torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

from estimator.studies.runs import NAMES, SOURCES, Run, left_out, runs
from estimator.timing.speed import regime, step_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from estimator.timing.roofline import Efficiency

SIX = 6  # rows of a stack, of which three calibrate the rest
ENOUGH = 20  # runs on an architecture whose 5th and 95th percentile mean something
HEADER = "| stack | runs | count as | median error | 90th percentile | bias |\n|---|---:|---:|---:|---:|---:|\n"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")


@dataclass(frozen=True, slots=True)
class Judged:
    """A run beside its prediction, tokens per second of one accelerator, and what most of its time goes to."""

    run: Run
    predicted: float
    regime: str

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.run.measured - 1


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of a group of runs: absolute ones at the median and the 90th percentile, and the signed median.

    `independent`: as how many independent measurements the runs count.
    """

    group: str
    count: int
    independent: float
    median: float
    percentile_90: float
    bias: float


def predict(run: Run, e: Efficiency | None = None) -> Judged:
    """The run with its prediction; `e` in place of what its accelerator's kernels reach."""
    each = [step_times(run.model, p, run.accelerator, run.setup, e) for p in run.plans]
    parts = {name: sum(float(of[name][0]) for of in each) for name in each[0]}
    tokens = run.plan.batch_size * run.plan.tokens(run.model) * run.plan.grad_accumulation
    return Judged(run, tokens * len(each) / sum(parts.values()), regime(parts))


@cache
def judged() -> tuple[Judged, ...]:
    """Every published run with its prediction."""
    return tuple(predict(run) for run in runs())


def summary(of: Iterable[Judged], group: str) -> Summary:
    """The errors of some runs together; there must be at least one."""
    members = list(of)
    errors, weights = np.array([j.error for j in members]), np.array([j.run.weight for j in members])
    median, most = (_quantile(np.abs(errors), weights, q) for q in (0.5, 0.9))
    return Summary(group, len(members), float(weights.sum()), median, most, _quantile(errors, weights, 0.5))


def grouped(by: Callable[[Judged], str]) -> dict[str, list[Judged]]:
    """The runs by the value of `by`, in the order of first appearance."""
    groups: dict[str, list[Judged]] = {}
    for j in judged():
        groups.setdefault(by(j), []).append(j)
    return groups


def overall_of(judged: Iterable[Judged]) -> tuple[Summary, list[Summary]]:
    """(the means over the stacks, each stack) of some runs: a stack weighs the same, however many runs it has."""
    groups: dict[str, list[Judged]] = {}
    for j in judged:
        groups.setdefault(j.run.stack, []).append(j)
    found = [summary(members, group) for group, members in groups.items()]
    mean = {name: float(np.mean([getattr(s, name) for s in found])) for name in ("median", "percentile_90", "bias")}
    return Summary("mean over stacks", sum(s.count for s in found), sum(s.independent for s in found), **mean), found


def stacks() -> list[Summary]:
    """The errors of each stack."""
    return overall_of(judged())[1]


def overall() -> Summary:
    """The means over the stacks of what each has."""
    return overall_of(judged())[0]


def table() -> str:
    """The errors as a Markdown table: by stack, their mean, and by what most of the time goes to."""
    regimes = grouped(lambda j: j.regime)
    found = [*stacks(), overall(), *(summary(regimes[name], f"all that are {name}") for name in sorted(regimes))]
    return HEADER + "".join(
        f"| {s.group} | {s.count} | {s.independent:.0f} | {s.median:.1%} | {s.percentile_90:.1%} | {s.bias:+.1%} |\n"
        for s in found
    )


def calibrated() -> dict[str, tuple[Summary, list[float]]]:
    """Of each stack of six rows or more: the errors of the rest once three of its rows have given its factor.

    The three are its rows at a quarter, a half and three quarters of the order in which they were published, and the
    factor is the middle of what they take over what was predicted. With the summary come measured over predicted times.
    """
    found = {}
    for stack, members in grouped(lambda j: j.run.stack).items():
        if len(members) < SIX:
            continue
        at = {len(members) * q // 4 for q in (1, 2, 3)}
        factor = float(np.median([1 + members[i].error for i in at]))
        rest = [
            replace(j, predicted=j.predicted / factor) for i, j in enumerate(members) if i not in at
        ]  # a time that many times as long
        found[stack] = summary(rest, stack), [1 + j.error for j in rest]
    return found


def calibrated_table() -> str:
    """Those errors as a Markdown table, beside what they were."""
    before = {s.group: s for s in stacks()}
    lines = [
        "| stack | rows | median error before | after three rows of it | 90th percentile |\n|---|---:|---:|---:|---:|\n"
    ]
    lines += [
        f"| {stack} | {s.count} | {before[stack].median:.1%} | {s.median:.1%} | {s.percentile_90:.1%} |\n"
        for stack, (s, _) in calibrated().items()
    ]
    return "".join(lines)


def missing() -> str:
    """The published rows that no plan describes, as a Markdown table."""
    lines = ["| source | rows left out | why |\n|---|---:|---|\n"]
    for source, reasons in left_out().items():
        lines += [f"| {source} | {count} | {reason} |\n" for reason, count in reasons.items()]
    return "".join(lines)


def worst(count: int = 10) -> tuple[Judged, ...]:
    """The runs that are predicted worst."""
    return tuple(sorted(judged(), key=lambda j: -abs(np.log1p(j.error)))[:count])


def worst_rows(count: int = 10) -> str:
    """Those runs as a Markdown table."""
    lines = ["| stack | model | T | B | accelerators | tokens/s measured | predicted | error |\n"]
    lines.append("|---|---|---:|---:|---|---:|---:|---:|\n")
    for j in worst(count):
        r = j.run
        sizes = f"{r.row['model']} {r.model.num_layers} x {r.model.d_model}"
        lines.append(
            f"| {r.stack} | {sizes} | {r.plan.tokens(r.model):,} | {r.plan.batch_size} "
            f"| {r.plan.data_parallel} | {r.measured:,.0f} | {j.predicted:,.0f} | {j.error:+.1%} |\n"
        )
    return "".join(lines)


def report(count: int = 10) -> str:
    """Everything that the command prints and writes, in Markdown."""
    return (
        f"Predicted tokens per second against {len(judged())} published training runs of {len(stacks())} stacks; no "
        f"efficiency was fitted to them. Each stack weighs the same.\n\n{table()}\nThe worst rows:\n\n"
        f"{worst_rows(count)}\nWith a factor from three rows of each stack of six or more (`estimate calibrate --log`):"
        f"\n\n{calibrated_table()}\nPublished rows that no plan describes:\n\n{missing()}"
    )


def records() -> list[dict[str, Any]]:
    """One flat record a run, for a file."""
    return [
        {
            "source": j.run.row["source"],
            "stack": j.run.stack,
            "model": j.run.row["model"],
            "accelerator": j.run.accelerator,
            "accelerators": j.run.plan.data_parallel,
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

    By regime where there are enough runs in it, and over all. Each stack weighs the same, so that the many runs of one
    do not speak for the others.
    """
    groups = {name: members for name, members in grouped(lambda j: j.regime).items() if len(members) >= ENOUGH}
    groups["all"] = list(judged())
    how = "`python -m estimator.studies.published --residuals`"
    lines = [f"# Measured time over predicted, 5th and 95th percentile: {how}.\n"]
    for name, members in groups.items():
        shares = Counter[str]()
        for j in members:
            shares[j.run.stack] += j.run.weight  # type: ignore[assignment]
        ratios = np.array([1 + j.error for j in members])  # of times, the inverse of that of tokens per second
        weights = np.array([j.run.weight / shares[j.run.stack] for j in members])
        low, high = (_quantile(ratios, weights, q) for q in (0.05, 0.95))
        files = Counter(j.run.stack for j in members)
        kind = "" if name == "all" else f" {name}"
        said = f"Errors on {len(members)}{kind} published runs of {len(files)} stacks: {'; '.join(sorted(files))}."
        rows = json.dumps(said, allow_nan=False)
        lines.append(f"\n[{name}]\nlow = {min(low, 1):.3f}\nhigh = {max(high, 1):.3f}\nrows = {rows}\n")
    kept = calibrated()
    ratios = np.array([x for _, of in kept.values() for x in of])
    weights = np.array([1 / len(of) for _, of in kept.values() for _ in of])
    low, high = (_quantile(ratios, weights, q) for q in (0.05, 0.95))
    said = f"{len(ratios)} published runs of {len(kept)} stacks, once three others of the stack gave its factor."
    rows = json.dumps(said, allow_nan=False)
    lines.append(f"\n[calibrated]\nlow = {min(low, 1):.3f}\nhigh = {max(high, 1):.3f}\nrows = {rows}\n")
    return "".join(lines)


def _quantile(values: NDArray[np.float64], weights: NDArray[np.float64], q: float) -> float:
    """The value below which a part `q` of the weights lies, half of a value's own included."""
    order = np.argsort(values)
    shares = weights[order] / weights.sum()
    below = np.cumsum(shares) - shares / 2
    return float(np.interp(q, below, values[order]))


WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 660, 480, 84, 48, 36


def plot() -> str:
    """Predicted against measured tokens per second as SVG, both axes logarithmic, one colour a source."""
    found = judged()
    values = [x for j in found for x in (j.run.measured, j.predicted)]
    low, high = np.floor(np.log10(min(values))), np.ceil(np.log10(max(values)))

    def x(tokens: float) -> float:
        return LEFT + (np.log10(tokens) - low) / (high - low) * (WIDTH - LEFT - MARGIN)

    def y(tokens: float) -> float:
        return HEIGHT - BOTTOM - (np.log10(tokens) - low) / (high - low) * (HEIGHT - BOTTOM - MARGIN)

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    least, most = 10**low, 10**high
    box = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {box}><title>Predicted against measured tokens per second</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(int(low), int(high) + 1):
        at = 10.0**power
        grid = 'stroke="#dddddd"'
        parts += [line(x(at), y(least), x(at), y(most), grid), line(x(least), y(at), x(most), y(at), grid)]
        parts.append(f'<text x="{x(at):.1f}" y="{y(least) + 18:.1f}" text-anchor="middle">{at:,.0f}</text>')
        parts.append(f'<text x="{x(least) - 6:.1f}" y="{y(at) + 4:.1f}" text-anchor="end">{at:,.0f}</text>')
    parts.append(line(x(least), y(least), x(most), y(most), 'stroke="black"'))
    for factor in (0.8, 1.25):
        ends = (max(least, least / factor), min(most, most / factor))
        dashed = 'stroke="#888888" stroke-dasharray="4 4"'
        parts.append(line(x(ends[0]), y(ends[0] * factor), x(ends[1]), y(ends[1] * factor), dashed))
    colour = dict(zip(SOURCES, COLOURS, strict=False))
    for j in found:
        text = f"{j.run.row['model']} on {j.run.accelerator}: {j.run.measured:,.0f}, predicted {j.predicted:,.0f}"
        parts.append(
            f'<circle cx="{x(j.run.measured):.1f}" cy="{y(j.predicted):.1f}" r="3.5" fill="{colour[j.run.source]}" '
            f'fill-opacity="0.6"><title>{escape(text)}</title></circle>'
        )
    for turn, (source, name) in enumerate(NAMES.items()):
        at_y = MARGIN + 18 + 18 * turn
        parts.append(f'<circle cx="{LEFT + 16}" cy="{at_y - 4}" r="4" fill="{colour[source]}"/>')
        parts.append(f'<text x="{LEFT + 26}" y="{at_y}">{escape(name)}</text>')
    middle = (LEFT + WIDTH - MARGIN) / 2
    parts.append(
        f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">measured, tokens/s of one accelerator</text>'
    )
    up = (HEIGHT - BOTTOM + MARGIN) / 2
    parts.append(
        f'<text transform="translate(12 {up}) rotate(-90)" text-anchor="middle">predicted (dashed: 25 %)</text>'
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


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
    parser.add_argument("--residuals", action="store_true", help="print estimator/data/residuals.toml, and stop")
    args = parser.parse_args(argv)
    if args.residuals:
        sys.stdout.write(residuals())
        return 0
    if args.worst < 1:
        parser.error(f"--worst = {args.worst}: must be at least 1")
    text = report(args.worst)
    sys.stdout.write(text)
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
