"""The training loop, read top to bottom."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from estimator.describe.checks import ConfigError
from estimator.describe.plan import WHOLE_MATRICES
from trainer.files.adapters import load_base, save_adapters
from trainer.files.checkpoint import CheckpointError, export_safetensors, random_states, set_random_states
from trainer.files.data import Dataset
from trainer.model.adapters import to_precision
from trainer.model.decoder import build_model
from trainer.optim.eight_bit import AdamW8bit
from trainer.optim.in_backward import InBackward
from trainer.optim.optimizers import SGD, AdamW, Lion, MuonAdamW, is_for_muon, is_matrix
from trainer.optim.precision import autocast, loss_scaler, products_in
from trainer.optim.schedule import lr_cosine_schedule
from trainer.parallel.distributed import Weights, World, load_run, local, save_run
from trainer.referee.measure import loss_of
from trainer.run.announce import announce, matmul_peak
from trainer.run.folder import check_settings, keep_inputs, locked, newest, prune, start_point
from trainer.run.progress import Reporter, duration

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import FrameType

    from estimator.describe.plan import Plan
    from trainer.run.settings import OptimSection, TrainConfig


class TrainingError(RuntimeError):
    """The run cannot go on; the message names the step and the last good checkpoint."""


def train(config: TrainConfig) -> int:
    """Run `config` to its end, or to SIGINT or SIGTERM, which save first.

    Returns:
        The exit status: 0, or 128 plus the signal's number.

    Raises:
        ConfigError: a setting cannot be, or the run does not fit the machine.
        CheckpointError: the checkpoint to go on from is broken or of another model.
        TrainingError: the loss is no longer finite, or a checkpoint cannot be written.
    """
    world = World(config.device)
    try:
        with locked(config.out, world):
            return _train(config, world)
    finally:
        world.leave()


def _train(config: TrainConfig, world: World) -> int:
    device = world.device
    share = Share.of(config, world)
    plan = share.plan
    T = plan.seq_len or config.model.context_length
    data = Dataset(config.data, T, config.plan.batch_size, device, seed=config.seed, vocab_size=config.model.vocab_size)
    m = config.model.config(data.vocab_size)
    plan.tokens(m)  # refuses a sequence longer than the model's positions
    source = start_point(config, world)
    check_precision(config, world)

    # The same weights on every device and in every process: they are drawn on the CPU.
    torch.manual_seed(config.seed)
    model = build_model(m, plan).to(device)
    if config.weights is not None:
        load_base(model, config.weights)
    to_precision(model, plan)
    if plan.precision == "tf32" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    scaler = loss_scaler(plan.precision, device.type, sharded=world.shares(config.sharding))
    wrapped, held, weights, masters = world.prepare(model, plan, config.sharding)
    # compile() gives back a module too, whatever its annotation says.
    module = cast("nn.Module", torch.compile(wrapped)) if plan.compile else wrapped
    optimizer = build_optimizer(weights, plan, config.optim, device.type)
    start = 0 if source is None else load(world, source, weights, optimizer, scaler, m.to_dict(), config)
    if masters is not None:
        masters.write_back()
        held.spread()

    def forward(split: str, index: int) -> Tensor:
        inputs, targets = data.get_batch(split, index)
        with autocast(plan, device.type):
            return loss_of(module, plan, inputs[share.rows], targets[share.rows])

    def save(step: int) -> Path:
        run = {"step": step, "config": config.to_dict(), "model": m.to_dict(), "random": random_states()}
        run["scaler"] = scaler.state_dict()
        finite = torch.stack([torch.isfinite(local(p)).all() for p in weights.named.values()]).all()
        if world.any(not bool(finite)):  # what is kept is what a run can go on from
            raise TrainingError(f"step {step}: a weight is not finite; {newest(config)}")
        try:
            path = save_run(world, config.out, step, weights, optimizer, run=run)
        except OSError as error:
            raise TrainingError(f"step {step}: the checkpoint cannot be written ({error}); {newest(config)}") from error
        if world.rank == 0:
            prune(config.out, config.keep)
        return path

    with Reporter(
        config.out, start, config.steps, config.log_every, tensorboard=config.tensorboard, quiet=world.rank > 0
    ) as reporter:
        if source is not None:
            reporter.say(f"resumed  {source}")
        notes = left_out(config)
        shared = plan.replace(data_parallel=world.size, sharding=config.sharding)
        sharing = world.size if device.type == "cpu" else 1  # CPU processes share the machine's memory
        estimate = announce(m, shared, device, processes=sharing, force=config.force, notes=notes, say=reporter.say)
        step_tokens = config.plan.batch_size * config.plan.grad_accumulation * T
        epochs = config.steps * step_tokens / data.tokens("train")
        reporter.say(f"run      {config.steps} steps of {step_tokens:,} tokens: {epochs:.2f} times {config.data}")
        step_flops = (estimate.forward_flops + estimate.backward_flops) * plan.grad_accumulation * world.size
        peak = world.size * matmul_peak(device, products_in(plan.precision))
        reporter.say(f"MFU      of {peak / 1e12:.3g} TFLOP/s, measured now on a square matrix product")
        if world.rank == 0:
            keep_inputs(config)

        trained = 0.0
        with Stop() as stop:
            for step in range(start, config.steps):
                clock = time.perf_counter()
                # From 1: at 0 a warm-up's learning rate is 0, and the step would do nothing.
                lr = lr_cosine_schedule(
                    step + 1, config.optim.lr, config.optim.min_lr, config.optim.warmup_steps, config.steps
                )
                for group in optimizer.param_groups:
                    group["lr"] = lr

                total = torch.zeros((), device=device)
                for i in range(plan.grad_accumulation):
                    with world.micro_batch(wrapped, last=i == plan.grad_accumulation - 1):
                        loss = forward("train", share.index(step, i)) / plan.grad_accumulation
                        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    total += loss.detach()
                held.gather_gradients()
                if masters is not None:
                    masters.take_gradients()
                scaler.unscale_(optimizer)
                norm = weights.clip(plan.max_grad_norm) if plan.max_grad_norm is not None else torch.zeros_like(total)
                # Looked at before the step: what a non-finite gradient has touched is lost.
                loss_now, norm_now = torch.stack((world.total(total) / world.size, norm)).tolist()
                overflowed = scaler.is_enabled() and not math.isfinite(norm_now)  # the scaler leaves the step out
                if not math.isfinite(loss_now) or not (math.isfinite(norm_now) or overflowed):
                    what = f"the loss is {loss_now}, the gradient's norm {norm_now}"
                    raise TrainingError(f"step {step + 1}: {what}; {newest(config)}")
                scaler.step(optimizer)
                scaler.update()
                if masters is not None:
                    masters.write_back()
                held.spread()
                held.clear_gradients()

                seconds = time.perf_counter() - clock
                trained += seconds
                reporter.step(
                    step + 1,
                    (config.steps - step - 1) * trained / (step + 1 - start),
                    loss=loss_now,
                    lr=lr,
                    grad_norm=norm_now,
                    seconds=seconds,
                    tokens_per_second=step_tokens / seconds,
                    mfu=step_flops / seconds / peak,
                )
                last = step + 1 == config.steps
                if last or (step + 1) % config.eval_every == 0:
                    valid_loss = validate(world, module, forward, share.batches(config.eval_batches))
                    perplexity = math.exp(min(valid_loss, 700))  # e^709 is the largest float
                    reporter.record(step=step + 1, valid_loss=valid_loss, perplexity=perplexity)
                    reporter.say(f"step {step + 1}: validation loss {valid_loss:.4f}, perplexity {perplexity:.4g}")
                interrupted = world.any(stop.signal is not None)
                if last or interrupted or (step + 1) % config.save_every == 0:
                    path = save(step + 1)
                    if interrupted and not last:
                        again = f"python -m trainer train --config {config.out / 'config.json'} --resume"
                        reporter.say(f"stopped by a signal after step {step + 1}; saved {path}; go on with {again}")
                        return 128 + (stop.signal or signal.SIGTERM)

        if world.size == 1:
            about = {"config": json.dumps(m.to_dict())}
            if plan.adapter == "none":
                export_safetensors(model, config.out / "model.safetensors", about)
            else:
                save_adapters(model, config.out / "adapters.safetensors", about | {"plan": json.dumps(plan.to_dict())})
        reporter.say(f"done     {duration(trained)} of training steps; {newest(config)}")
        if (unigram := data.manifest.get("unigram_loss")) is not None:
            reporter.say(f"         (token frequencies alone have a validation loss of {unigram:.4f})")
    return 0


@dataclass(frozen=True, slots=True)
class Share:
    """One process's part of each step: whole micro-batches or, where there are too few, rows of every one.

    The data of a step, and so its gradient, are the same for any number of processes.

    Attributes:
        plan: one process's plan.
        rows: of each batch.
        micro_batches: in a step of the whole run.
        first: the first batch of a step, or of a validation, that is this process's.
        stride: from one of its batches to the next.
    """

    plan: Plan
    rows: slice
    micro_batches: int
    first: int
    stride: int

    @classmethod
    def of(cls, config: TrainConfig, world: World) -> Share:
        """The share of `world`'s process.

        Raises:
            ConfigError: neither micro-batches nor their rows can be divided evenly.
        """
        B, n, size = config.plan.batch_size, config.plan.grad_accumulation, world.size
        if n % size == 0 and config.eval_batches % size == 0:
            return cls(config.plan.replace(grad_accumulation=n // size), slice(None), n, world.rank, size)
        if B % size == 0:
            rows = slice(world.rank * B // size, (world.rank + 1) * B // size)
            return cls(config.plan.replace(batch_size=B // size), rows, n, 0, 1)
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


@torch.no_grad()
def validate(world: World, module: nn.Module, forward: Callable[[str, int], Tensor], batches: range) -> float:
    """Mean loss over the same batches each time, all processes' together."""
    module.eval()
    mean = torch.stack([forward("valid", index) for index in batches]).mean()
    module.train()
    return float(world.total(mean) / world.size)


def build_optimizer(weights: Weights, p: Plan, o: OptimSection, device: str) -> torch.optim.Optimizer:
    """The optimizer that `p` names, with `o`'s hyper-parameters; weight decay for matrices only.

    A bias or a norm's gain has nothing that decay should keep small: it scales no input.

    Raises:
        ConfigError: it needs whole matrices and the parameters are sharded.
    """
    if weights.sharded and p.optimizer in WHOLE_MATRICES:
        raise ConfigError(f"plan.optimizer = {p.optimizer!r}: works on whole matrices; allowed is --sharding none")
    if p.update == "after":
        return _optimizer_of(weights.named, p, o, device)
    parts = {name: _optimizer_of({name: x}, p, o, device) for name, x in weights.named.items()}
    return InBackward(parts, weights.originals, weights.shard)


def _optimizer_of(named: Mapping[str, nn.Parameter], p: Plan, o: OptimSection, device: str) -> torch.optim.Optimizer:
    matrices = {name: p for name, p in named.items() if is_matrix(name, p)}
    others = {name: p for name, p in named.items() if name not in matrices}
    groups = [
        {"params": list(part.values()), "names": list(part), "weight_decay": decay}
        for part, decay in ((matrices, o.weight_decay), (others, 0.0))
        if part
    ]
    kind = p.implementation(device)
    match p.optimizer:
        case "sgd" if kind == "bundled":
            return SGD(groups, lr=o.lr)
        case "sgd" | "sgd-momentum":
            momentum = 0.9 if p.optimizer == "sgd-momentum" else 0.0
            return torch.optim.SGD(groups, lr=o.lr, momentum=momentum, foreach=kind == "foreach", fused=kind == "fused")
        case "adam":
            return torch.optim.Adam(
                groups, lr=o.lr, betas=o.betas, eps=o.eps, foreach=kind == "foreach", fused=kind == "fused"
            )
        case "lion":
            return Lion(groups, lr=o.lr, betas=o.betas)
        case "adafactor":
            return torch.optim.Adafactor(groups, lr=o.lr)
        case "adamw-8bit":
            return AdamW8bit(groups, lr=o.lr, betas=o.betas, eps=o.eps)
        case "muon":
            return build_muon(named, o, kind)
        case _ if kind == "bundled":
            return AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps)
        case _:
            return torch.optim.AdamW(
                groups, lr=o.lr, betas=o.betas, eps=o.eps, foreach=kind == "foreach", fused=kind == "fused"
            )


def build_muon(named: Mapping[str, nn.Parameter], o: OptimSection, kind: str) -> torch.optim.Optimizer:
    """Muon for the blocks' matrices, AdamW for all else, experts' tensors of three dimensions included."""
    inside = [name for name, p in named.items() if is_for_muon(name, p)]
    outside = [name for name in named if name not in inside]
    optimizer = MuonAdamW(
        [named[name] for name in inside],
        [named[name] for name in outside],
        lr=o.lr,
        weight_decay=o.weight_decay,
        foreach=kind == "foreach",
        fused=kind == "fused",
    )
    for group, names in zip(optimizer.param_groups, filter(None, (inside, outside)), strict=True):
        group["names"] = names
    return optimizer


def check_precision(config: TrainConfig, world: World) -> None:
    """Raise ConfigError for a precision that several processes cannot share."""
    if world.size > 1 and config.plan.fp32_gradients:
        raise ConfigError("plan.fp32_gradients = True: DDP sums the gradients in bfloat16; allowed is one process")


def load(
    world: World,
    source: Path,
    weights: Weights,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    model: dict[str, Any],
    config: TrainConfig,
) -> int:
    """Restore a run from `source`; the number of steps done.

    Raises:
        CheckpointError: see `load_run`; or the model has the same shapes and other settings.
        ConfigError: the run's settings are others than the checkpoint's, and that was not said to be meant.
    """
    run = load_run(world, source, weights, optimizer)
    check_run(run, source)
    for name, value in run["model"].items():
        if model.get(name) != value:
            raise CheckpointError(f"{source}: of another model: {name} is {value!r}, this run's is {model.get(name)!r}")
    if not config.changed:
        check_settings(run["config"], config, source)
    set_random_states(run["random"])
    if run.get("scaler"):
        scaler.load_state_dict(run["scaler"])
    return int(run["step"])


def check_run(run: Any, source: Path) -> None:
    """Raise CheckpointError unless what a checkpoint holds beside weights and optimizer is what a run puts there."""
    kinds = {"step": int, "config": dict, "model": dict, "random": dict, "scaler": dict}
    for name, kind in kinds.items():
        found = run.get(name) if isinstance(run, dict) else None
        if type(found) is not kind:
            raise CheckpointError(f"{source}: its run.{name} is a {type(found).__name__}, must be a {kind.__name__}")
    if run["step"] < 0:
        raise CheckpointError(f"{source}: its run.step is {run['step']}, must be at least 0")
    states = run["random"].get("cpu"), *(run["random"].get("cuda") or ())
    if not all(isinstance(x, Tensor) and x.dtype == torch.uint8 and x.ndim == 1 for x in states):
        raise CheckpointError(f"{source}: its run.random must hold the generators' states, rows of bytes")
    if states[0].shape != torch.get_rng_state().shape:
        raise CheckpointError(
            f"{source}: its run.random.cpu has {states[0].numel()} bytes, a generator's state has 5056"
        )


def left_out(config: TrainConfig) -> list[str]:
    """What the run does and the estimate does not know."""
    return [
        note
        for note, applies in (("torch.compile, which fuses ops and so saves less", config.plan.compile),)
        if applies
    ]


class Stop:
    """Remembers SIGINT and SIGTERM until the step is done; a second one interrupts at once.

    Attributes:
        signal: the number of the signal that came; None if none did.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> Self:
        self.before = {number: signal.signal(number, self.remember) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def remember(self, number: int, _: FrameType | None) -> None:
        """Handle a signal."""
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
