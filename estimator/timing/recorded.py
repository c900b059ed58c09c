"""Seconds of a recorded step on an accelerator, by the same model as those of a symbolic one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from estimator.describe.checks import ConfigError
from estimator.timing.intervals import spread
from estimator.timing.kernels import EAGER, FUSED, recorded_table
from estimator.timing.roofline import busy, efficiency, parts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from estimator.accounting.recorded import RecordedAccount
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator

LISTS = ("foreach", "fused")


@dataclass(frozen=True, slots=True)
class RecordedTime:
    """How long a recorded step takes on one accelerator.

    Attributes:
        parts: seconds by `estimator.timing.roofline.PARTS`; they add up to the step.
        spread: factors between which nine published runs of ten lie.
        rows: which runs those are, a sentence.
        origin: where the efficiencies come from, a sentence.
        flops: of the matrix products of a step, recomputation included.
        repeated: the part of them that repeats forward.
        peak_flops: FLOP/s of the accelerator in the plan's precision.
    """

    parts: Mapping[str, float]
    spread: tuple[float, float]
    rows: str
    origin: str
    flops: int
    repeated: int
    peak_flops: float

    @property
    def seconds(self) -> float:
        """One optimizer step."""
        return sum(self.parts.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation: FLOPs that repeat none, over those of the peak in that time."""
        return (self.flops - self.repeated) / (self.seconds * self.peak_flops)


def recorded_time(account: RecordedAccount, p: Plan, a: Accelerator) -> RecordedTime:
    """The time of a step that was recorded as `p` says, on `a`; messages between accelerators are left out.

    What the step's own module multiplies in 8 bits is timed so.

    Raises:
        ConfigError: the accelerator has no peak for a dtype that the step multiplies in, or nobody timed such products
            on its architecture; or the plan says `float8`, which only the module can.
    """
    check_recorded(p)
    e = efficiency(a)
    listed = a.device == "cuda" and p.optimizer_on(a.device) in LISTS
    table = recorded_table(account, listed=listed, variant=FUSED if p.compile else EAGER)
    work = busy(
        table, table.at({}), {}, p.grad_accumulation, a, e,
        half=p.product_dtype if p.product_dtype == "fp16" else "bf16",
        single="tf32" if p.product_dtype == "tf32" else "fp32",
    )  # fmt: skip
    found = {name: float(np.asarray(x).reshape(-1)[0]) for name, x in parts(work, np.zeros(1)).items()}
    within, rows = spread(found)
    return RecordedTime(found, within, rows, e.origin, *products(account), a.peak_flops(p.product_dtype))


def check_recorded(p: Plan) -> None:
    """Whether a recorded step can be as the plan says.

    Raises:
        ConfigError: which layers multiply in 8 bits is the module's to say.
    """
    if p.float8 != "none":
        raise ConfigError(
            f"float8 = {p.float8!r}: a recorded step multiplies in 8 bits where its own module does, as torchao's "
            "convert_to_float8_training makes it; allowed is none"
        )


def products(account: RecordedAccount) -> tuple[int, int]:
    """(FLOPs of the matrix products of forward and backward, those of them that repeat forward)."""
    own = [k for k in account.ledger.kernels if k.gemm is not None and k.where.phase != "optimizer"]
    return sum(int(k.flops.number or 0) for k in own), sum(int(k.repeated.number or 0) for k in own)
