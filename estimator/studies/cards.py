"""Of each card in the catalogue, which kernels somebody timed on it; the rest is carried over from another.

    python -m estimator.studies.cards     (the table of docs/time.md)

Needs no torch.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from estimator.hardware.accelerators import accelerator, accelerators
from estimator.studies.operators import GPUS
from estimator.studies.runs import rows, runs
from estimator.timing.roofline import efficiency

if TYPE_CHECKING:
    from collections.abc import Mapping

# What the sources call the cards of the catalogue. Left out are names that say no card: "A100 (variant not stated)".
NAMES = {
    "A100 80GB PCIe": "a100-80gb-pcie",
    "A100 80GB SXM": "a100-80gb-sxm",
    "B200 SXM": "b200-180gb-sxm",
    "H100 (sm_90)": "h100-80gb-sxm",
    "H100 SXM": "h100-80gb-sxm",
    "NVIDIA A100 PCIe": "a100-80gb-pcie",
    "NVIDIA A100 SXM": "a100-80gb-sxm",
    "NVIDIA B200 SXM": "b200-180gb-sxm",
    "NVIDIA B300 SXM": "b300-288gb-sxm",
    "NVIDIA GB200 SXM": "gb200-186gb",
    "NVIDIA GH200 SXM": "gh200-144gb",
    "NVIDIA H100 SXM": "h100-80gb-sxm",
    "AMD MI300X": "mi300x-192gb",
    "AMD MI325X": "mi325x-256gb",
    "AMD MI355X": "mi355x-288gb",
    "Intel Gaudi 2": "gaudi2-96gb",
    "Intel Gaudi 3": "gaudi3-128gb",
    "NVIDIA A10G": "a10g-24gb",
    "NVIDIA L4": "l4-24gb",
    "NVIDIA L40S": "l40s-48gb",
    "NVIDIA A40": "a40-48gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb-pcie",
    "NVIDIA H20": "h20-96gb-sxm",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb",
    "NVIDIA GeForce RTX 4090": "rtx-4090-24gb",
    "NVIDIA GeForce RTX 5090": "rtx-5090-32gb",
    "NVIDIA RTX PRO 6000 Workstation": "rtx-pro-6000-96gb",
    "NVIDIA Tesla V100S": "v100s-32gb-pcie",
    "NVIDIA Tesla T4": "t4-16gb",
    "8x A100 SXM NVLink3 single node": "a100-80gb-sxm",
    "8x H200 NVLink4 single node (NVLS on)": "h200-141gb-sxm",
    "1 node(s) x 8 B200 (P6-B200: NVLink5 + 8x50GB/s EFA)": "b200-180gb-sxm",
    "V100 node (NVLink)": "v100-32gb-sxm",
    **GPUS,
}
# Products of 8192 in fp32 and bf16 that tools/fit_efficiency.py has (GEFORCE).
CLOCKED = ("rtx-4090-24gb", "rtx-5090-32gb")
MOVED = ("rtx-5090-32gb",)  # a fused norm, as it has too (MOVED)


@dataclass(frozen=True, slots=True)
class Measured:
    """How many published timings there are on a card: 0 is carried over.

    Attributes:
        products: a sweep of shapes.
        best: the best product that anybody timed.
        attention, operators, links: fused attention, single operators, collectives.
        runs: whole training runs, which judge and are fitted to nothing.
    """

    products: int
    best: int
    attention: int
    operators: int
    links: int
    runs: int

    @property
    def fitted(self) -> bool:
        """Whether any of its kernels or links were timed."""
        return any((self.products, self.best, self.attention, self.operators, self.links))


@cache
def _counts() -> Mapping[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in Measured.__slots__}

    def add(kind: str, name: str) -> None:
        if name in NAMES:
            counts[kind][NAMES[name]] += 1

    for row in rows("gemm_efficiency"):
        add("products" if "matmul" in row["op"] else "attention", row["gpu"])
    for row in rows("mamf"):
        add("best", row["accelerator"] if row["dtype"] == "bf16" else "")
    for row in rows("torch_mm"):
        add("products" if row["size"] else "best", row["gpu"])
    for row in rows("attention_efficiency"):
        add("attention", row["gpu"])
    for row in rows("liger_operators"):
        add("operators", row["gpu_name"] if row["metric_name"] == "speed" else "")
    for row in rows("collectives"):
        add("links", row["system"])
    counts["best"].update(dict.fromkeys(CLOCKED, 1))
    counts["operators"].update(dict.fromkeys(MOVED, 1))
    counts["runs"].update(run.accelerator for run in runs())
    return counts


def measured(id_: str) -> Measured:
    """How many published timings there are on the card `id_` of the catalogue."""
    return Measured(**{kind: counted[id_] for kind, counted in _counts().items()})


def table() -> str:
    """Every card whose time is predicted from kernels, as Markdown, those that are measured first."""
    header = "| card | products | best product | attention | operators | links | runs that judge | carried over |\n"
    known = [id_ for id_ in accelerators() if accelerator(id_).device == "cuda" and accelerator(id_).sm_count]
    found = sorted(((measured(id_), id_) for id_ in known), key=lambda entry: not entry[0].fitted)
    lines = [header + "|---|---:|---:|---:|---:|---:|---:|---|\n"]
    for of, id_ in found:
        figures = (of.products, of.best, of.attention, of.operators, of.links, of.runs)
        absent = [
            name
            for name, count in (
                ("products", of.products or of.best),
                ("attention", of.attention),
                ("other kernels", of.operators),
                ("links", of.links),
            )
            if not count
        ]
        said = "nothing" if not absent else "all" if not of.fitted else ", ".join(absent)
        lines.append(f"| {id_} | {' | '.join(str(x) if x else '' for x in figures)} | {said} |\n")
    return "".join(lines)


def main() -> int:
    """Print the table, and of each card where its efficiencies come from."""
    sys.stdout.write(table())
    for id_ in accelerators():
        if accelerator(id_).device == "cuda":
            sys.stdout.write(f"\n{id_}: {efficiency(accelerator(id_)).origin}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
