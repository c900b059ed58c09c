"""Seconds of one optimizer step of a model and plan on an accelerator, by part; and the time of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import account, sizes_for
from estimator.describe.checks import ConfigError
from estimator.describe.run import Run
from estimator.describe.settings import checked
from estimator.describe.units import SECONDS_PER_DAY, SECONDS_PER_HOUR
from estimator.hardware.accelerators import Accelerator, accelerator, cluster
from estimator.hardware.networks import slowest
from estimator.pricing.conventions import model_flops_utilisation
from estimator.timing import float8
from estimator.timing.communication import copied, messages
from estimator.timing.intervals import spread
from estimator.timing.kernels import EAGER, FUSED, Variant, table
from estimator.timing.mesh import axes, between
from estimator.timing.roofline import busy, efficiency, in_a_rank, parts
from estimator.timing.stack import Shape, StackFactor
from estimator.timing.stages import pipeline_times
from estimator.timing.waiting import exposed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.timing.roofline import Efficiency

    Array = NDArray[np.float64]

FUSED_ATTENTION = ("flash", "efficient")
# PyTorch's flash attention is the second generation from 2.2 on (release notes of January 2024).
SECOND_GENERATION = 2, 2
UPDATES = "updates"  # the axis of those that share the optimizer's states, where they are fewer than all


@dataclass(frozen=True, slots=True)
class Setup:
    """What of a run a plan does not say.

    Attributes:
        variant: how its kernels differ from the ledger's.
        attention: the fused attention kernel, if not the accelerator's own.
        dtype: of products whose factors have 16 bits, if not the plan's.
        parameter_width, gradient_width: bytes of one parameter and of one gradient in a message; None for the ledger's.
        network: between nodes: a name of `estimator.hardware.networks.networks()`, or bytes/s of one accelerator; None
            for what is assumed.
        latency: seconds of a hop between nodes; None for `estimator.timing.waiting.NETWORK_HOP` of one inside.
        deviation: standard deviation of the accelerators' speeds, as a part; None for the catalogue's.
        overlap: gradients are summed while backward goes on, as DDP does; else after it.
        update_group: accelerators that share the optimizer's states, side by side, if not all that train together (a
            ZeRO-1 in each node).
        whole_updates: each parameter is updated whole by one of them and broadcast by itself, one after the other;
            else all share each parameter, and their broadcasts go together.
        torch_version: PyTorch's (major, minor); None for a recent one.
        clock: Hz at which the accelerator runs; None for the datasheet's.
        stack_factor: what the user's own log says of his stack (`estimate calibrate --log`).
    """

    variant: Variant = EAGER
    attention: str | None = None
    dtype: str | None = None
    parameter_width: int | None = None
    gradient_width: int | None = None
    network: str | float | None = None
    latency: float | None = None
    deviation: float | None = None
    overlap: bool = True
    update_group: int | None = None
    whole_updates: bool = False
    torch_version: tuple[int, int] | None = None
    clock: float | None = None
    stack_factor: StackFactor | None = None

    def kernel(self, fused: str | None, e: Efficiency) -> str | None:
        """The fused attention whose timings count, of a step that has `fused`; None for the accelerator's own."""
        if self.attention is not None or fused in e.flash:
            return self.attention or fused
        first = self.torch_version is not None and self.torch_version < SECOND_GENERATION
        return "flash-1" if first and "flash-1" in e.flash else None

    def of(self, p: Plan) -> Setup:
        """The same, with the kernels that the plan has compiled fused, and its products in 8 bits."""
        if not p.compile:
            return self
        scales = "" if p.float8 == "none" else p.float8
        return replace(self, variant=replace(self.variant, fused=FUSED.fused, float8=scales))

    def clocked(self, e: Efficiency, a: Accelerator) -> Efficiency:
        """What kernels reach at the clock that was given.

        Raises:
            ConfigError: the catalogue has no clock to compare it with.
        """
        if self.clock is None:
            return e
        if a.boost_clock is None:
            raise ConfigError(f"clock = {self.clock / 1e6:g} MHz: the catalogue has no clock of {a.name}")
        return replace(e, clock=self.clock / a.boost_clock)


@dataclass(frozen=True, slots=True)
class Interval:
    """Between which seconds nine runs of ten lie, and what that was taken from."""

    low: float
    high: float
    source: str


@dataclass(frozen=True, slots=True)
class Time:
    """How long a run takes, in seconds.

    Attributes:
        seconds_per_step: of one optimizer step.
        steps: optimizer steps; None if it was not said how many.
        tokens_per_second: of the whole job.
        mfu: model FLOPs utilisation, model FLOPs / (seconds x peak), Chowdhery et al. 2022, appendix B; FLOPs as
            counted by the ledger, attention whole. A causal kernel does only half of that attention, so that sequences
            of hundreds of thousands of tokens can come out above 1; `mfu_by_convention["causal"]` cannot.
        hfu: the same with recomputed FLOPs counted.
        peak_flops: FLOP/s of one accelerator in the plan's precision.
        count: accelerators.
        parts: seconds of a step by `estimator.timing.roofline.PARTS`, which add up to it; empty where an MFU was given.
        mfu_by_convention: the MFU as others count (`estimator.pricing.conventions.CONVENTIONS`).
        spread: factors on the time between which nine published runs of ten lie; None where an MFU was given.
        rows: which published runs those are, a sentence.
        origin: where the efficiencies behind the prediction come from, a sentence; or that the MFU was given.
        padding: the share of all tokens that are no text.
    """

    seconds_per_step: float
    steps: int | None
    tokens_per_second: float
    mfu: float
    hfu: float
    peak_flops: float
    count: int
    parts: Mapping[str, float]
    mfu_by_convention: Mapping[str, float]
    spread: tuple[float, float] | None
    rows: str
    origin: str
    padding: float = 0.0

    @property
    def text_tokens_per_second(self) -> float:
        """Of the whole job, without padding."""
        return self.tokens_per_second * (1 - self.padding)

    @property
    def seconds(self) -> float:
        """The whole run, or one step where the number of steps was not said."""
        return self.seconds_per_step * (self.steps or 1)

    @property
    def hours(self) -> float:
        """The same in hours."""
        return self.seconds / SECONDS_PER_HOUR

    @property
    def days(self) -> float:
        """The same in days."""
        return self.seconds / SECONDS_PER_DAY

    @property
    def tokens_per_second_per_accelerator(self) -> float:
        """Of one accelerator."""
        return self.tokens_per_second / self.count

    @property
    def predicted(self) -> bool:
        """Whether the time follows from the kernels; else from an MFU that was given."""
        return self.spread is not None

    @property
    def interval(self) -> Interval | None:
        """`seconds` as far as published runs are off; None where an MFU was given."""
        if self.spread is None:
            return None
        return Interval(self.seconds * self.spread[0], self.seconds * self.spread[1], self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        plain = asdict(self)
        del plain["spread"], plain["rows"]
        return plain | {
            "seconds": self.seconds,
            "hours": self.hours,
            "tokens_per_second_per_accelerator": self.tokens_per_second_per_accelerator,
            "text_tokens_per_second": self.text_tokens_per_second,
            "interval": asdict(self.interval) if self.interval is not None else None,
        }


def step_times(
    m: ModelConfig,
    p: Plan,
    on: Accelerator | str | Path,
    setup: Setup | None = None,
    e: Efficiency | None = None,
) -> dict[str, Array]:
    """Seconds of one optimizer step by part (`PARTS`), each an array of one, on `p.accelerators` of them.

    Raises:
        ConfigError: the accelerator has no peak for a dtype, no figure for a link, or the nodes do not come out even.
    """
    a = accelerator(on)
    if p.runs_stages:
        return pipeline_times(m, p, a, (setup or Setup()).of(p), e)
    sizes = sizes_for(m, p, threads=1)
    return times(account(m, p, a.device), sizes, p, a, setup, e=e)


def times(
    form: Account,
    sizes: Mapping[str, Any],
    p: Plan,
    a: Accelerator,
    setup: Setup | None = None,
    micro_batches: Any = None,
    e: Efficiency | None = None,
) -> dict[str, Array]:
    """Seconds of one optimizer step by part at `sizes`, numbers or arrays of one length.

    Args:
        form: the account of the plan's recipe; its kernels are those of a model in its shape class.
        sizes: the legend's letters, as `estimator.eager.sizes.sizes_of` gives them; any may be an array.
        p: the plan. Its batch_size and seq_len are not looked at: `sizes` has them.
        a: the accelerator, of which p.accelerators work together.
        setup: what of a run the plan does not say.
        micro_batches: of each point, in place of the plan's grad_accumulation; above 1 only where the plan's is.
        e: what kernels reach, if not the accelerator's own.

    Raises:
        ConfigError: as for `step_times`.
    """
    turns = p.grad_accumulation if micro_batches is None else micro_batches
    setup = (setup or Setup()).of(p)
    e = setup.clocked(e or efficiency(a), a)
    if setup.update_group is not None:
        sizes = {**sizes, "D": setup.update_group}
    kernels = table(form, setup.variant)
    shape = kernels.at(sizes)
    fused = form.fused_kernel
    work = busy(
        kernels, shape, sizes, turns, a, e,
        half=setup.dtype or (p.product_dtype if p.product_dtype == "fp16" else "bf16"),
        single="tf32" if p.product_dtype == "tf32" else "fp32",
        kernel=setup.kernel(fused, e),
        imbalance=in_a_rank(p, sizes),
    )  # fmt: skip
    group = cluster(a, p.accelerators, between=between(a, setup.network))
    widths = setup.parameter_width, setup.gradient_width
    sent = messages(form, sizes, turns, *widths, whole_updates=setup.whole_updates)
    meshes = axes(group, p)
    if setup.update_group is not None:
        inner = min(setup.update_group, group.per_node)
        meshes = meshes | {UPDATES: replace(group, nodes=setup.update_group // inner, per_node=inner)}
        sent = tuple(m if m.phase != "optimizer" else replace(m, axis=UPDATES) for m in sent)
    compute = {phase.value: s for phase, s in work.phases.items()}
    waited = exposed(sent, meshes, e, compute, turns, overlap=setup.overlap, latency=setup.latency)
    if group.count > 1:  # the slowest is waited for
        waited = waited + slowest(group.count, setup.deviation) * sum(compute.values())
    if form.traced.ledger.copies:  # on the stream of the kernels, which wait for them
        if a.pcie_bandwidth is None:
            raise ConfigError(f"pcie_bandwidth = None: {a.id} has no figure for its link to the host; give one")
        waited = waited + copied(form, sizes, turns) / a.pcie_bandwidth
    found = parts(work, waited)
    return found if setup.stack_factor is None else setup.stack_factor.calibrated(found, shape_of(sizes, p))


def shape_of(sizes: Mapping[str, Any], p: Plan) -> Shape:
    """How large the kernels and messages of a run are, which decides how alike runs of one stack are."""
    return Shape(sizes["B"] * sizes["T"], sizes["d"], p.accelerators)


def predicted(
    m: ModelConfig, p: Plan, a: Accelerator, flops: Any, parameters: int, steps: int | None, count: int,
    setup: Setup | None = None,
) -> Time:  # fmt: skip
    """The time of a run of `flops.sequences` sequences a step on `count` accelerators.

    Each accelerator runs as many micro-batches a step as its share of the sequences takes, the last one full too.

    Args:
        m: what is trained.
        p: how.
        a: the accelerator.
        flops: the `estimator.answers.estimates.Flops` of the step.
        parameters: N, those that a token goes through.
        steps: optimizer steps, None if it was not said how many.
        count: accelerators.
        setup: what of a run a plan does not say.

    Raises:
        ConfigError: as for `step_times`.
    """
    if p.offload != "none":
        raise ConfigError(
            f"offload is {p.offload!r}, and neither the host's update nor its link to the accelerator has been timed; "
            "give an MFU"
        )
    if p.float8 != "none":
        float8.check_sizes(m)
    setup = (setup or Setup()).of(p)
    replicas = count // (p.tensor_parallel * p.pipeline_parallel * p.context_parallel)
    micro_batches = -(-flops.sequences // (p.batch_size * replicas))
    run = p.replace(grad_accumulation=micro_batches, data_parallel=replicas)
    plain = replace(setup, stack_factor=None)
    spent = step_times(m, run, a, plain)
    within, rows = spread({name: float(x[0]) for name, x in spent.items()}, stated=_stated(m, run, a, plain))
    if (own := setup.stack_factor) is not None:
        shape = shape_of(sizes_for(m, run, threads=1), run)
        within = own.spread({name: float(x[0]) for name, x in spent.items()}, shape)
        spent = own.calibrated(spent, shape)
        rows = f"By {len(own.runs)} logged runs of your stack, {own.source}: nine runs of ten of it."
    found = {name: float(x[0]) for name, x in spent.items()}
    seconds = sum(found.values())
    peak = a.peak_flops(p.product_dtype)
    mfu = flops.model / (seconds * peak * count)
    origin = efficiency(a).origin
    if account(m, p, a.device).fused_kernel == "efficient" and "efficient" not in efficiency(a).flash:
        origin = f"{origin} Nobody has published measurements of the memory-efficient attention: flash's."
    return _time(m, p, flops, parameters, steps, count, seconds, mfu, peak, found, within, rows, origin)


def _stated(m: ModelConfig, p: Plan, a: Accelerator, setup: Setup) -> bool:
    """Whether the attention kernel, what is in fp32 and the network were said, as far as the step has them."""
    attention = setup.attention is not None or account(m, p, a.device).fused_kernel not in FUSED_ATTENTION
    wide = bool(setup.variant.wide) or p.product_dtype not in ("bf16", "fp16")
    group = cluster(a, p.accelerators, between=between(a, setup.network))
    return attention and wide and (setup.network is not None or group.nodes == 1)


def at_mfu(
    mfu: float, m: ModelConfig, p: Plan, peak: float, flops: Any, parameters: int, steps: int | None, count: int
) -> Time:
    """The time of a run at an MFU of one's own; arguments as for `predicted`, `peak` in FLOP/s of one accelerator."""
    seconds = flops.model / (mfu * peak * count)
    return _time(m, p, flops, parameters, steps, count, seconds, mfu, peak, {}, None, "", "The MFU was given.")


def _time(
    m: ModelConfig, p: Plan, flops: Any, parameters: int, steps: int | None, count: int, seconds: float, mfu: float,
    peak: float, found: Mapping[str, float], between: tuple[float, float] | None, rows: str, origin: str,
) -> Time:  # fmt: skip
    rate = flops.sequences * p.tokens(m) / seconds
    return Time(
        seconds_per_step=seconds,
        steps=checked(Run, "steps", steps) if steps is not None else None,
        tokens_per_second=rate,
        mfu=mfu,
        hfu=mfu * (flops.forward + flops.backward) / (flops.forward + flops.backward - flops.recompute),
        peak_flops=peak,
        count=count,
        parts=found,
        mfu_by_convention=model_flops_utilisation(
            m, p.tokens(m), parameters, rate / count, peak, flops.model / (flops.sequences * p.tokens(m))
        ),
        spread=between,
        rows=rows,
        origin=origin,
    )
