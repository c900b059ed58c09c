"""The training loop, read top to bottom."""

from __future__ import annotations

import json
import math
import signal
import time
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from estimator.describe.checks import ConfigError
from trainer.files.adapters import load_base, save_adapters
from trainer.files.checkpoint import export_safetensors, random_states, set_random_states
from trainer.files.contents import CheckpointError, check_finite, check_run
from trainer.files.data import Dataset
from trainer.model.adapters import to_precision
from trainer.model.decoder import build_model
from trainer.optim.precision import loss_scaler, products_in
from trainer.optim.schedule import lr_cosine_schedule
from trainer.parallel.distributed import World, local
from trainer.parallel.saved import load_run, save_run
from trainer.run.announce import announce, matmul_peak
from trainer.run.folder import check_settings, keep_inputs, locked, newest, prune, start_point
from trainer.run.optimizer import build_optimizer
from trainer.run.passes import Passes, PipelinePasses, Share
from trainer.run.progress import Reporter, duration

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

    from trainer.optim.precision import Masters
    from trainer.parallel.distributed import Weights
    from trainer.run.settings import TrainConfig


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
    run = Training(config, world)
    with (
        Reporter(
            config.out, run.start, config.steps, config.log_every, tensorboard=config.tensorboard, quiet=world.rank > 0
        ) as reporter,
        Stop() as stop,
    ):
        expected = run.introduce(reporter)
        trained = 0.0
        for step in range(run.start, config.steps):
            clock = time.perf_counter()
            lr, loss, norm = run.step(step)
            seconds = time.perf_counter() - clock
            trained += seconds
            reporter.step(
                step + 1,
                (config.steps - step - 1) * trained / (step + 1 - run.start),
                loss=loss,
                lr=lr,
                grad_norm=norm,
                seconds=seconds,
                tokens_per_second=expected.tokens / seconds,
                mfu=expected.seconds / seconds,
            )
            last = step + 1 == config.steps
            if last or (step + 1) % config.eval_every == 0:
                valid_loss = run.validate()
                perplexity = math.exp(min(valid_loss, 700))  # e^709 is the largest float
                reporter.record(step=step + 1, valid_loss=valid_loss, perplexity=perplexity)
                reporter.say(f"step {step + 1}: validation loss {valid_loss:.4f}, perplexity {perplexity:.4g}")
            interrupted = world.any(stop.signal is not None)
            if last or interrupted or (step + 1) % config.save_every == 0:
                path = run.save(step + 1)
                if interrupted and not last:
                    again = f"python -m trainer train --config {config.out / 'config.json'} --resume"
                    reporter.say(f"stopped by a signal after step {step + 1}; saved {path}; go on with {again}")
                    return 128 + (stop.signal or signal.SIGTERM)
        run.export()
        reporter.say(f"done     {duration(trained)} of training steps; {newest(config)}")
        if (unigram := run.data.manifest.get("unigram_loss")) is not None:
            reporter.say(f"         (token frequencies alone have a validation loss of {unigram:.4f})")
    return 0


class Expected(NamedTuple):
    """What a step is held against.

    Attributes:
        tokens: that a step of the whole run sees.
        seconds: that its matrix products take at the speed of one large product on this machine.
    """

    tokens: int
    seconds: float


class Training:
    """A run that can take its next step: its data, weights and optimizer, as they were saved if it goes on.

    Attributes:
        start: steps done before.
        data: the corpus.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        self.config, self.world = config, world
        self.share = Share.of(config, world)
        plan, device = self.share.plan, world.device
        self.T = plan.seq_len or config.model.context_length
        B, vocab_size = config.plan.batch_size, config.model.vocab_size
        self.data = Dataset(config.data, self.T, B, device, seed=config.seed, vocab_size=vocab_size)
        self.m = config.model.config(self.data.vocab_size)
        plan.tokens(self.m)  # refuses a sequence longer than the model's positions
        self.source = start_point(config, world)
        check_precision(config, world)

        # The same weights on every device and in every process: they are drawn on the CPU.
        torch.manual_seed(config.seed)
        self.model = build_model(self.m, plan).to(device)
        if config.weights is not None:
            load_base(self.model, config.weights)
        to_precision(self.model, plan)
        if plan.precision == "tf32" and device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        in_parts = world.parts_gradients(plan, config.sharding)
        self.scaler = loss_scaler(plan.precision, device.type, sharded=in_parts)
        self.masters: Masters | None = None
        self.passes: Passes | PipelinePasses
        if plan.is_pipeline:
            stage, self.weights = world.prepare_stage(self.model, plan)
            self.held = self.weights
            self.passes = PipelinePasses(stage, self.data, self.share, world)
        else:
            wrapped, self.held, self.weights, self.masters = world.prepare(self.model, plan, config.sharding)
            self.passes = Passes(wrapped, self.data, self.share, world, self.scaler)
        self.optimizer = build_optimizer(self.weights, plan, config.optim, device.type)
        self.start = 0
        if self.source is not None:
            self.start = load(world, self.source, self.weights, self.optimizer, self.scaler, self.m.to_dict(), config)
        if self.masters is not None:
            self.masters.write_back()
            self.held.spread()

    def introduce(self, reporter: Reporter) -> Expected:
        """Say what is run, and whether it fits the machine; what a step is held against.

        Raises:
            ConfigError: it does not fit, and that was not said to be meant.
        """
        config, world, plan = self.config, self.world, self.share.plan
        if self.source is not None:
            reporter.say(f"resumed  {self.source}")
        beside = plan.context_parallel * plan.tensor_parallel * plan.pipeline_parallel
        shared = plan.replace(data_parallel=world.size // beside, sharding=config.sharding)
        sharing = world.size if world.device.type == "cpu" else 1  # CPU processes share the machine's memory
        estimate = announce(
            self.m,
            shared,
            world.device,
            processes=sharing,
            force=config.force,
            notes=left_out(config),
            say=reporter.say,
        )
        tokens = config.plan.batch_size * config.plan.grad_accumulation * self.T
        epochs = config.steps * tokens / self.data.tokens("train")
        reporter.say(f"run      {config.steps} steps of {tokens:,} tokens: {epochs:.2f} times {config.data}")
        flops = (estimate.forward_flops + estimate.backward_flops) * plan.grad_accumulation
        flops *= world.size // plan.pipeline_parallel
        peak = world.size * matmul_peak(world.device, products_in(plan.precision))
        reporter.say(f"MFU      of {peak / 1e12:.3g} TFLOP/s, measured now on a square matrix product")
        if world.rank == 0:
            keep_inputs(config)
        return Expected(tokens, flops / peak)

    def step(self, number: int) -> tuple[float, float, float]:
        """Move the weights once; (learning rate, loss, norm of the gradients) of the whole run's step `number`.

        Raises:
            TrainingError: loss or gradients are not finite; the weights are as before.
        """
        plan, world, o = self.share.plan, self.world, self.config.optim
        # From 1: at 0 a warm-up's learning rate is 0, and the step would do nothing.
        lr = lr_cosine_schedule(number + 1, o.lr, o.min_lr, o.warmup_steps, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = self.passes.train(number)
        self.held.gather_gradients()
        if self.masters is not None:
            self.masters.take_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = torch.zeros_like(total)
        if plan.max_grad_norm is not None:
            norm = self.weights.clip(plan.max_grad_norm)
        # Looked at before the update: what a non-finite gradient has touched is lost.
        loss_now, norm_now = torch.stack((world.total(total) / self.share.losses, norm)).tolist()
        overflowed = self.scaler.is_enabled() and not math.isfinite(norm_now)  # the scaler leaves the update out
        if not math.isfinite(loss_now) or not (math.isfinite(norm_now) or overflowed):
            what = f"the loss is {loss_now}, the gradient's norm {norm_now}"
            raise TrainingError(f"step {number + 1}: {what}; {newest(self.config)}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.masters is not None:
            self.masters.write_back()
        self.held.spread()
        self.held.clear_gradients()
        return lr, loss_now, norm_now

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the same batches each time, all processes' together."""
        loss = self.passes.validate(self.config.eval_batches)
        return float(self.world.total(loss) / self.share.losses)

    def save(self, step: int) -> Path:
        """Write a checkpoint from which the run goes on after `step` steps, and drop those that are too old.

        Raises:
            TrainingError: a weight is not finite, or the disk takes no more.
        """
        config, world = self.config, self.world
        run = {"step": step, "config": config.to_dict(), "model": self.m.to_dict(), "random": random_states()}
        run["scaler"] = self.scaler.state_dict()
        finite = torch.stack([torch.isfinite(local(p)).all() for p in self.weights.named.values()]).all()
        if world.any(not bool(finite)):  # what is kept is what a run can go on from
            raise TrainingError(f"step {step}: a weight is not finite; {newest(config)}")
        try:
            path = save_run(world, config.out, step, self.weights, self.optimizer, run=run)
        except OSError as error:
            raise TrainingError(f"step {step}: the checkpoint cannot be written ({error}); {newest(config)}") from error
        if world.rank == 0:
            prune(config.out, config.keep)
        return path

    def export(self) -> None:
        """Write the weights, or the adapters, as safetensors; one process alone holds all of them."""
        if self.world.size > 1:
            return
        out, about = self.config.out, {"config": json.dumps(self.m.to_dict())}
        if self.share.plan.adapter == "none":
            export_safetensors(self.model, out / "model.safetensors", about)
        else:
            about["plan"] = json.dumps(self.share.plan.to_dict())
            save_adapters(self.model, out / "adapters.safetensors", about)


def check_precision(config: TrainConfig, world: World) -> None:
    """Raise ConfigError for a precision that several processes cannot share."""
    if world.shares(config.sharding) and config.plan.fp32_gradients:
        raise ConfigError(
            f"plan.fp32_gradients = True: {config.sharding} sums the gradients in bfloat16; allowed is --sharding none"
        )


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
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    run = load_run(world, source, weights, optimizer)
    check_run(run, str(source))
    check_finite(weights.model, str(source))
    for name, value in run["model"].items():
        if model.get(name) != value:
            raise CheckpointError(f"{source}: of another model: {name} is {value!r}, this run's is {model.get(name)!r}")
    if not config.changed:
        check_settings(run["config"], config, source)
    for group, given in zip(optimizer.param_groups, own, strict=True):
        group.update(given)  # where settings are changed, they are this run's
    set_random_states(run["random"])
    if run.get("scaler"):
        scaler.load_state_dict(run["scaler"])
    return int(run["step"])


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
