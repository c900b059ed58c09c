"""Data parallelism: which messages a step sends. How long they take is `estimator.timing.waiting`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce")


@dataclass(frozen=True, slots=True)
class Message:
    """A collective of a step over all data-parallel accelerators.

    Attributes:
        collective: one of `COLLECTIVES`.
        phase: "forward", "backward" (hidden behind that phase's kernels) or "optimizer" (waited for).
        nbytes: bytes of the whole tensor, all of its messages in the phase together.
        pieces: into how many messages they are cut; the first has nothing to hide behind, nor has the last.
    """

    collective: str
    phase: str
    nbytes: Any
    pieces: Any


def messages(
    sharding: str, parameter_bytes: Any, gradient_bytes: Any, units: Any, micro_batches: Any
) -> tuple[Message, ...]:
    """The collectives of one optimizer step.

    They are those of the implementations whose memory is accounted (`estimator.parallel.data`). DDP sums the gradients
    in the last backward. ZeRO-1 does too, and gathers the updated parameters after the step. FSDP gathers each unit's
    parameters before its forward and scatters its gradients, in every micro-batch; as ZeRO-3 it gathers them again
    before backward, as ZeRO-2 it has kept them.

    Args:
        sharding: as in `Plan`.
        parameter_bytes: of the whole model, as they are sent.
        gradient_bytes: likewise.
        units: parts of the model that are sent as one (blocks, and one for all else).
        micro_batches: forward and backward passes in a step.
    """
    summed = Message("all-reduce", "backward", gradient_bytes, units)
    if sharding == "none":
        return (summed,)
    if sharding == "zero1":
        return (summed, Message("all-gather", "optimizer", parameter_bytes, units))
    pieces = units * micro_batches
    phases = ("forward", "backward") if sharding == "zero3" else ("forward",)
    gathers = (Message("all-gather", phase, parameter_bytes * micro_batches, pieces) for phase in phases)
    return (*gathers, Message("reduce-scatter", "backward", gradient_bytes * micro_batches, pieces))
