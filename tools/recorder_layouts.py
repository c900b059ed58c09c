"""Random layouts of our own models: one rank, recorded alone, and the same rank of the symbolic step."""

from __future__ import annotations

import gc
import os
import sys
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

import trainer
from estimator.accounting.accounts import account
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.eager.ledger import Category
from trainer.parallel.distributed import World
from trainer.referee.recorder.world import one_rank
from trainer.referee.replicas import SharedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.describe.model import ModelConfig
    from trainer.referee.recorder.recording import Recording

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / x) for x in ("tools", "tests/exact", "tests/ranks")]
import check_layouts as of_layouts  # noqa: E402 - lies beside this
import test_context as of_sequences  # noqa: E402 - a module of the tests
import test_expert as of_experts  # noqa: E402 - likewise

WORLD = 64  # ranks, more than there are processes here


def replicated(random: Random, ranks: int) -> tuple[ModelConfig, Plan]:
    """DDP, or ZeRO-1."""
    m, p = of_layouts.of_shards.drawn(random, ranks)
    precision = random.choice(["fp32", "bf16", "bf16-mixed", "fp16-mixed"])
    plain = {name: Plan.__dataclass_fields__[name].default for name in OF_SHARDS}
    return m, p.replace(sharding=random.choice(["none", "zero1"]), precision=precision, **plain)


def in_shards(random: Random) -> tuple[ModelConfig, Plan]:
    """Tensor parallelism within `fully_shard`, on all ranks."""
    m, p = of_layouts.shared(random, 4)
    return m, p.replace(data_parallel=WORLD // 4, sharding=random.choice(["zero2", "zero3"]))


OF_SHARDS = ("offload", "shard_group", "reshard_after_forward", "reduce_dtype", "autocast", "update")
# Ranks, and a random case. Stages of pipelines ask each other for shapes, and are not recorded alone.
LAYOUTS: dict[str, tuple[int, Callable[[Random], tuple[ModelConfig, Plan]]]] = {
    "replicas-4": (4, lambda random: replicated(random, 4)),
    **{name: x for name, x in of_layouts.LAYOUTS.items() if not name.startswith(("pipeline", "interleaved"))},
    "context-2": (2, lambda random: of_sequences.drawn(random, 1, 2)),
    "context-2-replicas-2": (4, lambda random: of_sequences.drawn(random, 2, 2)),
    "experts-2": (2, lambda random: of_experts.drawn(random, 2)),
    "experts-4": (4, lambda random: of_experts.drawn(random, 4)),
    "shards-64": (WORLD, lambda random: of_layouts.of_shards.drawn(random, WORLD)),
    "tensor-4-shards-16": (WORLD, in_shards),
}


class Compared(NamedTuple):
    """Figures of one rank as they are recorded, and as the account has them.

    Attributes:
        seed, rank: whose.
        recorded, accounted: bytes of the peak, of parameters and of states, and of each kind of message how many and
            bytes in all; None where the trainer refuses the plan on the device.
        said: the refusal, or the plan.
    """

    seed: int
    rank: int
    recorded: tuple[Any, ...] | None
    accounted: tuple[Any, ...] | None
    said: str


def against_account(name: str, seeds: Sequence[int], device: str) -> list[Compared]:
    """The first and the last rank of the layout's draws.

    Each rank is a process's of its own, as DTensor remembers whose it is: the one that calls this must be none.
    """
    ranks = LAYOUTS[name][0]
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        found = pool.starmap(_of_rank, [(name, seeds, device, rank) for rank in (0, ranks - 1)], chunksize=1)
    return [row for rows in found for row in rows]


def _of_rank(name: str, seeds: Sequence[int], device: str, rank: int) -> list[Compared]:
    torch.set_num_threads(1)
    ranks, draw = LAYOUTS[name]
    os.environ.update(WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK="0")
    one_rank(ranks, rank)
    return [_compared(*draw(Random(seed)), device, seed, rank) for seed in seeds]  # noqa: S311 - no secret


def _compared(m: ModelConfig, p: Plan, device: str, seed: int, rank: int) -> Compared:
    kept: list[int] = []
    gc.collect()
    before = set(map(id, meshes()))

    def build() -> SharedStep:
        step = SharedStep(m, p, World(device))
        kept.append(bookkeeping(step, before) if device == "cpu" else 0)
        return step

    try:
        recording = trainer.record(build, device=device)
    except ConfigError as error:
        return Compared(seed, rank, None, None, str(error))
    own = of_layouts.accounted_rank(p, rank)
    values = account(m, p, device, own).evaluate(m, p, threads=1)
    ours = (
        recording.peak_bytes - kept[0],
        recording.bytes_before(Category.PARAMETER),
        recording.bytes_before(Category.OPTIMIZER),
        sent(recording),
    )
    messages = {kind: tuple(map(int, x)) for kind, x in of_layouts.of_shards.accounted(m, p, own, device).items()}
    theirs = (values.peak_bytes, values.parameter_bytes, values.optimizer_bytes, messages)
    return Compared(seed, rank, ours, theirs, f"{m!r} {p!r}")


def sent(recording: Recording) -> dict[str, tuple[int, int]]:
    """kind -> (messages, bytes), whatever their axis."""
    found: dict[str, tuple[int, int]] = {}
    for (kind, _), (count, nbytes) in recording.messages.items():
        before = found.get(kind, (0, 0))
        found[kind] = before[0] + count, before[1] + nbytes
    return found


def bookkeeping(step: SharedStep, before: set[int]) -> int:
    """Bytes of what a process keeps on the CPU beside tensors that are trained: the ranks of a mesh, orders of rows.

    A `DeviceMesh` that was not there `before` has its ranks; `trainer.parallel.tensor.deal` notes how it has put rows
    in another order.
    """
    kept: list[Any] = [*step.model.dealt.values(), *(x.mesh for x in meshes() if id(x) not in before)]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(held.values())


def meshes() -> list[DeviceMesh]:
    """All that there are."""
    return [x for x in gc.get_objects() if type(x) is DeviceMesh]
