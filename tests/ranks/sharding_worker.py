"""Started by torchrun: measures each case of a JSON file and writes what each process holds, or sends."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.model.router import Router
from trainer.parallel.distributed import World, end_process
from trainer.referee.replicas import PipelineStep, SharedStep, measure_shared, messages


def of_plan(ask):
    """`ask` of a model and a plan that come as plain fields."""
    return lambda m, p, world: ask(ModelConfig(**m), Plan(**p), world)


def losses(m, p, world):
    """Those of three steps, which see the same tokens."""
    if p.is_pipeline:
        step = PipelineStep(m, p, world)
        return [step.losses() for _ in range(3)]
    step = of_own_tokens(m, p, world)
    found = []
    for _ in range(3):
        loss = step.forward()
        found.append(loss.item())
        step.backward(loss)
        step.update()
    return found


def of_own_tokens(m, p, world):
    """A step; where ranks share experts each sees other tokens, and routers choose."""
    step = SharedStep(m, p, world)
    if p.expert_parallel > 1:
        step.inputs = tuple(x.roll(world.rank, 1) for x in step.inputs)
        for router in (x for x in step.model.modules() if isinstance(x, Router)):
            router.routing = "learned"
    return step


def gradients(m, p, world):
    """name -> the whole gradient of each parameter after a step's micro-batches, flat."""
    step = of_own_tokens(m, p, world)
    step.micro_batches()
    step.held.gather_gradients()
    whole = {name: step.held.whole(name, x.grad) for name, x in step.held.named.items()}
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).flatten().tolist() for name, x in whole.items()}


def shapes(processes, shapes, world):
    """name -> (bytes, elements) of each parameter's shard, where the first so many processes share them."""
    mesh = DeviceMesh("cpu", list(range(processes)))
    if world.rank >= processes:
        return None
    module = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})
    fully_shard(module, mesh=mesh)
    local = {name: p.to_local() for name, p in module.items()}
    return {name: (x.untyped_storage().nbytes(), x.numel()) for name, x in local.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = World("cpu")
    source, target = map(Path, sys.argv[1:3])
    of_steps = {"bytes": measure_shared, "messages": messages, "losses": losses, "gradients": gradients}
    ask = shapes if sys.argv[3] == "shapes" else of_plan(of_steps[sys.argv[3]])
    mine = [ask(*case, world) for case in json.loads(source.read_text())]
    everyones = [None] * world.size
    dist.all_gather_object(everyones, mine)
    if world.rank == 0:
        target.write_text(json.dumps(list(zip(*everyones, strict=True))))
    world.barrier()
    end_process(0)
