"""Pipeline parallelism by torch.distributed.pipelining: each process has some blocks in a row, a stage of the model.

The first stage has the embedding as well, the last one the final norm and the head. Micro-batches go through the stages
one after the other; a schedule says when a stage runs whose forward and whose backward: GPipe all forwards first (Huang
et al. 2019), 1F1B each backward as soon as it can (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from trainer.optim.precision import autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh

    from trainer.model.decoder import Transformer

SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class Stage(nn.Module):
    """The blocks of one process. Shapes: ids (B, T) or x (B, T, d) -> x (B, T, d) or logits (B, T, V).

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


def scheduled(
    stage: Stage,
    grid: DeviceMesh,
    device: torch.device,
    kind: str,
    micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> tuple[PipelineStage, Callable[..., None]]:
    """(PyTorch's stage, a step): one call of that runs every micro-batch of the given ids and targets through `stage`.

    The loss of a micro-batch is divided by their number here, so that gradients need not be. Replicas of the stage, on
    the axis "data" of the mesh `grid`, exchange their gradients as DDP does, in the last backward; those that share its
    parameters (`fully_shard`) do when the schedule is over.
    """
    module: nn.Module = stage
    if grid["data"].size() > 1 and not isinstance(stage, FSDPModule):
        devices = [device] if device.type == "cuda" else None
        module = nn.parallel.DistributedDataParallel(stage, devices, process_group=grid["data"].get_group())
    place = PipelineStage(module, stage.index, stage.stages, device, group=grid["pipeline"].get_group())

    def mean(logits: Tensor, targets: Tensor) -> Tensor:
        with autocast(stage.model.plan, device.type):
            whole = loss(logits, targets)
        return whole / micro_batches

    run = SCHEDULES[kind](place, micro_batches, mean, scale_grads=False)

    def step(ids: Tensor, targets: Tensor, losses: list[Tensor] | None = None) -> None:
        inputs = (ids,) if stage.first else ()
        run.step(*inputs, target=targets if stage.last else None, losses=losses, return_outputs=False)

    return place, step


def evaluation(
    stage: Stage, grid: DeviceMesh, device: torch.device, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """What takes the loss of one batch of ids and targets, of forwards alone; a list, empty but in the last stage.

    One batch at a time: a schedule of several would keep the logits of each to its end.
    """
    place = PipelineStage(stage, stage.index, stage.stages, device, group=grid["pipeline"].get_group())

    def of_batch(logits: Tensor, targets: Tensor) -> Tensor:
        with autocast(stage.model.plan, device.type):
            return loss(logits, targets)

    run = ScheduleGPipe(place, 1, of_batch, scale_grads=False)

    def evaluate(ids: Tensor, targets: Tensor) -> list[Tensor]:
        losses: list[Tensor] = []
        inputs = (ids,) if stage.first else ()
        with torch.no_grad():
            run.eval(*inputs, target=targets if stage.last else None, losses=losses, return_outputs=False)
        place.clear_runtime_states()
        return losses

    return evaluate
