"""`trainer.record`: a step of any module, at full size, in seconds: its peak, its timeline and whose bytes they are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from estimator.accounting.recorded import RecordedAccount, nbytes
from estimator.describe.checks import choose
from estimator.eager.ledger import Category, Phase
from estimator.timing.recorded import check_recorded
from trainer.referee.recorder.assumptions import Assumptions
from trainer.referee.recorder.failures import said_by
from trainer.referee.recorder.ledger import Reader
from trainer.referee.recorder.session import LIBRARIES, recorded, recording
from trainer.referee.recorder.steps import as_step, check, eager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from estimator.describe.plan import Plan
    from estimator.eager.ledger import Ledger, Where

DEVICES = ("cpu", "cuda")


class Line(NamedTuple):
    """A line of source."""

    file: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True, eq=False)
class Recording:
    """A steady step, event by event.

    Attributes:
        account: the step as the project's account.
        lines: the line of source of each event; None where no line of the user's was running.
        assumptions: what was assumed where the code asked for values that are not computed, and how often.
        seconds: how long the recording took.
        parameters: number of parameters, shared ones once.
        saved_bytes: bytes that the step itself has made and autograd keeps when its first backward begins; None of a
            recording of bytes alone.
        notes: what else is not as it would be in a real step, a sentence each.
    """

    account: RecordedAccount
    lines: list[Line | None]
    assumptions: Mapping[Any, int]
    seconds: float
    parameters: int
    saved_bytes: int | None
    notes: tuple[str, ...] = ()

    @property
    def ledger(self) -> Ledger:
        """The project's ledger of it."""
        return self.account.ledger

    @property
    def peak_bytes(self) -> int:
        """The most bytes of live tensors at any moment."""
        return self.account.peak_bytes

    @property
    def peak_where(self) -> Where:
        """Phase, module and operator of the allocation that makes it so many."""
        return self.account.peak_where

    @property
    def peak_line(self) -> Line | None:
        """The line of source whose statement that is; in backward, whose gradient."""
        return self.lines[self.account.peak]

    @property
    def categories(self) -> dict[str, int]:
        """Bytes at the peak by what they are for; they add up to it."""
        return self.account.peak_categories

    @property
    def modules(self) -> dict[str, int]:
        """Bytes at the peak by the module that made them, most first; they add up to it."""
        return self.account.peak_modules

    @property
    def messages(self) -> dict[tuple[str, str], tuple[int, int]]:
        """Of each kind and axis of messages to other ranks, how many this rank takes part in, and bytes of them all."""
        found: dict[tuple[str, str], tuple[int, int]] = {}
        for sent in self.ledger.messages:
            count, total = found.get((sent.kind, sent.axis), (0, 0))
            found[sent.kind, sent.axis] = count + 1, total + nbytes(sent.nbytes.number)
        return found

    def bytes_before(self, category: Category) -> int:
        """Bytes of a category that are alive before the step."""
        own = (e.storage.nbytes.number for e in self.ledger.events if e.where.phase is Phase.SETUP)
        kinds = (e.storage.category for e in self.ledger.events if e.where.phase is Phase.SETUP)
        return sum(nbytes(n) for n, kind in zip(own, kinds, strict=True) if kind is category)

    @cached_property
    def _live(self) -> NDArray[np.int64]:
        return self.account.delta.cumsum()

    def live_at(self, event: int) -> int:
        """Live bytes after an event of the ledger."""
        return int(self._live[event])

    def most_in(self, phase: Phase) -> int | None:
        """The event of a phase after which most bytes are alive; None where nothing happens in it."""
        own = [i for i, e in enumerate(self.ledger.events) if e.where.phase is phase]
        return max(own, key=self.live_at, default=None)

    @property
    def timeline(self) -> NDArray[np.int64]:
        """Live bytes after each event of the step."""
        setup = sum(e.where.phase is Phase.SETUP for e in self.ledger.events)
        return self._live[setup:]

    def __str__(self) -> str:
        where = f"{self.peak_where.phase}, {self.peak_where.module or 'the model'}, {self.peak_where.op}"
        return f"{self.peak_bytes:,} bytes in {where}" + (f", {self.peak_line}" if self.peak_line else "")


def record(
    build: Callable[[], Any], plan: Plan | None = None, device: str = "cpu", *, bytes_alone: bool = False
) -> Recording:
    """Record a training step of what `build` returns.

    PyTorch itself runs the step, on tensors that have shapes and no data, at full size: what it allocates and frees is
    written down, and nothing is computed.

    Args:
        build: makes, without arguments, one of: a module, which is called with token ids and must return its loss or
            something with a `loss`; (module, loss, inputs), where `loss(module, *inputs)` is a tensor; a step, which is
            callable and has `model`, `optimizer` and `inputs`.
        plan: micro-batches, optimizer, clipping and precision of what is not a step already; a `Plan()` by default.
        device: whose rules.
        bytes_alone: only what is alive when, in half the time: what autograd keeps is among what is temporary, and
            there are no kernels.

    Raises:
        ConfigError: what `build` returned is none of these, its code raises an error or wants values that are not
            computed, the plan says `float8`, or the extension cannot be compiled.
    """
    choose("device", device, DEVICES)
    if plan is not None:
        check_recorded(plan)
    began = time.perf_counter()
    assumptions = Assumptions(LIBRARIES)
    with recording(assumptions, device) as native:
        with said_by("the step"):
            step = as_step(build(), plan, device)
            check(step, device)
            with eager(step, assumptions):
                log, first, known, saved, saved_bytes = recorded(native, step, assumptions, saved=not bytes_alone)
        parameters = sum(p.numel() for p in step.model.parameters())
        del step
    reading = Reader(log, known, device, torch.get_num_threads(), saved, kernels=not bytes_alone).read(first)
    places = [Line(*place) for place in log.lines]
    return Recording(
        RecordedAccount(reading.ledger, device, reading.checkpoints),
        [places[i] if i >= 0 else None for i in reading.lines],
        assumptions.fixed,
        time.perf_counter() - began,
        parameters,
        saved_bytes,
        tuple(assumptions.notes),
    )
