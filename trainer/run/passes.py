"""The forwards and backwards of a process: those of its share of a step, and of a validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from estimator.describe.checks import ConfigError
from trainer.optim.precision import autocast
from trainer.parallel.context import own_tokens
from trainer.parallel.pipeline import evaluation, scheduled
from trainer.parallel.vocabulary import loss_context
from trainer.referee.measure import LOSSES, loss_of

if TYPE_CHECKING:
    from estimator.describe.plan import Plan
    from trainer.files.data import Dataset
    from trainer.parallel.distributed import World
    from trainer.parallel.pipeline import Stage, Stages
    from trainer.run.settings import TrainConfig


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of each step: whole micro-batches or, where there are too few, rows of every one.

    The data of a step, and so its gradient, are the same for any number of processes. Those that share a block's
    matrices, or are stages of one pipeline, have the same data; those of context parallelism parts of its sequences.

    Attributes:
        plan: one process's plan.
        rows: of each batch.
        micro_batches: in a step of the whole run.
        first: the first batch of a step, or of a validation, that is this process's.
        stride: from one of its batches to the next.
        losses: processes that know the loss of their share: all, or a pipeline's last stages.
        tokens: which of how many parts of each sequence (`trainer.parallel.context`).
    """

    plan: Plan
    rows: slice
    micro_batches: int
    first: int
    stride: int
    losses: int
    tokens: tuple[int, int] = (0, 1)

    @classmethod
    def of(cls, config: TrainConfig, world: World) -> Share:
        """The share of `world`'s process.

        Raises:
            ConfigError: neither micro-batches nor their rows can be divided evenly, what shares the model does not
                divide the processes, or stages are to be compiled.
        """
        plan = config.plan
        if plan.compile and plan.is_pipeline:
            raise ConfigError("plan.compile = True: stages of a pipeline are not compiled; allowed is False")
        B, n, parts = plan.batch_size, plan.grad_accumulation, plan.context_parallel
        for name in ("context_parallel", "tensor_parallel", "pipeline_parallel"):
            if world.size % getattr(plan, name):
                raise ConfigError(f"plan.{name} = {getattr(plan, name)}: must divide the {world.size} processes")
        one = parts * plan.tensor_parallel * plan.pipeline_parallel  # processes that have one share of the data
        if world.size % one:
            axes = f"{plan.tensor_parallel} x {plan.pipeline_parallel}"
            raise ConfigError(
                f"plan.tensor_parallel x plan.pipeline_parallel = {axes}: must divide the {world.size} processes"
            )
        size, rank = world.size // one, world.rank // (parts * plan.tensor_parallel) % (world.size // one)
        layout: dict[str, Any] = {}
        if plan.shares_matrices or plan.is_pipeline:  # whose mesh has all axes
            layout = {"data_parallel": size, "sharding": config.sharding if size > 1 else "none"}
        losses, tokens = world.size // plan.pipeline_parallel, (world.rank % parts, parts)
        if n % size == 0 and config.eval_batches % size == 0:
            try:
                plan = plan.replace(grad_accumulation=n // size, **layout)
            except ConfigError as error:
                raise ConfigError(f"{error} (plan.grad_accumulation = {n}, shared out over {size})") from error
            return cls(plan, slice(None), n, rank, size, losses, tokens)
        if B % size == 0:
            rows = slice(rank * B // size, (rank + 1) * B // size)
            return cls(plan.replace(batch_size=B // size, **layout), rows, n, 0, 1, losses, tokens)
        raise ConfigError(
            f"plan.batch_size = {B}: must be divisible by the {size} processes, or else both of "
            f"plan.grad_accumulation ({n}) and eval_batches ({config.eval_batches})"
        )

    def index(self, step: int, i: int) -> int:
        """Number, in the whole run, of the batch that is this process's i-th in `step`."""
        return step * self.micro_batches + self.first + i * self.stride

    def batches(self, n: int) -> range:
        """This process's among `n` batches of validation."""
        return range(self.first, n, self.stride)


class Passes:
    """Of a process that has the whole model, or a part of every block."""

    def __init__(
        self, wrapped: nn.Module, data: Dataset, share: Share, world: World, scaler: torch.amp.GradScaler
    ) -> None:
        self.wrapped, self.data, self.share, self.world, self.scaler = wrapped, data, share, world, scaler
        # compile() gives back a module too, whatever its annotation says.
        self.module = cast("nn.Module", torch.compile(wrapped)) if share.plan.compile else wrapped

    def forward(self, split: str, index: int) -> Tensor:
        """The loss of this process's rows of batch `index`."""
        inputs, targets = self.data.get_batch(split, index)
        kept = self.share.plan.logits_to_keep
        targets = targets if kept is None else targets[:, -kept:].contiguous()
        with autocast(self.share.plan, self.world.device.type), loss_context(self.share.plan):
            mine = (own_tokens(x[self.share.rows], *self.share.tokens) for x in (inputs, targets))
            return loss_of(self.module, self.share.plan, *mine)

    def train(self, step: int) -> Tensor:
        """Add up the gradients of the whole run's step `step`; this process's loss, a scalar."""
        plan, total = self.share.plan, torch.zeros((), device=self.world.device)
        for i in range(plan.grad_accumulation):
            with self.world.micro_batch(self.wrapped, last=i == plan.grad_accumulation - 1):
                loss = self.forward("train", self.share.index(step, i)) / plan.grad_accumulation
                with loss_context(plan):
                    self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            total += loss.detach()
        return total

    def validate(self, batches: int) -> Tensor:
        """The mean loss of this process's part of so many batches, a scalar."""
        self.module.eval()
        losses = [self.forward("valid", index) for index in self.share.batches(batches)]
        self.module.train()
        return torch.stack(losses).mean()


class PipelinePasses:
    """Of a stage of a pipeline: micro-batches go through all stages by the plan's schedule.

    Losses are 0 but in the last stage.
    """

    def __init__(self, stage: Stage | Stages, data: Dataset, share: Share, world: World) -> None:
        plan = share.plan
        self.stage, self.data, self.share, self.world = stage, data, share, world
        grid, loss = world.grid(plan), LOSSES[plan.loss]
        _, self.run = scheduled(stage, grid, world.device, plan, loss)
        self.evaluate = evaluation(stage, grid, world.device, plan, loss)

    def batch(self, split: str, index: int) -> tuple[Tensor, Tensor]:
        """Ids and targets of this process's rows of a batch."""
        inputs, targets = self.data.get_batch(split, index)
        return inputs[self.share.rows], targets[self.share.rows]

    def train(self, step: int) -> Tensor:
        """Add up the gradients of the whole run's step `step`; this process's loss, a scalar."""
        numbers = (self.share.index(step, i) for i in range(self.share.plan.grad_accumulation))
        ids, targets = zip(*(self.batch("train", number) for number in numbers), strict=True)
        losses: list[Tensor] = []
        self.run(torch.cat(ids), torch.cat(targets), losses)
        return self.total([loss.detach() for loss in losses])

    def validate(self, batches: int) -> Tensor:
        """The mean loss of this process's part of so many batches, a scalar."""
        self.stage.eval()
        numbers = self.share.batches(batches)
        losses = [loss for number in numbers for loss in self.evaluate(*self.batch("valid", number))]
        self.stage.train()
        return self.total(losses) / len(numbers)

    def total(self, losses: list[Tensor]) -> Tensor:
        """Their sum, a scalar; 0 of none."""
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.world.device)
