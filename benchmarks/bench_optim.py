"""Our AdamW against torch.optim.AdamW at 100 million parameters.

    python benchmarks/bench_optim.py [--parameters 100000000] [--repeats 7] [--shapes flat|gpt2] [--slices]

All step the same parameters and gradients by turns in one run; ratios are of medians. `--slices` adds our Lion with
several sizes of the CPU's slice.
"""

from __future__ import annotations

import argparse

import torch
from alternate import alternate, report

import trainer.optim.optimizers
from trainer.optim.optimizers import AdamW, Lion


def shapes(kind: str, total: int) -> list[tuple[int, ...]]:
    """One flat tensor, or blocks of GPT-2 small's matrices and vectors until there are `total` elements."""
    if kind == "flat":
        return [(total,)]
    d = 768
    block = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,), (d,), (d,)]
    size = sum(torch.Size(shape).numel() for shape in block)
    return block * round(total / size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shapes", choices=("flat", "gpt2"), default="gpt2")
    parser.add_argument("--slices", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes(arguments.shapes, arguments.parameters)]
    for p in ps:
        p.grad = torch.randn_like(p)

    def sliced(elements):
        optimizer = Lion(ps)

        def run():
            usual, trainer.optim.optimizers.CPU_SLICE = trainer.optim.optimizers.CPU_SLICE, elements
            optimizer.step()
            trainer.optim.optimizers.CPU_SLICE = usual

        return run

    candidates = {
        "torch loop": torch.optim.AdamW(ps, foreach=False).step,
        "torch foreach": torch.optim.AdamW(ps, foreach=True).step,
        "torch fused": torch.optim.AdamW(ps, fused=True).step,
        "trainer.AdamW": AdamW(ps).step,
    }
    if arguments.slices:
        candidates |= {f"Lion, slice 2**{k}": sliced(2**k) for k in range(14, 23)}
    count = sum(p.numel() for p in ps)
    print(f"AdamW step, {count:,} parameters in {len(ps)} tensors, {arguments.threads} threads")
    times = alternate(candidates, arguments.repeats)
    for base in ("torch loop", "torch foreach", "torch fused"):
        report(times, base)


if __name__ == "__main__":
    main()
