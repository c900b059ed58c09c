"""What of a run neither model nor plan says: how many accelerators, for how long, and what carries the time."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from estimator.describe.checks import ConfigError, choose, shown
from estimator.describe.selection import listed
from estimator.describe.settings import check_values, flag, integer, number, text

VERSION = re.compile(r"\d+\.\d+")
WIDE = ("norm", "rotation")  # what may be computed in fp32 in a model of 16 bits


def _network(_: str, given: Any) -> Any:
    """A number of bytes/s as a number; a name as it is: the catalogue of networks knows it."""
    if not isinstance(given, str):
        return given
    try:
        return float(given)
    except ValueError:
        return given


def _version(field: str, given: Any) -> str:
    if not isinstance(given, str) or not VERSION.match(given):
        raise ConfigError(f"{field} = {shown(given)}: must be a version such as '2.1'")
    return given


def version_of(text_: str) -> tuple[int, int]:
    """(major, minor) of a version such as "2.1.0+cu121"."""
    major, minor = text_.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor).group())  # type: ignore[union-attr]


def _wide(field: str, given: Any) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, (set, frozenset)) else listed(field, given)
    return tuple(sorted(choose(field, name, WIDE) for name in names))


@dataclass(frozen=True, slots=True)
class Run:
    """The rest of a question to `estimator.estimate`; `settings(Run)` has the declarations of its fields.

    Raises:
        ConfigError: a value is not among those allowed.
    """

    count: int | None = integer(None, "Accelerators that share the global batch.", optional="the plan's data_parallel")
    global_batch_size: int | None = integer(
        None,
        "Sequences in one optimizer step of the whole job; the accumulation follows from it.",
        most=10**12,
        optional="the micro-batch times its accumulation times the count",
        label="Global batch",
    )
    steps: int | None = integer(None, "Optimizer steps of the whole run.", most=10**12, optional="no run, only a step")
    mfu: float | None = number(
        None,
        "Model FLOPs utilisation to reckon time with: the share of the accelerator's peak that does useful work.",
        least=1e-6,
        most=1,
        optional="a prediction from the step's kernels",
        label="MFU",
    )
    network: str | float | None = text(
        None,
        "Between nodes, bytes/s of one accelerator in one direction, or the name of a well-known cluster (`estimate "
        "list networks`).",
        optional="12.5 GB/s, or the accelerator's own if less",
        label="Network between nodes",
        parse=_network,
    )
    network_latency: float | None = number(
        None,
        "Seconds of one hop between nodes.",
        most=1,  # second; above it a number is in another unit
        optional="2.8 times one inside, as NCCL reckons",
        label="Latency of a hop, s",
    )
    attention_kernel: str | None = text(
        None,
        "The fused attention whose timings count: flash-1, flash-2, flash-3 or cudnn, as far as timings of it are "
        "published for the architecture.",
        optional="what PyTorch picks",
        label="Attention kernel timed",
    )
    torch_version: str | None = text(
        None,
        "PyTorch's version, such as 2.1: before 2.2 its flash attention is the first generation.",
        optional="2.2 or later",
        label="PyTorch version",
        parse=_version,
    )
    clock: float | None = number(
        None,
        "MHz at which the accelerator runs, where it is held below its boost clock or runs above it.",
        least=100,
        most=10_000,
        optional="the datasheet's boost clock",
        label="Clock, MHz",
    )
    overlap: bool = flag(
        "Gradients are summed over the accelerators while backward goes on; else when it is over.",
        default=True,
        label="Gradients overlap backward",
    )
    wide: tuple[str, ...] = text(
        (),
        "What the software computes in fp32 in a model of 16 bits, with commas: norm, rotation (transformers, "
        "torchtune and torchtitan do both); by default nothing, as the trainer here.",
        parse=_wide,
        label="Computed in fp32",
    )

    padding: float = number(
        0.0,
        "Share of a batch's tokens that are padding: they are stored and computed as all others are, and are no text. "
        "Packed sequences have next to none.",
        least=0,
        most=1,
        below=True,
        label="Padding, share",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.attention_kernel is not None and not isinstance(self.attention_kernel, str):
            raise ConfigError(f"attention_kernel = {shown(self.attention_kernel)}: must be a name")
