"""Our cross entropy against F.cross_entropy, forward and backward: time and peak memory.

    python benchmarks/bench_loss.py [--rows 4096] [--vocabulary 50257] [--repeats 7] [--tiles]

The two alternate within one run, so that a busy machine slows both, and the ratio is that of their medians.
"""

from __future__ import annotations

import argparse

import torch
from alternate import alternate, report
from torch.nn import functional as F

import trainer.model.loss
from trainer.model.loss import cross_entropy
from trainer.referee.measure import peak_growth


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiles", action="store_true", help="also time other sizes of the CPU's tile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    x = torch.randn(arguments.rows, arguments.vocabulary, requires_grad=True)
    targets = torch.randint(arguments.vocabulary, (arguments.rows,))

    def step(loss):
        def run():
            x.grad = None
            loss(x, targets).backward()

        return run

    def with_tile(elements):
        def run():
            usual, trainer.model.loss.CPU_TILE = trainer.model.loss.CPU_TILE, elements
            step(cross_entropy)()
            trainer.model.loss.CPU_TILE = usual

        return run

    candidates = {"F.cross_entropy": step(F.cross_entropy), "trainer.cross_entropy": step(cross_entropy)}
    if arguments.tiles:
        candidates |= {f"tile 2**{k}": with_tile(2**k) for k in range(15, 24)}
    print(f"cross entropy, forward + backward, {arguments.rows} x {arguments.vocabulary}, {arguments.threads} threads")
    report(alternate(candidates, arguments.repeats), base="F.cross_entropy")
    peaks = {}
    for name in ("F.cross_entropy", "trainer.cross_entropy"):
        x.grad = None
        peaks[name] = peak_growth(candidates[name], "cpu")
        print(f"{name:24} peak above the logits {peaks[name] / 2**20:10,.1f} MiB")
    print(f"peak memory, ratio {peaks['trainer.cross_entropy'] / peaks['F.cross_entropy']:.3f}")


if __name__ == "__main__":
    main()
