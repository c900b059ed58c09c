"""What each part of the time model is worth: the judge's errors with it switched off alone.

python -m estimator.studies.ablation     (the table of docs/time.md)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from estimator.hardware.accelerators import accelerator
from estimator.studies.published import Judged, overall_of, predict
from estimator.studies.runs import rows, runs
from estimator.timing.roofline import Efficiency, efficiency

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.studies.runs import Run


@dataclass(frozen=True)
class Part:
    """A part of the model: its name, what stands in its place, and how that is done."""

    name: str
    instead: str
    change: Callable[[Run, Efficiency], tuple[Run, Efficiency]]


def _setup(run: Run, **changes: object) -> Run:
    return replace(run, setup=replace(run.setup, **changes))  # type: ignore[arg-type]


def _variant(run: Run, **changes: object) -> Run:
    return _setup(run, variant=replace(run.setup.variant, **changes))  # type: ignore[arg-type]


def _plans(run: Run, **changes: object) -> Run:
    return replace(run, plans=tuple(plan.replace(**changes) for plan in run.plans))


def _carried_over(run: Run, e: Efficiency) -> tuple[Run, Efficiency]:
    """H100's products at what B200's sweep keeps of its best, in A100's tiles: before its own were published."""
    if accelerator(run.accelerator).architecture != "hopper":
        return run, e
    best = {r["accelerator"]: float(r["efficiency"].rstrip("%")) / 100 for r in rows("mamf") if r["dtype"] == "bf16"}
    b200, a100 = efficiency(accelerator("b200-180gb-sxm")), efficiency(accelerator("a100-80gb-pcie"))
    area = max(m * n for m, n in e.tiles)
    kept = b200.matmul * area / (area + b200.tile_cost) / best["NVIDIA B200 SXM"]
    matmul = kept * best["NVIDIA H100 SXM"] * (area + a100.tile_cost) / area
    like = {name: getattr(a100, name) for name in ("depth", "tile_cost", "quantised")}
    return run, replace(e, matmul=matmul, **like)


PARTS = (
    Part(
        "the network as stated or assumed",
        "the card's typical one",
        lambda run, e: (_setup(run, network=accelerator(run.accelerator).inter_node_bandwidth), e),
    ),
    Part("the slowest accelerator", "all alike", lambda run, e: (_setup(run, deviation=0.0), e)),
    Part("whether gradients overlap", "they always do", lambda run, e: (_setup(run, overlap=True), e)),
    Part(
        "who shares the optimizer's states",
        "all, and all parameters go together",
        lambda run, e: (_setup(run, update_group=None, whole_updates=False), e),
    ),
    Part("a hop between nodes", "as inside one", lambda run, e: (_setup(run, latency=e.latency), e)),
    Part("dropout and clipping as stated", "neither", lambda run, e: (_plans(run, dropout=0.0, max_grad_norm=None), e)),
    Part("attention by generation", "the card's default", lambda run, e: (_setup(run, attention=None), e)),
    Part("how kernels walk their operands", "bytes alone", lambda run, e: (run, replace(e, walk={}, slower={}))),
    Part("norms and rotation in fp32", "16 bits", lambda run, e: (_variant(run, wide=frozenset()), e)),
    Part("fused by hand, a module a kernel", "as a compiler", lambda run, e: (_variant(run, by_hand=False), e)),
    Part("SwiGLU in two kernels", "fused", lambda run, e: (_variant(run, apart=frozenset()), e)),
    Part("H100's own products", "carried over from B200", _carried_over),
    Part("rows at odd places", "as aligned ones", lambda run, e: (run, replace(e, unaligned=1.0))),
    Part("the host", "no host", lambda run, e: (run, replace(e, host=0.0, checkpoint=0.0))),
    Part("the gap between kernels", "no gap", lambda run, e: (run, replace(e, gap=0.0))),
    Part("what hidden messages cost", "nothing", lambda run, e: (run, replace(e, contention=0.0))),
)


def without(part: Part) -> list[Judged]:
    """Every run predicted without a part."""
    found = []
    for run in runs():
        changed, e = part.change(run, efficiency(accelerator(run.accelerator)))
        found.append(predict(changed, e))
    return found


def table() -> str:
    """The mean over stacks with each part switched off alone, as Markdown."""
    whole = overall_of(predict(run) for run in runs())
    header = "| without | instead | mean of medians | mean of 90th percentiles | bias | the stack it moves most |\n"
    lines = [
        header + "|---|---|---:|---:|---:|---|\n",
        f"| nothing | | {whole[0].median:.1%} | {whole[0].percentile_90:.1%} | {whole[0].bias:+.1%} | |\n",
    ]
    for part in PARTS:
        mean, each = overall_of(without(part))
        moved = {s.group: s.bias - next(x.bias for x in whole[1] if x.group == s.group) for s in each}
        most = max(moved, key=lambda stack: abs(moved[stack]))
        said = f"{most}: {moved[most]:+.1%}" if not np.isclose(moved[most], 0, atol=5e-4) else "none"
        errors = f"{mean.median:.1%} | {mean.percentile_90:.1%} | {mean.bias:+.1%}"
        lines.append(f"| {part.name} | {part.instead} | {errors} | {said} |\n")
    return "".join(lines)


def main() -> int:
    """Print the table."""
    sys.stdout.write(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
