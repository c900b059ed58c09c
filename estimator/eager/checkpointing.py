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
from estimator.eager.tensor import UINT8, Tensor, arguments, is_transposed, transposing_copy

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


class OnHost:
    """What `torch.autograd.graph.save_on_cpu(pin_memory=True)` keeps of a saved tensor: a copy in the host's memory.

    It is contiguous, one for each time that a tensor is saved, weights included. A CPU is its own host: what is
    unpacked is the copy itself.
    """

    __slots__ = ("grad_fn", "packed", "requires_grad")

    def __init__(self, t: Tensor) -> None:
        machine, self.requires_grad, self.grad_fn = t.machine, t.requires_grad, t.grad_fn
        if self.grad_fn is not None:  # `SavedVariable::grad_fn_`
            self.grad_fn.owners += 1
        with machine.on_host():
            self.packed = machine.empty(t.shape, t.dtype, category=Category.ACTIVATION).hold()
        self._copied(t)

    def _copied(self, t: Tensor) -> None:
        """From the accelerator or back to it."""
        machine, ledger = t.machine, t.machine.ledger
        if machine.device == "cpu":
            if is_transposed(t):
                transposing_copy(machine, t.numel, t.dtype)
            machine.kernel("copy_", (t,), (self.packed,))
        else:
            ledger.copies.append((ledger.here, ledger.micro_batch, t.dtype.itemsize * t.numel))

    def unpack(self) -> Tensor:
        """The tensor as backward takes it; the caller drops it."""
        machine, packed = self.packed.machine, self.packed
        out = packed.alias() if machine.device == "cpu" else machine.empty(packed.shape, packed.dtype)
        if out.storage is not packed.storage:
            self._copied(out)
        out.requires_grad, out.grad_fn = self.requires_grad, self.grad_fn
        if self.grad_fn is not None:
            self.grad_fn.owners += 1
        return out.hold()

    def drop(self) -> None:
        """The node is done with it."""
        self.packed.drop()
        if self.grad_fn is not None:
            self.grad_fn.drop()


class Frame:
    """One checkpointed call: its function, the arguments that it saved and, in backward, what it recomputed.

    Of the arguments only the first few may be saved; the function itself holds the others (`functools.partial`).
    """

    def __init__(
        self, function: Callable[..., Tensor], args: tuple[Tensor | None, ...], *, selective: bool, saves: int | None
    ) -> None:
        self.machine = next(a for a in args if a is not None).machine
        self.function = function
        self.module, self.block = self.machine.ledger.module, self.machine.ledger.block
        self.holders = 0
        self.wanted: list[bool] = []  # of each saved tensor, whether a node still holds its holder
        self.tensors: list[Tensor | None] | None = None
        self.selective = selective
        self.kept: deque[tuple[Tensor, ...]] = deque()  # results of the operators that a selective one does not repeat
        self.rng_state = self._save_rng_state()
        self.autocast_dtype = self.machine.autocast_dtype
        self.args: tuple[Tensor | OnHost | None, ...] = tuple(
            None if a is None else kept(a) if saves is None or i < saves else a.hold() for i, a in enumerate(args)
        )

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
            with place, machine.autocast(self.autocast_dtype):
                args = [a.unpack() if isinstance(a, OnHost) else a for a in self.args]
                try:
                    with arguments(args):
                        out = self.function(*args)
                        for t in out if isinstance(out, tuple) else (out,):
                            if t is not None:
                                t.discard()
                finally:
                    for a, given in zip(self.args, args, strict=True):
                        if isinstance(a, OnHost) and given is not None:
                            given.drop()
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


def checkpoint(
    function: Callable[..., Tensor], *args: Tensor | None, selective: bool = False, saves: int | None = None
) -> Tensor:
    """`function(*args)` without its saved tensors, which backward recomputes; `saves` are the arguments it is given."""
    with arguments(args) as results:
        frame = Frame(function, args, selective=selective, saves=saves)
        frame.machine.frames.append(frame)
        frame.holders += 1  # its hooks are on: what is saved and forgotten again in there does not end it
        results.append(function(*args))
        frame.machine.frames.pop()
        frame.holders -= 1
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


def pack(t: Tensor) -> Tensor | Holder | OnHost:
    """What a node keeps of a tensor: itself, or what the innermost hooks make of it. Wrapped numbers pass by."""
    frames = t.machine.frames
    if frames and not t.is_wrapped_number:
        return frames[-1].pack(t)
    return kept(t)


def kept(t: Tensor) -> Tensor | OnHost:
    """What is kept of a tensor outside of checkpoints."""
    if t.machine.saves_on_host and not t.is_wrapped_number:
        return OnHost(t)
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
