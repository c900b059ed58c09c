"""Hold the ledger against real steps of many decoders, to the byte and the FLOP, on this machine's CPU.

    python tools/check_decoders.py families          # each family of tests/data/hf at two sizes
    python tools/check_decoders.py draws 300 600     # the random decoders and recipes of tests/exact/random_parts.py

Parameters, gradients, states, saved tensors, peak and FLOPs are compared (trainer/referee/measure.py). One line a case;
the exit status is 1 if any differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch

from estimator.describe.checks import ConfigError
from trainer.referee.measure import onednn
from trainer.referee.validate import compare, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "exact"))
from families_at_sizes import families  # noqa: E402 - a module of the tests
from random_parts import draw  # noqa: E402 - likewise


def draws(first: int, end: int) -> Iterator[tuple[str, ModelConfig, Plan]]:
    """The draws of these seeds."""
    for seed in range(first, end):
        yield f"seed {seed}", *draw(Random(seed))  # noqa: S311 - no secret


def check(cases: Iterator[tuple[str, ModelConfig, Plan]]) -> bool:
    """Print a line a case, and how many are equal; whether all are."""
    equal = total = 0
    for name, m, p in cases:
        wrong = [row for row in compare(m, p) if row.difference]
        total, equal = total + 1, equal + (not wrong)
        print(f"{'DIFFERS' if wrong else 'equal  '} {name}: {describe(m, p)}", flush=True)
        for row in wrong:
            print(f"        {row.quantity}: ledger {row.estimate:,}, PyTorch {row.measurement:,} ({row.difference:+,})")
        if wrong:
            print(f"        {m!r}\n        {p!r}", flush=True)
    print(f"{equal} of {total} cases are equal to PyTorch in every byte and FLOP")
    return equal == total


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("families").add_argument("name", nargs="*", help="these families only")
    drawn = what.add_parser("draws")
    drawn.add_argument("first", type=int, help="the first seed")
    drawn.add_argument("end", type=int, nargs="?", help="the seed after the last (default: first + 1)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        with onednn(enabled=False):
            cases = families(args.name) if args.what == "families" else draws(args.first, args.end or args.first + 1)
            return 0 if check(cases) else 1
    except ConfigError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
