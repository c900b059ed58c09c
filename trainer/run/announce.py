"""What the run will take, said before it starts: the estimator's figures against this machine's."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from estimator.describe.checks import ConfigError
from estimator.describe.units import GIB
from trainer.system.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

MATMUL = {"cpu": 1024, "cuda": 8192}  # rows and columns: large enough that larger ones are not faster, still short


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a step takes: of one process or, of a pipeline, of one process of each stage.

    Attributes:
        parameters: number of parameters, of all stages together.
        peak_bytes: the most bytes of live tensors in a steady step, in the stage that needs the most.
        forward_flops: of one micro-batch, in all stages together.
        backward_flops: likewise.
    """

    parameters: int
    peak_bytes: int
    forward_flops: int
    backward_flops: int


def footprint(m: ModelConfig, p: Plan, device: str) -> Footprint:
    """The estimator's figures for a step of `m` run as `p` on `device` ("cpu" or "cuda")."""
    import estimator as est  # noqa: PLC0415  (its symbolic half takes a second to import: not for `--help`)

    stages = [est.account(m, p, device, stage).evaluate(m, p) for stage in range(p.pipeline_parallel)]
    return Footprint(
        sum(v.parameters for v in stages),
        max(v.peak_bytes for v in stages),
        sum(v.forward_flops for v in stages),
        sum(v.backward_flops for v in stages),
    )


def announce(
    m: ModelConfig,
    p: Plan,
    device: torch.device,
    *,
    processes: int,
    force: bool,
    notes: list[str],
    say: Callable[[str], None],
) -> Footprint:
    """Say what a step takes on this machine, and return it.

    Args:
        m: the model.
        p: one process's share of a step.
        device: where it runs.
        processes: how many share this machine's memory, where that is the CPU's.
        force: go on where it does not fit.
        notes: what the run does that the estimate leaves out.
        say: prints a line.

    Raises:
        ConfigError: the peak exceeds the memory that is free, and `force` is not set.
    """
    f = footprint(m, p, device.type)
    free = available_memory(device) // (processes if device.type == "cpu" else 1)
    T = p.tokens(m)
    step_flops = (f.forward_flops + f.backward_flops) * p.grad_accumulation
    say(f"model    {m.family}, {m.num_layers} x {m.d_model}, {f.parameters:,} parameters")
    say(
        f"step     {p.batch_size} x {T} tokens x {p.grad_accumulation} micro-batches a process, "
        f"{step_flops / 1e12:.3g} TFLOP in matrix products"
    )
    say(f"memory   peak of live tensors {f.peak_bytes / GIB:.3f} GiB, free {free / GIB:.1f} GiB")
    for note in notes:
        say(f"         not in the estimate: {note}")
    if f.peak_bytes > free and not force:
        need = f"{f.peak_bytes / GIB:.2f} GiB, {free / GIB:.2f} GiB are free"
        raise ConfigError(
            f"plan.batch_size = {p.batch_size}: the step needs {need}; allowed is a smaller batch, "
            "plan.checkpointing = 'block', or --force to try all the same"
        )
    return f


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of a large square matrix product here and now: the peak that the run's MFU is measured against.

    A data sheet's peak is not known for most CPUs and not reached by any GPU; this one is what the same library
    reaches on the easiest shape. The best of repeats, since what disturbs a measurement only ever slows it.
    """
    n = MATMUL[device.type]
    a = torch.randn(n, n, device=device, dtype=dtype)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
