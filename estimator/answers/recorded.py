"""What `estimate` answers of a step that was recorded: its memory and its time on an accelerator."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from estimator.hardware.accelerators import accelerator
from estimator.memory.device import recorded_memory
from estimator.timing.recorded import recorded_time

if TYPE_CHECKING:
    from pathlib import Path

    from estimator.accounting.recorded import RecordedAccount
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator
    from estimator.memory.device import Memory
    from estimator.timing.recorded import RecordedTime


class Recorded(Protocol):
    """`trainer.record`'s result."""

    @property
    def account(self) -> RecordedAccount:
        """The step."""


@dataclass(frozen=True, slots=True)
class RecordedEstimate:
    """A recorded step on one accelerator.

    Attributes:
        accelerator: the accelerator.
        memory: bytes at the peak and whether they fit.
        time: seconds of the step, by the kernels that ran; messages to other accelerators left out.
    """

    accelerator: Accelerator
    memory: Memory
    time: RecordedTime

    @property
    def fits(self) -> bool:
        """Whether the step fits."""
        return self.memory.fits

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        time = asdict(self.time) | {"seconds_per_step": self.time.seconds, "mfu": self.time.mfu}
        return {"accelerator": self.accelerator.id, "memory": self.memory.to_dict(), "time": time}


def estimate_recorded(recorded: Recorded, plan: Plan, on: Accelerator | str | Path) -> RecordedEstimate:
    """The memory and time of a recorded step on an accelerator.

    Args:
        recorded: the recording.
        plan: what it was recorded with.
        on: the accelerator, its name, or the path of a profile.

    Raises:
        ConfigError: the accelerator has no peak for a dtype that the step multiplies in.
    """
    a = accelerator(on)
    return RecordedEstimate(a, recorded_memory(recorded.account, a), recorded_time(recorded.account, plan, a))
