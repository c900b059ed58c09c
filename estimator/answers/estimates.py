"""estimate(model, plan, accelerator): the account on one model and machine, with time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

from estimator.accounting.accounts import Account, Values, account, sizes_for, stage_account
from estimator.answers.assumptions import Assumption, assumptions
from estimator.answers.notes import (
    notes,
    notes_of_card,
    notes_of_device,
    notes_of_host,
    notes_of_memory,
    notes_of_stages,
)
from estimator.answers.recorded import Recorded, RecordedEstimate, estimate_recorded
from estimator.describe.catalogue import number
from estimator.describe.checks import ConfigError, TooLargeError, choose
from estimator.describe.model import ModelConfig
from estimator.describe.pipeline import least_micro_batches, telling_stages
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from estimator.describe.run import Run, version_of
from estimator.describe.settings import checked, limits
from estimator.describe.words import in_words
from estimator.hardware.accelerators import Accelerator, accelerator
from estimator.hardware.networks import network as network_of
from estimator.memory.device import Memory, memory
from estimator.pricing.conventions import CONVENTIONS, flops_per_token
from estimator.timing.kernels import Variant
from estimator.timing.speed import Setup, Time, at_mfu, predicted

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    import pandas as pd

    from estimator.timing.stack import StackFactor

WITHOUT_FLASH = ("volta", "turing")  # flash_api.cpp, mha_fwd: "FlashAttention only supports Ampere GPUs or newer."


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of one optimizer step of the whole job (matrix products, 2 a multiply-add; the optimizer's arithmetic).

    Attributes:
        forward, backward: of one micro-batch on one accelerator; backward includes what is recomputed.
        recompute: the part of backward that repeats forward.
        optimizer: of one optimizer step.
        sequences: sequences in one optimizer step.
        batch_size: sequences in a micro-batch.
        whole: forward and backward of a micro-batch, nothing recomputed, of the whole model; None where one accelerator
            has all of it.
        ranks: accelerators that compute a micro-batch together.
    """

    forward: int
    backward: int
    recompute: int
    optimizer: int
    sequences: int
    batch_size: int
    whole: int | None = None
    ranks: int = 1

    @property
    def model(self) -> int:
        """FLOPs of a step that any implementation needs: forward and backward of all sequences, nothing recomputed."""
        own = self.forward + self.backward - self.recompute
        return (own if self.whole is None else self.whole) * self.sequences // self.batch_size

    @property
    def step(self) -> int:
        """FLOPs of a step that are done: forward, backward with recomputation, optimizer."""
        return ((self.forward + self.backward) * self.sequences // self.batch_size + self.optimizer) * self.ranks


@dataclass(frozen=True, eq=False)
class Estimate:
    """What `estimate` returns: everything about one model, plan and accelerator.

    Attributes:
        model, plan, accelerator: what was asked.
        account: the closed forms behind the figures.
        values: the account at this model and plan: of a pipeline those of the stage that needs the most memory.
        whole: the same of one accelerator with the whole model.
        memory: bytes on one accelerator.
        flops: FLOPs of a step.
        time: how long it takes, predicted from the kernels or reckoned with a given MFU; None where neither can be, and
            a note says why.
        notes: what the reader should know of how the figures came about.
        setup: what of the run the plan does not say.
        stages: of a pipeline the memory of each stage, of which `memory` is the one that needs the most.
    """

    model: ModelConfig
    plan: Plan
    accelerator: Accelerator
    account: Account
    values: Values
    whole: Values
    memory: Memory
    flops: Flops
    time: Time | None
    notes: tuple[str, ...]
    setup: Setup
    stages: tuple[Memory, ...] = ()

    @cached_property
    def assumptions(self) -> tuple[Assumption, ...]:
        """What a predicted time rests on beside the plan, with what other choices would change; else nothing."""
        if self.time is None or not self.time.predicted:
            return ()
        micro_batches = -(-self.flops.sequences // (self.plan.batch_size * self.plan.data_parallel))
        return assumptions(self.model, self.plan.replace(grad_accumulation=micro_batches), self.accelerator, self.setup)

    @cached_property
    def memory_notes(self) -> tuple[str, ...]:
        """What the messages' bytes at the peak are of, and why the driver shows more than is needed."""
        return tuple(notes_of_memory(self.plan, self.memory))

    @property
    def flops_per_token(self) -> dict[str, float]:
        """Model FLOPs of a token in training by each of `estimator.pricing.conventions.CONVENTIONS`."""
        tokens = self.plan.tokens(self.model)
        ledger, active = self.flops.model / (self.flops.sequences * tokens), self.values.active_parameters
        return {name: flops_per_token(self.model, tokens, active, name, ledger) for name in CONVENTIONS}

    @property
    def fits(self) -> bool:
        """Whether the step fits the accelerator's memory."""
        return self.memory.fits

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        modules = {name: asdict(form) for name, form in self.values.modules.items()}
        return {
            "model": self.model.to_dict(),
            "model_in_words": in_words(self.model),
            "plan": self.plan.to_dict() | {"seq_len": self.plan.tokens(self.model)},
            "accelerator": self.accelerator.id,
            "fits": self.fits,
            "parameters": self.values.parameters,
            "active_parameters": self.values.active_parameters,
            "trained_parameters": self.values.trained_parameters,
            "memory": self.memory.to_dict(),
            "activation_bytes": self.values.activation_bytes,
            "flops": asdict(self.flops)
            | {"model": self.flops.model, "step": self.flops.step, "per_token": self.flops_per_token},
            "time": self.time.to_dict() if self.time is not None else None,
            "assumptions": [x.to_dict() for x in self.assumptions],
            "modules": modules,
            "notes": [*self.notes, *self.memory_notes],
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a part of the model and one for the whole; columns are the account's forms."""
        import pandas as pd  # noqa: PLC0415 - half a second that only this needs

        rows = {name: asdict(form) for name, form in self.values.modules.items()}
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.loc["total"] = frame.sum()
        return frame.rename_axis("module")


@overload
def estimate(
    model: Recorded, plan: Plan | None = None, on: Accelerator | str | Path = "a100-80gb-sxm"
) -> RecordedEstimate: ...
@overload
def estimate(
    model: ModelConfig | str,
    plan: Plan | None = ...,
    on: Accelerator | str | Path = "a100-80gb-sxm",
    *,
    mfu: float | None = ...,
    steps: int | None = ...,
    global_batch_size: int | None = ...,
    count: int | None = ...,
    threads: int | None = ...,
    network: str | float | None = ...,
    network_latency: float | None = ...,
    attention_kernel: str | None = ...,
    torch_version: str | None = ...,
    clock: float | None = ...,
    overlap: bool = ...,
    wide: Collection[str] = ...,
    padding: float = ...,
    stack_factor: StackFactor | None = ...,
) -> Estimate: ...
def estimate(
    model: ModelConfig | str | Recorded,
    plan: Plan | None = None,
    on: Accelerator | str | Path = "a100-80gb-sxm",
    *,
    mfu: float | None = None,
    steps: int | None = None,
    global_batch_size: int | None = None,
    count: int | None = None,
    threads: int | None = None,
    network: str | float | None = None,
    network_latency: float | None = None,
    attention_kernel: str | None = None,
    torch_version: str | None = None,
    clock: float | None = None,
    overlap: bool = True,
    wide: Collection[str] = (),
    padding: float = 0.0,
    stack_factor: StackFactor | None = None,
) -> Estimate | RecordedEstimate:
    """Everything about training `model` as `plan` says on an accelerator.

    Args:
        model: a configuration or the name of a preset; or a step of any module (`trainer.record`), which is answered
            with its memory and time, and goes with `plan` and `on` alone.
        plan: how a step is run; a bare `Plan()` by default.
        on: the accelerator, its name, or the path of a profile.
        mfu: model FLOPs utilisation to reckon time with, above 0 and at most 1; None to predict the time from the
            step's kernels (`estimator.timing.speed`). Where that cannot be, there is no time and a note says why.
        steps: optimizer steps of the run.
        global_batch_size: sequences in an optimizer step of the whole job; the accumulation follows from it
            (`accumulated`). By default the plan's micro-batch times its accumulation times `count`.
        count: accelerators of the job, by default the plan's data_parallel; each runs the plan on its own sequences.
        threads: CPU threads, for a profile of a CPU.
        network: between nodes: bytes/s of one accelerator in one direction, or the name of a well-known cluster
            (`estimator.hardware.networks.networks()`); by default 12.5 GB/s, or the accelerator's own if less.
        network_latency: seconds of one hop between nodes; by default 2.8 times one inside, as NCCL reckons.
        attention_kernel: the fused attention: "flash-1", "flash-2", "flash-3" or "cudnn" as far as timings of it are
            published for the architecture; by default what PyTorch picks.
        torch_version: PyTorch's version, such as "2.1": before 2.2 its flash attention is the first generation.
        clock: MHz at which the accelerator runs; by default the datasheet's boost clock.
        overlap: gradients are summed over the accelerators while backward goes on; else when it is over.
        wide: what the software computes in fp32 in a model of 16 bits, "norm" and "rotation" (transformers, torchtune
            and torchtitan do both); by default nothing, as the trainer here.
        padding: the share of a batch's tokens that are padding, which costs what text does.
        stack_factor: what `estimate calibrate --log` found on the user's own stack.

    Raises:
        ConfigError: a name is unknown, a figure out of its range, the accelerator has no peak for the precision.
    """
    if not isinstance(model, ModelConfig | str):
        return estimate_recorded(model, plan or Plan(), on)
    run = Run(
        count=count,
        global_batch_size=global_batch_size,
        steps=steps,
        mfu=mfu,
        network=network,
        network_latency=network_latency,
        attention_kernel=attention_kernel,
        torch_version=torch_version,
        clock=clock,
        overlap=overlap,
        wide=wide,  # type: ignore[arg-type]  # a declared text takes any collection of names
        padding=padding,
    )
    m = preset(model) if isinstance(model, str) else model
    p = accumulated(replicated(plan if plan is not None else Plan(), run.count), run.global_batch_size)
    count = p.accelerators
    device = accelerator(on)
    if device.device not in ("cuda", "cpu"):
        raise ConfigError(
            f"accelerator = {device.id!r}: it runs PyTorch's {device.device} backend, whose memory rules are not "
            "modelled; allowed are accelerators of the cuda and cpu backends"
        )
    check_kernel(p, device)
    stages = tuple(_stages(m, p, device, threads))
    worst = max(range(len(stages)), key=lambda stage: stages[stage].needed, default=0)
    a, sizes = account(m, p, device.device, worst), sizes_for(m, p, threads, worst)
    values = a.values(sizes)
    apart = p.accelerators > p.data_parallel or p.expert_parallel > 1
    together = _alone(m, p, device.device, threads) if apart else values
    own = together if p.is_pipeline or p.expert_parallel > 1 else values
    flops = Flops(
        own.forward_flops,
        own.backward_flops,
        own.recompute_flops,
        own.optimizer_flops,
        run.global_batch_size or p.batch_size * p.grad_accumulation * p.data_parallel,
        p.batch_size,
        together.forward_flops + together.backward_flops - together.recompute_flops if own is not together else None,
        p.tensor_parallel * p.context_parallel,
    )
    setup = Setup(
        Variant(wide=frozenset(run.wide)),
        attention=run.attention_kernel,
        torch_version=None if run.torch_version is None else version_of(run.torch_version),
        clock=None if run.clock is None else 1e6 * run.clock,
        network=run.network,
        latency=run.network_latency,
        overlap=run.overlap,
        stack_factor=stack_factor,
    )
    said = [*notes(m, p, run.global_batch_size), *notes_of_stages(worst, len(stages))]
    said += [*notes_of_card(device, p.product_dtype), *notes_of_device(p, device.device)]
    if run.network is not None:
        network_of(run.network)  # refused by name here, as it would only be a note below
    time = None
    if run.mfu is not None:
        peak = device.peak_flops(p.product_dtype)
        time = at_mfu(run.mfu, m, p, peak, flops, together.active_parameters, run.steps, count)
    else:
        try:
            time = predicted(m, p, device, flops, together.active_parameters, run.steps, count, setup)
        except ConfigError as error:  # no peak, no link, no calibration: marked, never guessed
            said.append(f"No time is predicted: {error}.")
    if time is not None:
        time = replace(time, padding=run.padding)
    held = memory(a, values, sizes, device)
    said += notes_of_host(p, held.host, device.device)
    return Estimate(m, p, device, a, values, together, held, flops, time, tuple(said), setup, stages)


def _alone(m: ModelConfig, p: Plan, device: str, threads: int | None) -> Values:
    """The figures of one accelerator with the whole model, which those compute together that share it."""
    alone = p.replace(
        tensor_parallel=1, pipeline_parallel=1, pipeline_schedule="1f1b", virtual_stages=1, sequence_parallel=False,
        vocabulary_parallel=False, context_parallel=1, expert_parallel=1, data_parallel=p.copies,
    )  # fmt: skip
    return account(m, alone, device).values(sizes_for(m, alone, threads))


def _stages(m: ModelConfig, p: Plan, device: Accelerator, threads: int | None) -> Iterator[Memory]:
    """The memory of each stage of a pipeline; nothing without one."""
    for stage in range(p.pipeline_parallel if p.is_pipeline else 0):
        a, sizes = stage_account(m, p, device.device, stage), sizes_for(m, p, threads, stage)
        yield memory(a, a.values(sizes), sizes, device)


def check_kernel(p: Plan, a: Accelerator) -> None:
    """Raise ConfigError for an attention kernel, or products in 8 bits, that `a` has not."""
    if p.float8 != "none" and "fp8" not in a.peak:
        raise ConfigError(f"float8 = {p.float8!r}: {a.id} multiplies in no floats of 8 bits; allowed is none")
    if p.attention == "sdpa-flash" and a.architecture in WITHOUT_FLASH:
        raise ConfigError(
            f"attention = 'sdpa-flash': CUDA's is for Ampere and newer, {a.id} is a {a.architecture}; allowed are "
            "naive, naive-fp32, sdpa, sdpa-math, sdpa-efficient"
        )


def replicated(plan: Plan, count: int | None) -> Plan:
    """`plan` on `count` accelerators, None for as many as it says.

    Raises:
        ConfigError: the plan says another number than `count`, or one that does not divide it.
    """
    if count is None:
        return plan
    count = checked(Run, "count", count)
    for name in ("tensor_parallel", "pipeline_parallel", "context_parallel"):
        if count % getattr(plan, name):
            raise ConfigError(f"count = {count}: the plan's {name} is {getattr(plan, name)}; it must divide it")
    replicas = count * plan.data_parallel // plan.accelerators
    if plan.data_parallel not in (1, replicas):
        raise ConfigError(f"count = {count}: the plan's data_parallel is {plan.data_parallel}; allowed is the same")
    return plan.replace(data_parallel=replicas)


def accumulated(plan: Plan, global_batch_size: int | None) -> Plan:
    """`plan` with as many micro-batches a step as `global_batch_size` takes, the last one not always full.

    Raises:
        ConfigError: the plan says another accumulation, or its micro-batches alone are more sequences than that.
    """
    if global_batch_size is None:
        return plan
    wanted = checked(Run, "global_batch_size", global_batch_size)
    at_once = plan.batch_size * plan.data_parallel
    if wanted < at_once:
        raise ConfigError(
            f"global_batch_size = {wanted}: a micro-batch of {plan.batch_size} on {plan.data_parallel} has {at_once} "
            "sequences; allowed is at least that many"
        )
    turns = -(-wanted // at_once)
    if plan.grad_accumulation not in (1, turns):
        raise ConfigError(
            f"grad_accumulation = {plan.grad_accumulation}: {wanted} sequences in micro-batches of {plan.batch_size} "
            f"on {plan.data_parallel} take {turns}; allowed is that, or to leave it out"
        )
    return plan.replace(grad_accumulation=turns)


def max_batch_size(
    model: ModelConfig | str,
    plan: Plan | None = None,
    on: Accelerator | str | Path | float = "a100-80gb-sxm",
    *,
    global_batch_size: int | None = None,
) -> int:
    """The largest micro-batch whose step fits: 0 if not even one sequence does.

    Args:
        model: a configuration or the name of a preset.
        plan: how a step is run; its batch_size is not looked at.
        on: an accelerator, on which `Memory.needed` must fit; or a number of bytes, in which the live tensors of a CUDA
            step (`Memory.peak`) must.
        global_batch_size: sequences in an optimizer step of the whole job. The accumulation follows from it for each
            micro-batch, and a micro-batch is no larger than an accelerator's share.
    """
    m = preset(model) if isinstance(model, str) else model
    p = plan if plan is not None else Plan()
    if isinstance(on, (int, float)):
        number("bytes", on, 1)
        device, name = None, "cuda"
    else:
        device = accelerator(on)
        name = choose("device", device.device, ("cuda", "cpu"))
        check_kernel(p, device)

    def spare(batch_size: int, turns: int) -> tuple[int, int] | None:
        """(bytes left free, bytes of gradients) of steps of so many micro-batches; None beyond 64 bits."""
        trial = p.replace(batch_size=batch_size, grad_accumulation=turns)
        each = [spare_of(trial, stage) for stage in telling_stages(p)]
        return None if None in each else min(x for x in each if x is not None)

    def spare_of(trial: Plan, stage: int) -> tuple[int, int] | None:
        a, sizes = account(m, trial, name, stage), sizes_for(m, trial, stage=stage)
        try:
            values = a.values(sizes)
        except TooLargeError:
            if trial.batch_size == 1:
                raise
            return None
        if device is None:
            return int(on) - values.peak_bytes, values.gradient_bytes  # type: ignore[arg-type]  # it is a number
        return device.memory_bytes - memory(a, values, sizes, device).needed, values.gradient_bytes

    def fits(batch_size: int) -> bool:
        left = spare(batch_size, turns)
        return left is not None and left[0] >= 0

    turns, largest = p.grad_accumulation, limits(Plan)["batch_size"]
    if global_batch_size is not None:
        turns, largest = 2, checked(Run, "global_batch_size", global_batch_size) // p.data_parallel
    fewest = least_micro_batches(p)
    if fewest > 1:
        turns, largest = max(turns, fewest), largest // fewest if global_batch_size is not None else largest
    elif global_batch_size is not None:
        # A whole share at once adds up no gradients: it needs less than with them, by no more than what they take.
        left = spare(largest, turns) if largest else None
        if left is not None and sum(left) >= 0 and spare(largest, 1)[0] >= 0:  # type: ignore[index]  # it needs less
            return largest
        largest -= 1
    if largest < 1 or not fits(1):
        return 0
    least, most = 1, 2
    while most <= largest and fits(most):
        least, most = most, 2 * most
    most = min(most, largest + 1)
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
