"""The recorder against a real step of the same code on this CPU, event by event."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from estimator.eager.ledger import Category, Phase
from trainer.referee.first_difference import Event, real_events
from trainer.referee.measure import Saved, kept_by_selective_checkpoints, nbytes, onednn
from trainer.referee.recorder.assumptions import DEALT
from trainer.referee.recorder.recording import record
from trainer.referee.recorder.routing import dealt_out
from trainer.referee.recorder.steps import as_step, eager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from estimator.describe.plan import Plan
    from trainer.referee.recorder.recording import Recording


class Truth(NamedTuple):
    """What a real step and its recording did.

    Attributes:
        peak: bytes at the peak of the recording, and the same of the real step, with what the recording found alive
            before it.
        events: numbers of events of the recording and of the real step.
        first: of the runs of allocations and frees, the index of the first that differs; None where all are equal.
        recording: the recording.
        runs: those of both.
        held: bytes of what autograd saves in a forward, of parameters and of the optimizer's state: of the recording
            and of the real step. What autograd saves is known of a step that has a `forward` alone.
        own_routing: the peak of a real step whose router chooses for itself; None where the recording has not dealt
            out a router's choices. All else is of a real step in which they are dealt out likewise.
    """

    peak: tuple[int, int]
    events: tuple[int, int]
    first: int | None
    recording: Recording
    runs: tuple[list[list[Event]], list[list[Event]]]
    held: dict[str, tuple[int, int]]
    own_routing: int | None = None

    @property
    def differences(self) -> dict[str, int]:
        """Bytes by which the recording is higher, of the peak and of each of `held`."""
        return {name: ours - real for name, (ours, real) in {"peak": self.peak, **self.held}.items()}


def judged(build: Callable[[], Any], plan: Plan | None = None) -> Truth:
    """Record the step, by the CPU's rules, and run it for real under the profiler.

    Where the recording deals out a router's choices, so does the real step (`dealt_out`): like is compared with like.
    """
    recording = record(build, plan, "cpu")
    setup = sum(e.where.phase is Phase.SETUP for e in recording.ledger.events)
    ours = [
        Event(int(delta), f"{e.where.phase} {e.where.module} {e.where.op}")
        for e, delta in zip(recording.ledger.events, recording.account.delta, strict=True)
    ]
    routes = any(said.what.startswith(DEALT) for said in recording.assumptions)
    step = as_step(build(), plan)
    with eager(step):
        with dealt_out() if routes else nullcontext():
            real = _real(step)
            saved = saved_bytes(step) if hasattr(step, "forward") else None
        own = _real(step) if routes else None
    runs = in_runs(ours[setup:]), in_runs(real)
    first = next((i for i, (a, b) in enumerate(zip(*runs, strict=False)) if _bytes(a) != _bytes(b)), None)
    if first is None and len(runs[0]) != len(runs[1]):
        first = min(map(len, runs))
    before = sum(e.nbytes for e in ours[:setup])
    held = {
        "parameters": (recording.bytes_before(Category.PARAMETER), nbytes(step.model.parameters())),
        "states": (recording.bytes_before(Category.OPTIMIZER), nbytes(states(step))),
    }
    if saved is not None and recording.saved_bytes is not None:
        held["saved"] = recording.saved_bytes, saved
    peaks = recording.peak_bytes, _peak(before, real)
    routed = None if own is None else _peak(before, own)
    return Truth(peaks, (len(ours) - setup, len(real)), first, recording, runs, held, routed)


def _peak(before: int, events: Iterable[Event]) -> int:
    """The most bytes alive, of so many before the events."""
    return max(accumulate((e.nbytes for e in events), initial=before))


def states(step: Any) -> list[Tensor]:
    """The tensors of the optimizer's state."""
    return [t for s in step.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]


def saved_bytes(step: Any) -> int:
    """What autograd has been given to keep when a real forward is over, parameters, buffers and inputs left out."""
    held = (*step.model.parameters(), *step.model.buffers(), *tree_leaves(step.inputs))
    resident = {t.untyped_storage()._cdata for t in held if isinstance(t, torch.Tensor)}  # noqa: SLF001 - the storage's identity
    kept: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(t: Tensor) -> Saved:
        saved = Saved(t.detach())  # a result that its own node keeps would never be freed
        kept.add(saved)
        return saved

    with onednn(enabled=False), saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = step.forward()
        gc.collect()
        alive = [*(s.tensor for s in kept), *kept_by_selective_checkpoints()]
        found = nbytes(t for t in alive if t.untyped_storage()._cdata not in resident)  # noqa: SLF001 - the storage's identity
        del loss
    return found


def _real(step: Any) -> list[Event]:
    """The events of a real step; as in the recording, what only the garbage collector would free stays."""
    gc.collect()
    gc.disable()
    try:
        return real_events(step)
    finally:
        gc.enable()


def in_runs(events: Iterable[Event]) -> list[list[Event]]:
    """Runs of allocations and of frees, each in order of size: nothing depends on the order within one."""
    return [sorted(run, key=lambda e: e.nbytes) for _, run in groupby(events, key=lambda e: e.nbytes > 0)]


def _bytes(run: Iterable[Event]) -> list[int]:
    return [e.nbytes for e in run]


def compare(build: Callable[[], Any], plan: Plan | None = None) -> str:
    """`judged` in words, with the first difference where there is one."""
    truth = judged(build, plan)
    ours, real = truth.peak
    routed, own = "", ""
    if truth.own_routing is not None:
        routed = " whose router's choices are dealt out as is assumed"
        own = f" Where it chooses for itself the peak is {truth.own_routing:,} bytes ({ours - truth.own_routing:+,})."
    if truth.first is None:
        equal = f"all {truth.events[1]:,} events are equal, and so is the peak, {real:,} bytes."
        return f"A real step on this CPU{routed}: {equal}{own}"
    differs = (
        f"A real step on this CPU{routed}: its peak is {real:,} bytes, the recording's {ours:,} ({ours - real:+,}); of "
        f"{truth.events[1]:,} events the first that differs is of a run of {len(truth.runs[1][truth.first])}:"
    )
    lines = [differs]
    for name, runs in zip(("recorded", "real"), truth.runs, strict=True):
        run = runs[truth.first] if truth.first < len(runs) else []
        lines += [f"  {name:8} {e.nbytes:>14,}  {e.place}" for e in run[:6]]
    if own:
        lines.append(own.strip())
    return "\n".join(lines)
