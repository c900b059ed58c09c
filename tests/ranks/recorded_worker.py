"""Layouts of a module of one's own. Started by torchrun: what each real process holds of a step of each."""

import json
import sys
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import trainer
from estimator.describe.plan import Plan
from estimator.eager.ledger import Category, Phase
from trainer.parallel.distributed import end_process, local
from trainer.referee.measure import allocator_events, nbytes, onednn
from trainer.referee.recorder.steps import as_step
from trainer.referee.recorder.truth import states
from trainer.referee.recorder.world import one_rank
from trainer.referee.replicas import longer_waits

V, WIDTH, B, T = 101, 36, 3, 8  # rows that nothing divides
TRIES, COMPLETE = 200, 3


class Block(nn.Module):
    """Norm and feed-forward, around which the stream goes."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        """(B, T, d) -> (B, T, d)."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, blocks and head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, WIDTH), nn.Linear(WIDTH, V)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, ids):
        """(B, T) -> (B, T, V)."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss(module, ids):
    """Of the next token's place."""
    return F.cross_entropy(module(ids).flatten(0, 1), ids.flatten())


def mesh(device, *names):
    """All ranks, on one axis or two."""
    n = dist.get_world_size()
    return init_device_mesh(device, (n,) if len(names) == 1 else (n // 2, 2), mesh_dim_names=names)


def sharded(module, on, **how):
    """`fully_shard` of each block and of the rest."""
    for block in module.blocks:
        fully_shard(block, mesh=on, **how)
    return fully_shard(module, mesh=on, **how)


def tensor_parallel(module, on, *, sequence):
    """Every parameter is a DTensor: feed-forwards shared out, all else everywhere."""
    norm = SequenceParallel() if sequence else None
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if sequence:
        plan = {
            "norm": norm,
            "up": ColwiseParallel(input_layouts=Shard(1)),
            "down": RowwiseParallel(output_layouts=Shard(1)),
        }
    for block in module.blocks:
        parallelize_module(block, on, plan)
    outer = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1) if sequence else Replicate())
    }
    outer["head"] = ColwiseParallel(input_layouts=Shard(1) if sequence else Replicate(), output_layouts=Replicate())
    return parallelize_module(module, on, outer)


def both(module, on):
    """Tensor parallelism within `fully_shard`."""
    return sharded(tensor_parallel(module, on["tensor"], sequence=True), on["data"])


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
LAYOUTS = {
    "zero3": lambda m, device: sharded(m, mesh(device, "data")),
    "zero2": lambda m, device: sharded(m, mesh(device, "data"), reshard_after_forward=False),
    "bf16": lambda m, device: sharded(m, mesh(device, "data"), mp_policy=HALF),
    "ddp": lambda m, device: DistributedDataParallel(m),  # noqa: ARG005 - where the module is
    "ddp views": lambda m, device: DistributedDataParallel(m, gradient_as_bucket_view=True),  # noqa: ARG005
    "tensor": lambda m, device: tensor_parallel(m, mesh(device, "tensor"), sequence=False),
    "sequence": lambda m, device: tensor_parallel(m, mesh(device, "tensor"), sequence=True),
    "hybrid": lambda m, device: sharded(m, mesh(device, "copies", "data")),
    "both": lambda m, device: both(m, mesh(device, "data", "tensor")),
}


def build(layout, device="cpu"):
    """(module, loss, inputs) of a rank."""
    torch.manual_seed(0)
    return LAYOUTS[layout](Model().to(device), device), loss, (torch.randint(V, (B, T), device=device),)


def allocations(events):
    """Bytes of each, in order of size: when gloo's threads have theirs depends on the clock."""
    return sorted(n for n in events if n > 0)


def measured(layout, plan):
    """Bytes of parameters and states of this process, the most that a steady step adds, and all that it allocates."""
    step = as_step(build(layout), plan)
    for _ in range(3):  # in the second DDP cuts its buckets anew
        step()
    held = {
        "parameters": nbytes(local(x.detach()) for x in step.model.parameters()),
        "states": nbytes(map(local, states(step))),
    }
    group = next((x.device_mesh.get_all_groups()[-1] for x in step.model.parameters() if isinstance(x, DTensor)), None)
    found = {}
    for turn in range(TRIES):
        with onednn(enabled=False), longer_waits(1e-3 * 2 ** min(turn // 6, 5), group):
            events = [n for _, n in allocator_events(step)]
        if sum(events) == 0:
            found.setdefault(len(events), []).append((max(accumulate(events)), allocations(events)))
        complete = found[max(found)] if found else []
        enough = torch.tensor(int(len(complete) >= COMPLETE))
        dist.all_reduce(enough, dist.ReduceOp.MIN)
        if enough:
            most, all_of_them = max(complete)
            return held | {"most": most, "allocations": all_of_them}
    raise RuntimeError(f"the profiler has missed events in each of {TRIES} steps")


def recorded(layout, plan, device="cpu"):
    """The same of a recording of this rank alone."""
    recording = trainer.record(lambda: build(layout, device), plan, device)
    before = sum(e.storage.nbytes.number for e in recording.ledger.events if e.where.phase is Phase.SETUP)
    return {
        "parameters": recording.bytes_before(Category.PARAMETER),
        "states": recording.bytes_before(Category.OPTIMIZER),
        "most": recording.peak_bytes - before,
        "allocations": allocations(np.diff(recording.timeline, prepend=before).tolist()),
    }


def real(cases):
    """Of each process of a real world, what it measures of each case; in the first, else None."""
    dist.init_process_group("gloo")
    mine = [measured(layout, Plan(**plan)) for layout, plan in cases]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    dist.barrier()
    return list(zip(*everyones, strict=True)) if dist.get_rank() == 0 else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases, target, world = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3:]
    if world:
        one_rank(*map(int, world))
        found = [recorded(layout, Plan(**plan)) for layout, plan in cases]
    else:
        found = real(cases)
    if found is not None:
        target.write_text(json.dumps(found))
    end_process(0)
