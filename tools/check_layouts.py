"""Hold the ledger of layouts against real processes under gloo, to the byte, on this machine's CPU.

    python tools/check_layouts.py 10                       # ten random cases of each layout that it knows
    python tools/check_layouts.py 10 --only tensor-2 --seed 7

Every rank's parameters, gradients, states and peak are compared, and its messages by kind, count and bytes. One line a
case; the exit status is 1 if any differs. Cases are drawn as tests/ranks does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import account
from trainer.referee.validate import describe

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "exact"), str(ROOT / "tests" / "ranks")]
import test_pipeline as of_pipelines  # noqa: E402 - a module of the tests
import test_sharding as of_shards  # noqa: E402 - likewise
import test_tensor as of_matrices  # noqa: E402 - likewise

Case = tuple["ModelConfig", "Plan"]


def shared(random: Random, ranks: int = 2, **changes: Any) -> Case:
    """Ranks of tensor parallelism, with sequence and vocabulary parallelism or without."""
    m, p = of_matrices.drawn(random, ranks)
    return m, p.replace(**changes)


def sharded_matrices(random: Random, **changes: Any) -> Case:
    """`fully_shard` around them."""
    m, p = shared(random, data_parallel=2, sharding=random.choice(["zero2", "zero3"]), **changes)
    return m, p.replace(precision=random.choice(["bf16-fsdp", p.precision]))


def staged(random: Random, stages: int = 2, **changes: Any) -> Case:
    """Stages of a pipeline."""
    m, p = of_pipelines.drawn(random, stages)
    if "tensor_parallel" in changes and random.random() < 0.5:
        p = p.replace(seq_len=random.choice([2, 4, 8]))
        changes |= {"sequence_parallel": True}
    if p.grad_accumulation < stages:
        p = p.replace(grad_accumulation=stages)
    if changes.get("sharding") == "none":  # DDP fails where all forwards come first
        p = p.replace(pipeline_schedule="1f1b", grad_accumulation=max(p.grad_accumulation, stages + 1))
    if changes.get("sharding") == "zero2":
        changes |= {"precision": random.choice(["bf16-fsdp", p.precision])}
    return m, p.replace(**changes)


def interleaved(random: Random, stages: int = 2, **changes: Any) -> Case:
    """Stages of several parts each."""
    m, p = staged(random, stages, **changes)
    parts, groups = random.choice([2, 2, 3]), random.choice([1, 1, 2, 3, 5, 7])
    m = m.replace(num_layers=stages * parts * random.randint(1, 4))
    count = groups * random.randint(stages, stages + (stages - 1) // groups)  # of which PyTorch makes so many groups
    return m, p.replace(pipeline_schedule="1f1b", virtual_stages=parts, grad_accumulation=count)


LAYOUTS: dict[str, tuple[int, Callable[[Random], Case]]] = {  # processes, and a random case
    "shards-2": (2, lambda random: of_shards.drawn(random, 2)),
    "shards-4": (4, lambda random: of_shards.drawn(random, 4)),
    "tensor-2": (2, shared),
    "tensor-4": (4, lambda random: shared(random, 4)),
    "tensor-2-shards-2": (4, sharded_matrices),
    "pipeline-2": (2, staged),
    "pipeline-4": (4, lambda random: staged(random, 4)),
    "interleaved-2": (2, interleaved),
    "interleaved-4": (4, lambda random: interleaved(random, 4)),
    "interleaved-2-tensor-2": (4, lambda random: interleaved(random, tensor_parallel=2)),
    "pipeline-2-tensor-2": (4, lambda random: staged(random, tensor_parallel=2)),
    "pipeline-2-replicas-2": (4, lambda random: staged(random, data_parallel=2, sharding="none")),
    "pipeline-2-shards-2": (4, lambda random: staged(random, data_parallel=2, sharding="zero2")),
}


def accounted_rank(p: Plan, process: int) -> int:
    """Which rank of `account` a process is: stages furthest apart, those that share a block's matrices side by side."""
    data = process // p.tensor_parallel
    if not p.is_pipeline:
        return data
    stage, replica = divmod(data, p.data_parallel)
    return stage + p.pipeline_parallel * (replica % p.shards)


def differences(m: ModelConfig, p: Plan, processes: list[dict[str, int]]) -> list[str]:
    """What of the bytes of each process is not the ledger's."""
    found = []
    for process, real in enumerate(processes):
        v = account(m, p, "cpu", accounted_rank(p, process)).evaluate(m, p, threads=1)
        for name, nbytes in real.items():
            if getattr(v, name) != nbytes:
                found.append(f"process {process}: {name}: ledger {getattr(v, name):,}, PyTorch {nbytes:,}")
    return found


def sent_otherwise(m: ModelConfig, p: Plan, processes: list[Any]) -> list[str]:
    """What of the messages of each process is not the ledger's."""
    found = []
    for process, real in enumerate(processes):
        ledger, seen = of_shards.accounted(m, p, accounted_rank(p, process)), of_shards.totals(real)
        if ledger != seen:
            found.append(f"process {process}: messages: ledger {ledger}, PyTorch {seen}")
    return found


def check(name: str, runs: int, seed: int) -> tuple[int, int]:
    """Print a line a case of this layout; (equal, all)."""
    size, draw = LAYOUTS[name]
    random = Random(f"{name} {seed}")  # noqa: S311 - no secret
    cases = [draw(random) for _ in range(runs)]
    wrong: list[list[str]] = [[] for _ in cases]
    with TemporaryDirectory() as folder:
        for i, found in enumerate(of_shards.measured(size, cases, Path(folder))):
            wrong[i] += differences(*cases[i], found)
        for i, found in enumerate(of_shards.measured(size, cases, Path(folder), "messages")):
            wrong[i] += sent_otherwise(*cases[i], found)
    for (m, p), lines in zip(cases, wrong, strict=True):
        print(f"{'DIFFERS' if lines else 'equal  '} {name}: {describe(m, p)}", flush=True)
        for line in lines:
            print(f"        {line}")
        if lines:
            print(f"        {m!r}\n        {p!r}", flush=True)
    return sum(not lines for lines in wrong), len(cases)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=int, help="cases of each layout")
    parser.add_argument("--only", choices=LAYOUTS, action="append", help="this layout, or several")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    equal = total = 0
    for name in given.only or LAYOUTS:
        same, all_ = check(name, given.runs, given.seed)
        equal, total = equal + same, total + all_
    print(f"{equal} of {total} cases are equal to PyTorch in every byte of every process, and in their messages")
    return int(equal != total)


if __name__ == "__main__":
    sys.exit(main())
