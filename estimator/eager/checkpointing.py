"""`torch.utils.checkpoint.checkpoint(use_reentrant=False)`, with its default of preserving the random state.

In forward, saved tensors become holders without memory. The first holder that backward unpacks runs the function again
with a graph of its own, keeps what that graph would save, and stops at the last one (early stop).
A selective checkpoint (`create_selective_checkpoint_contexts`) keeps the results of some operators from forward, and
takes these where it would compute them again.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ONE
from estimator.eager.tensor import UINT8, Tensor, arguments

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.eager.tensor import Machine

RNG_STATE_BYTES = 5056  # torch.get_rng_state().nbytes: the CPU generator's (a CUDA generator's state is CPU memory too)


class StopRecomputationError(Exception):
    """Raised in place of the last saved tensor: nothing after it is needed."""


class Holder:
    """The place of a saved tensor that will be recomputed."""

    __slots__ = ("frame", "index")

    def __init__(self, frame: Frame, index: int) -> None:
        self.frame, self.index = frame, index
        frame.holders += 1

    def unpack(self) -> Tensor:
        """The recomputed tensor; the caller drops it."""
        return self.frame.recomputed(self.index)

    def drop(self) -> None:
        """The node is done with it; the frame goes with its last holder."""
        self.frame.wanted[self.index] = False
        self.frame.holders -= 1
        if self.frame.holders == 0:
            self.frame.release()


class Frame:
    """One checkpointed call: its function, the arguments that it saved and, in backward, what it recomputed."""

    def __init__(self, function: Callable[..., Tensor], args: tuple[Tensor | None, ...], *, selective: bool) -> None:
        self.machine = next(a for a in args if a is not None).machine
        self.function, self.args = function, args
        self.module, self.block = self.machine.ledger.module, self.machine.ledger.block
        self.holders = 0
        self.wanted: list[bool] = []  # of each saved tensor, whether a node still holds its holder
        self.tensors: list[Tensor | None] | None = None
        self.selective = selective
        self.kept: deque[tuple[Tensor, ...]] = deque()  # results of the operators that a selective one does not repeat
        self.rng_state = self._save_rng_state()
        self.autocast_dtype = self.machine.autocast_dtype
        for a in args:
            if a is not None:
                save_for_backward(a.hold())

    def _save_rng_state(self) -> Tensor | None:
        if self.machine.device != "cpu":
            return None
        return self.machine.empty((RNG_STATE_BYTES * ONE,), UINT8).hold()

    def pack(self, t: Tensor) -> Tensor | Holder:
        """In forward a holder; in recomputation the tensor itself, noted, until the last."""
        if self.tensors is None:
            self.wanted.append(True)
            return Holder(self, len(self.wanted) - 1)
        wanted = self.wanted[len(self.tensors)]  # not if its node led to nothing
        self.tensors.append(as_activation(t.alias().hold()) if wanted else None)
        if len(self.tensors) == len(self.wanted):
            raise StopRecomputationError
        return t.alias().hold()

    def recomputed(self, index: int) -> Tensor:
        """The tensor saved `index`-th, recomputing all of them when it is the first to be asked for."""
        if self.tensors is None:
            self.tensors = []
            self._recompute()
        t = self.tensors[index]
        assert t is not None, "unpacked twice"
        self.tensors[index] = None
        return t

    def _recompute(self) -> None:
        machine = self.machine
        ledger = machine.ledger
        before = machine.grad_enabled, ledger.recompute
        machine.grad_enabled, ledger.recompute = True, True
        machine.frames.append(self)
        forked = self._save_rng_state()
        try:
            place = ledger.at(self.module, self.block, "recompute")
            with place, machine.autocast(self.autocast_dtype), arguments(self.args):
                self.function(*self.args).discard()
        except StopRecomputationError:
            pass
        if forked is not None:
            forked.drop()
        machine.frames.pop()
        machine.grad_enabled, ledger.recompute = before

    def release(self) -> None:
        """Drop the arguments, the random state and what was kept after the last tensor that backward needs."""
        for a in self.args:
            if a is not None:
                a.drop()
        if self.rng_state is not None:
            self.rng_state.drop()
        for results in self.kept:
            for t in results:
                t.drop()
        self.args, self.rng_state = (), None
        self.kept.clear()


def checkpoint(function: Callable[..., Tensor], *args: Tensor | None, selective: bool = False) -> Tensor:
    """`function(*args)` without its saved tensors, which backward recomputes."""
    with arguments(args) as results:
        frame = Frame(function, args, selective=selective)
        frame.machine.frames.append(frame)
        results.append(function(*args))
        frame.machine.frames.pop()
        if not frame.holders:  # nothing in it wants a gradient: no saved tensor holds the frame
            frame.release()
    return results[0]


def not_repeated(machine: Machine, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The results of an operator that selective checkpoints keep; where one recomputes, what it kept of them."""
    frame = machine.frames[-1] if machine.frames else None
    if frame is None or not machine.dispatches_to_python:
        return compute()
    if frame.tensors is None:
        results = compute()
        frame.kept.append(tuple(save_for_backward(t.alias().hold()) for t in results))
        return results
    results = frame.kept.popleft()
    for t in results:
        t.owners -= 1
    return results


def pack(t: Tensor) -> Tensor | Holder:
    """What a node keeps of a tensor: itself, or what the innermost checkpoint makes of it. Wrapped numbers pass by."""
    frames = t.machine.frames
    if frames and not t.is_wrapped_number:
        return frames[-1].pack(t)
    return save_for_backward(t.hold())


def save_for_backward(t: Tensor) -> Tensor:
    """Note that autograd keeps `t`, where saved_tensors_hooks sees it."""
    storage, ledger = t.storage, t.machine.ledger
    if as_activation(t).storage.category is Category.ACTIVATION and not storage.hooked:
        storage.hooked = True
        if ledger.phase is Phase.FORWARD and ledger.micro_batch == 0:
            ledger.saved.append(storage)
    return t


def as_activation(t: Tensor) -> Tensor:
    """What is kept for backward is no temporary."""
    if t.storage.category is Category.TEMPORARY and not t.is_wrapped_number:
        t.storage.category = Category.ACTIVATION
    return t
