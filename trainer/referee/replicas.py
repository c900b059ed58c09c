"""The judge of several processes: one real step under DDP, ZeRO or FSDP2, and what one process holds of it.

A process that torchrun has started measures itself, by the profiler's raw memory events as `referee.measure` does.
What gloo's own threads are the last to hold they free where no profiler looks: a steady step whose events do not add up
to zero has missed such a free, and is run again. One that has missed both ends of a buffer does add up, to a lower
peak, but has two events less: of the steps that add up, those with the most events count, three of them.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from copy import deepcopy
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.fsdp import FSDPModule
from torch.profiler import ProfilerActivity, profile

from estimator.describe.checks import ConfigError
from trainer.model.decoder import Transformer
from trainer.model.quantised import scales
from trainer.optim.precision import loss_scaler
from trainer.parallel.context import own_tokens
from trainer.parallel.distributed import World, leave_out, local, part_mesh
from trainer.parallel.expert import of_experts
from trainer.parallel.pipeline import scheduled
from trainer.parallel.vocabulary import loss_context
from trainer.referee.measure import (
    LOSSES,
    Step,
    allocator_events,
    build_optimizer,
    build_parts,
    build_updates,
    nbytes,
    onednn,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

TRIES = 200  # most steps to wait for those whose events are complete
COMPLETE = 3  # so many of them
MOMENT = 1e-3  # seconds
PATIENCE, LONGEST = 6, 5  # after so many steps without enough that are complete it is doubled, so many times at most


class SharedStep(Step):
    """One process's part of an optimizer step that `p.data_parallel` processes take together."""

    def __init__(self, m: ModelConfig, p: Plan, world: World, seed: int = 0) -> None:
        if world.size != p.accelerators:
            raise ConfigError(f"accelerators = {p.accelerators}: torchrun has started {world.size} processes")
        model, inputs = build_parts(m, p, str(world.device), seed)
        if p.context_parallel > 1:
            place = world.rank % p.context_parallel, p.context_parallel
            inputs = own_tokens(inputs[0], *place), own_tokens(inputs[1], *place)
        buckets = p.copies > 1 and p.sharding in ("none", "zero1") and not p.fp32_gradients
        others = of_experts(model) if p.expert_parallel > 1 else []
        self.buckets = bucket_bytes(model, others) if buckets else 0
        module, self.held, self.weights, masters = world.prepare(model, p, p.sharding)
        optimizer = build_updates(self.weights.named, p, world.device.type, self.weights)
        super().__init__(model, optimizer, inputs, p, masters)
        self.module, self.world, self.needed = module, world, inputs
        in_parts = world.parts_gradients(p, p.sharding)
        self.scaler = loss_scaler(p.precision, world.device.type, sharded=in_parts, init_scale=2.0**8)

    def __call__(self) -> None:
        """Run it."""
        self.micro_batches()
        self.update()

    def forward(self) -> Tensor:
        """As one process has it."""
        with loss_context(self.plan):
            return super().forward()

    def backward(self, loss: Tensor) -> None:
        """As one process has it."""
        with loss_context(self.plan):
            super().backward(loss)

    def micro_batches(self) -> None:
        """Every forward and backward of the step."""
        for turn in range(self.plan.grad_accumulation):
            with self.world.micro_batch(self.module, last=turn == self.plan.grad_accumulation - 1):
                self.backward(self.forward())

    def update(self) -> None:
        """What comes after them."""
        self.held.gather_gradients()
        if self.masters is not None:
            self.masters.take_gradients()
        self.scaler.unscale_(self.optimizer)
        if self.plan.max_grad_norm is not None:
            self.weights.clip(self.plan.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.masters is not None:
            self.masters.write_back()
        self.held.spread()
        self.held.clear_gradients()


class PipelineStep(Step):
    """One stage's part of a step of `p.grad_accumulation` micro-batches."""

    def __init__(self, m: ModelConfig, p: Plan, world: World, seed: int = 0) -> None:
        if world.size != p.accelerators:
            raise ConfigError(f"accelerators = {p.accelerators}: torchrun has started {world.size} processes")
        model, (ids, targets) = build_parts(m, p, str(world.device), seed, sequences=p.batch_size * p.grad_accumulation)
        assert isinstance(model, Transformer)
        stage, self.weights = world.prepare_stage(model, p)
        needed = ((ids,) if stage.first else ()) + ((targets,) if stage.last else ())
        super().__init__(stage, build_optimizer(self.weights.named, p, world.device.type), (ids, targets), p)
        self.needed, self.buckets = needed, bucket_bytes(stage) if p.data_parallel > 1 and p.shards == 1 else 0
        self.places, self.run = scheduled(stage, world.grid(p), world.device, p, LOSSES[p.loss])

    def __call__(self) -> None:
        """Run it."""
        self.micro_batches()
        self.update()

    def micro_batches(self) -> None:
        """Every forward and backward of the step."""
        self.run(*self.inputs)

    def update(self) -> None:
        """What comes after them."""
        self.weights.gather_gradients()
        if self.plan.max_grad_norm is not None:
            self.weights.clip(self.plan.max_grad_norm)
        self.optimizer.step()
        self.weights.clear_gradients()

    def losses(self) -> float:
        """Run it; the loss of the step, which the last stage knows."""
        found: list[Tensor] = []
        self.run(*self.inputs, found)
        self.update()
        return float(sum(x.item() for x in found))

    def buffers(self) -> Iterator[Tensor]:
        """What the stages beside this one send into; made in the first step, and kept."""
        for received in (x for place in self.places for x in (place.args_recv_info, place.grad_recv_info)):
            for infos in received.values():
                yield from (info.buffer for info in infos if info.buffer is not None)


def bucket_bytes(model: nn.Module, ignored: Sequence[str] = ()) -> int:
    """Bytes that DDP keeps for itself around a model; its first messages, which take buffers, are left out."""
    kept: list[nn.Module] = [deepcopy(model)]
    leave_out(kept[0], ignored)
    events = allocator_events(lambda: kept.append(nn.parallel.DistributedDataParallel(kept[0], init_sync=False)))
    return sum(n for _, n in events)


# What the profiler calls a collective when it is asked for, by FSDP or by DTensor, which of its tensors is whole, and
# our word for it. DTensor's all-gather has a part for its input, and makes its output itself.
ASKED = {
    "c10d::_allgather_base_": (0, "all-gather"),
    "c10d::_reduce_scatter_base_": (1, "reduce-scatter"),
    "_c10d_functional::all_gather_into_tensor": (0, "all-gather"),
    "_c10d_functional::reduce_scatter_tensor": (0, "reduce-scatter"),
}
PART = "_c10d_functional::all_gather_into_tensor"
SENT = {"gloo:all_reduce": "all-reduce", "gloo:broadcast": "broadcast", "gloo:send": "send"}
ALL_TO_ALL = "c10d::alltoall_base_"  # whose first tensor is what comes, and whose second is what goes
ITEMSIZES = {"float": 4, "c10::BFloat16": 2, "c10::Half": 2, "long": 8, "long int": 8}


def messages(m: ModelConfig, p: Plan, world: World, seed: int = 0) -> list[tuple[str, int, int]]:
    """(kind, bytes, count): the collectives of a steady step of this process, as PyTorch's profiler sees them sent.

    gloo reduces and scatters by an all-reduce, which is no message of its own here. Of an all-to-all what comes or what
    goes, whichever is more, counts. In a selective checkpoint, which is a dispatch mode, an operator is seen within
    itself again.
    """
    step = PipelineStep(m, p, world, seed) if p.is_pipeline else SharedStep(m, p, world, seed)
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        step()
    results = prof.profiler.kineto_results
    assert results is not None
    found: Counter[tuple[str, int]] = Counter()
    over: dict[str, int] = {}  # when the last operator of a name ended; gloo's own end in another thread
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.start_ns() < over.get(event.name(), 0):
            continue
        if event.name() not in SENT:
            over[event.name()] = event.start_ns() + event.duration_ns()
        at, kind = ASKED.get(event.name(), (0, SENT.get(event.name())))
        if kind is not None:
            nbytes = _nbytes(event, at) * (p.tensor_parallel * p.context_parallel if event.name() == PART else 1)
            found[kind, nbytes] += 1
            if kind == "reduce-scatter":
                found["all-reduce", nbytes] -= 1
        elif event.name() == ALL_TO_ALL:
            found["all-to-all", max(_nbytes(event, 0), _nbytes(event, 1))] += 1
    return sorted((kind, nbytes, count) for (kind, nbytes), count in found.items() if count)


def _nbytes(event: Any, at: int) -> int:
    """Bytes of the argument `at` of an operator."""
    return math.prod(event.shapes()[at]) * ITEMSIZES[event.dtypes()[at]]


@contextmanager
def longer_waits(moment: float, group: dist.ProcessGroup | None) -> Iterator[None]:
    """So many seconds more for gloo's thread to let go of its buffers, which this thread will then free.

    What PyTorch keeps the work of, it frees some time after it has waited. The buffers of a functional collective go
    with the wait itself, so that gloo must be done before: a barrier of its `group` waits for all that was asked of it.
    What it gathers it takes a buffer for in a thread of its own, whenever all have sent: here at once, so that a gather
    that is not waited for (of one sequence, which needs no copy) has it at the same moment in every step.
    """
    wait, wait_tensor, gather = dist.Work.wait, functional.wait_tensor, functional.all_gather_single
    gloo = None if group is None else group._get_backend(torch.device("cpu"))  # noqa: SLF001 - `dist.barrier` allocates

    def longer(work: dist.Work, *timeout: Any) -> bool:
        done = wait(work, *timeout)
        time.sleep(moment)
        return done

    def longer_for(x: Tensor) -> Tensor:
        if gloo is not None:
            gloo.barrier().wait()  # type: ignore[attr-defined]  # torch's stubs leave it out
        found: Tensor = wait_tensor(x)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return found

    def gathered(*args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = gather(*args, **kwargs)
        if gloo is not None:
            gloo.barrier().wait()  # type: ignore[attr-defined]
        return found

    functional.all_gather_single = gathered
    dist.Work.wait = longer  # type: ignore[assignment, method-assign]  # which is what FSDP calls
    functional.wait_tensor = longer_for  # and this DTensor
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]
        functional.wait_tensor, functional.all_gather_single = wait_tensor, gather


def left_behind(model: nn.Module) -> Iterator[Tensor]:
    """What `fully_shard` keeps between steps beside shards.

    That is of units which are resharded to a smaller mesh and have had no backward to let it go, and what somebody has
    put in the place of a gathered parameter's data (`bitsandbytes.nn.Linear4bit` its bias).
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()  # noqa: SLF001 - it has no other name
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # noqa: SLF001 - before 2.11
            parameters = [x for group in filter(None, groups) for x in group.fsdp_params]
            held = (getattr(x, "_sharded_post_forward_param_data", None) for x in parameters)
            yield from (x for x in held if x is not None)
            for x in parameters:  # what has been put in the place of a gathered parameter's data
                gathered = {t.untyped_storage().data_ptr() for t in x.all_gather_outputs}
                if (whole := getattr(x, "_unsharded_param", None)) is None:
                    continue
                own = local(whole.detach())  # of tensor parallelism a DTensor
                if own.untyped_storage().data_ptr() not in gathered:
                    yield own


def measure_shared(m: ModelConfig, p: Plan, world: World, seed: int = 0) -> dict[str, int]:
    """Bytes of a steady step in this process: parameters, gradients, states and the peak.

    All processes call it; each gets its own.

    Raises:
        ConfigError: torchrun has started another number of processes than p.data_parallel.
        RuntimeError: the profiler has missed events in all of `TRIES` steps.
    """
    step = PipelineStep(m, p, world, seed) if p.is_pipeline else SharedStep(m, p, world, seed)
    for _ in range(3):  # the first makes the optimizer's state; in the second DDP cuts its buckets anew
        step()
    parameters = [local(x.detach()) for x in (*step.model.parameters(), *scales(step.model))]
    scale = [x for x in vars(step.scaler).values() if isinstance(x, Tensor)]
    resident = nbytes([*parameters, *step.model.buffers(), *step.needed, *step.state(), *scale]) + step.buckets
    resident += nbytes(step.buffers()) if isinstance(step, PipelineStep) else 0
    resident += nbytes(x.grad for x in step.updated if x.grad is not None) + nbytes(left_behind(step.model))
    step.micro_batches()
    gradients = nbytes(local(x) for x in step.gradients())
    step.update()
    found = {
        "parameter_bytes": nbytes(parameters),
        "gradient_bytes": gradients,
        "optimizer_bytes": nbytes(step.state()),
    }
    peaks: defaultdict[int, list[int]] = defaultdict(
        list
    )  # by the number of events, of which a step can only miss some
    meshes = filter(None, map(part_mesh, step.model.parameters()))
    group = dist.group.WORLD if p.context_parallel > 1 else next((mesh.get_group() for mesh in meshes), None)
    for turn in range(TRIES):
        moment = MOMENT * 2 ** min(turn // PATIENCE, LONGEST)
        # oneDNN's products in half precision take scratch that depends on the machine.
        with onednn(enabled=False), longer_waits(moment, group):
            live = list(accumulate(n for _, n in allocator_events(step)))
        if live[-1] == 0:
            peaks[len(live)].append(resident + max(live))
        complete = peaks[max(peaks)] if peaks else []
        if not world.any(len(complete) < COMPLETE):  # all take the same number of steps
            return found | {"peak_bytes": max(complete)}
    raise RuntimeError(f"the profiler has missed events in each of {TRIES} steps")
