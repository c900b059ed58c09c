"""Pipeline parallelism by torch.distributed.pipelining: each process has some blocks in a row, a stage of the model.

The first stage has the embedding as well, the last one the final norm and the head. Micro-batches go through the stages
one after the other; a schedule says when a stage runs whose forward and whose backward: GPipe all forwards first (Huang
et al. 2019), 1F1B each backward as soon as it can (Narayanan et al. 2021, section 2.2). Interleaved, a process has
several stages, as far apart as there are processes (section 2.2.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from trainer.optim.precision import autocast

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, PipelineScheduleSingle

    from estimator.describe.plan import Plan
    from trainer.model.decoder import Transformer

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Stage(nn.Module):
    """Some blocks of a model in a row. Shapes: ids (B, T) or x (B, T, d) -> x (B, T, d) or logits (B, T, V).

    Attributes:
        model: the whole decoder, without the parts that other stages have.
        index, stages: which of how many.
        layers: its blocks' indices in the whole model.
        tokens: of a sequence, of which a process of sequence parallelism sees a part here; None for all that it sees.
        shapes: of all tensors of the whole model's state, by name.
    """

    def __init__(self, model: Transformer, index: int, stages: int) -> None:
        super().__init__()
        self.index, self.stages = index, stages
        self.shapes = {name: x.shape for name, x in model.state_dict().items()}
        plan = model.plan
        self.tokens = plan.tokens(model.config) if plan.sequence_parallel else None
        self.first, self.last = first, last = index == 0, index == stages - 1
        each = len(model.blocks) // stages
        self.layers = range(index * each, (index + 1) * each)
        model.blocks = nn.ModuleList(model.blocks[i] for i in self.layers)
        if not first:
            del model.embedding
            model.positions = None
        if not last:
            model.final_norm = None
            del model.head
        self.model = model

    @property
    def parts(self) -> list[Stage]:
        """Itself: the stages of a process that has one."""
        return [self]

    @property
    def dealt(self) -> dict[str, Tensor]:
        """`Transformer.dealt` of the whole model."""
        return self.model.dealt

    def whole_names(self) -> dict[str, str]:
        """Name in this stage's state -> name in the whole model."""
        names = {}
        for name in self.state_dict():
            own = name.removeprefix("model.")
            if own.startswith("blocks."):
                _, number, rest = own.split(".", 2)
                own = f"blocks.{self.layers[int(number)]}.{rest}"
            names[name] = own
        return names

    def forward(self, x: Tensor) -> Tensor:
        """What goes on to the next stage, or the logits."""
        with autocast(self.model.plan, x.device.type):
            return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        """The same, in the dtypes of the context."""
        model = self.model
        if self.index == 0:
            x = model.dropout(model.embedded(x, 0))
        T = self.tokens or x.shape[1]
        masks, bias = model.masks(x, T, 0)
        rotary = model.config.made_of.positions.kind == "rotary"
        cos, sin = (table[:T, None] for table in (model.cos, model.sin)) if rotary else (None, None)
        for i, layer in enumerate(self.layers):
            kind = model.config.layers[layer]
            turn = (cos, sin) if kind.rotates else (None, None)
            x = model.run_block(i, x, masks[kind.attention], bias, *turn, None, None)
        return model.logits_or_loss(model.leave(x), None) if self.index == self.stages - 1 else x


class Stages(nn.Module):
    """Several stages of one process, in the order of their index; what the model's tables hold they share.

    Attributes:
        shapes, dealt: as a `Stage`'s.
    """

    def __init__(self, model: Transformer, indices: range, stages: int) -> None:
        super().__init__()
        parts = [Stage(with_parts_of_its_own(model), index, stages) for index in indices]
        self.each = nn.ModuleList(parts)
        self.first, self.last = parts[0].first, parts[-1].last
        self.shapes, self.dealt = parts[0].shapes, model.dealt

    @property
    def parts(self) -> list[Stage]:
        """The stages."""
        return [x for x in self.each if isinstance(x, Stage)]

    def whole_names(self) -> dict[str, str]:
        """Name in this module's state -> name in the whole model."""
        each = ((f"each.{i}.{own}", name) for i, x in enumerate(self.parts) for own, name in x.whole_names().items())
        return dict(each)


def with_parts_of_its_own(model: Transformer) -> Transformer:
    """`model` again, to take parts from without taking them from `model`; these are the same in both."""
    again = copy.copy(model)
    again._modules = dict(model._modules)  # noqa: SLF001 - which a shallow copy has in common with its model
    return again


def stages_of(model: Transformer, rank: int, plan: Plan) -> Stage | Stages:
    """What of `model` the process number `rank` of a pipeline has, in place; those of another are taken from it."""
    every = plan.pipeline_parallel * plan.virtual_stages
    if plan.virtual_stages == 1:
        return Stage(model, rank, every)
    return Stages(model, range(rank, every, plan.pipeline_parallel), every)


Run = Callable[..., None]


def scheduled(
    stage: Stage | Stages,
    grid: DeviceMesh,
    device: torch.device,
    plan: Plan,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[list[PipelineStage], Run]:
    """(PyTorch's stages, a step): one call of that runs every micro-batch of the given ids and targets through `stage`.

    The loss of a micro-batch is divided by their number here, so that gradients need not be. Replicas of the stage, on
    the axis "data" of the mesh `grid`, exchange their gradients as DDP does, in the last backward; those that share its
    parameters (`fully_shard`) do when the schedule is over.
    """
    modules: list[nn.Module] = [*stage.parts]
    if grid["data"].size() > 1 and not isinstance(stage, FSDPModule):
        devices, group = [device] if device.type == "cuda" else None, grid["data"].get_group()
        modules = [nn.parallel.DistributedDataParallel(x, devices, process_group=group) for x in modules]

    def mean(logits: Tensor, targets: Tensor) -> Tensor:
        with autocast(plan, device.type):
            whole = loss(logits, targets)
        return whole / plan.grad_accumulation

    places = places_of(stage, modules, grid, device)
    run = schedule_of(plan, places, plan.grad_accumulation, mean)

    def step(ids: Tensor, targets: Tensor, losses: list[Tensor] | None = None) -> None:
        inputs = (ids,) if stage.first else ()
        run.step(*inputs, target=targets if stage.last else None, losses=losses, return_outputs=False)

    return places, step


def places_of(
    stage: Stage | Stages, modules: list[nn.Module], grid: DeviceMesh, device: torch.device
) -> list[PipelineStage]:
    """PyTorch's stages of `modules`, which run the parts of `stage`."""
    group = grid["pipeline"].get_group()
    parts = zip(modules, stage.parts, strict=True)
    return [PipelineStage(module, x.index, x.stages, device, group=group) for module, x in parts]


def schedule_of(
    plan: Plan, places: list[PipelineStage], micro_batches: int, loss: Callable[[Tensor, Tensor], Tensor]
) -> PipelineScheduleSingle | PipelineScheduleMulti:
    """PyTorch's schedule that `plan` names, of so many micro-batches; 1F1B of fewer than stages is GPipe."""
    if plan.virtual_stages > 1:
        return ScheduleInterleaved1F1B([*places], micro_batches, loss, scale_grads=False)
    kind = SCHEDULES[plan.pipeline_schedule if micro_batches >= plan.pipeline_parallel else "gpipe"]
    return kind(places[0], micro_batches, loss, scale_grads=False)


def evaluation(
    stage: Stage | Stages, grid: DeviceMesh, device: torch.device, plan: Plan, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """What takes the loss of one batch of ids and targets, of forwards alone; a list, empty but in the last stage.

    One batch at a time: a schedule of several would keep the logits of each to its end.
    """
    places = places_of(stage, [*stage.parts], grid, device)

    def of_batch(logits: Tensor, targets: Tensor) -> Tensor:
        with autocast(plan, device.type):
            return loss(logits, targets)

    run = schedule_of(plan, places, 1, of_batch)

    def evaluate(ids: Tensor, targets: Tensor) -> list[Tensor]:
        losses: list[Tensor] = []
        inputs = (ids,) if stage.first else ()
        with torch.no_grad():
            run.eval(*inputs, target=targets if stage.last else None, losses=losses, return_outputs=False)
        for place in places:
            place.clear_runtime_states()
        return losses

    return evaluate
