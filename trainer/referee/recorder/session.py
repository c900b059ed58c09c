"""Recording a step: the allocators, the observer, the hooks that say whose turn it is, and the device's rules."""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers
from torch.utils._pytree import tree_leaves

from estimator.eager.ledger import Category
from trainer.referee.measure import onednn
from trainer.referee.recorder.assumptions import Assumptions
from trainer.referee.recorder.cuda import cuda
from trainer.referee.recorder.extension import extension
from trainer.referee.recorder.ledger import Known
from trainer.referee.recorder.log import Kind, Log, Mark
from trainer.referee.recorder.rules import composites, dependent_kernels, kernels_of
from trainer.referee.recorder.saved import number_of, saved_allocations, saving
from trainer.referee.recorder.shapes import known_shapes
from trainer.referee.recorder.world import SENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))  # whose code is not the user's
PRINTED = "a tensor is printed: what printing takes is left out"


@contextmanager
def recording(assumptions: Assumptions | None = None, device: str = "cpu") -> Iterator[Any]:
    """The extension, all that it puts in place there and its log begun; oneDNN is off, as for the referee of bytes."""
    native = extension()
    native.set_kernels(kernels_of(device), dependent_kernels())
    native.set_libraries(LIBRARIES)
    assumptions = assumptions or Assumptions(LIBRARIES)
    native.set_assume(assumptions.number)
    place = cuda(native) if device == "cuda" else nullcontext()
    with onednn(enabled=False), known_shapes(device), lists(native, assumptions), place:
        native.install(device == "cuda", composites())
        try:
            native.start()
            SENT.clear()
            yield native
        finally:
            native.uninstall()
            native.set_assume(None)


@contextmanager
def lists(native: Any, assumptions: Assumptions) -> Iterator[None]:
    """`tolist` and `numpy` read memory past all operators: of values that are not known they are answered here.

    So is `repr`, whose operators have results of the values' shape.
    """
    to_list, to_numpy = torch.Tensor.tolist, torch.Tensor.numpy
    to_text: Any = torch.Tensor.__repr__

    def made_of(t: torch.Tensor) -> str | None:
        found: str | None = native.made_of(t.untyped_storage()._cdata)  # noqa: SLF001 - the storage's identity
        return found

    def tolist(self: torch.Tensor) -> Any:
        made = made_of(self)
        return to_list(self) if made is None else assumptions.numbers(made, self)

    def numpy(self: torch.Tensor, **more: Any) -> Any:
        if made_of(self) is not None:
            raise NotImplementedError("numpy() of a tensor whose values are not computed")
        return to_numpy(self, **more)

    def text(self: torch.Tensor, **more: Any) -> str:
        if made_of(self) is None:
            return str(to_text(self, **more))
        assumptions.notes[PRINTED] = None
        return f"tensor(..., size={tuple(self.shape)}, dtype={self.dtype})"

    with (
        patch.object(torch.Tensor, "tolist", tolist),
        patch.object(torch.Tensor, "numpy", numpy),
        patch.object(torch.Tensor, "__repr__", text),
    ):
        yield


@contextmanager
def marks(step: Any, native: Any) -> Iterator[None]:
    """Modules, gradients and updates are marked in the log."""
    names = {id(m): i for i, (_, m) in enumerate(step.model.named_modules())}

    def enter(m: nn.Module, *_: Any) -> None:
        native.mark(Mark.MODULE, names.get(id(m), -1), 0)

    def leave(*_: Any) -> None:
        native.mark(Mark.MODULE_END, 0, 0)

    def gradient(number: int) -> Callable[[torch.Tensor], None]:
        def hook(p: torch.Tensor) -> None:
            if p.grad is not None:
                native.mark(Mark.GRADIENT, number_of(native, p.grad), number)

        return hook

    with ExitStack() as stack:
        for handle in (
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave, always_call=True),
            optimizers.register_optimizer_step_pre_hook(lambda *_: native.mark(Mark.UPDATE, 0, 0)),
            optimizers.register_optimizer_step_post_hook(lambda *_: native.mark(Mark.UPDATE_END, 0, 0)),
            *(
                p.register_post_accumulate_grad_hook(gradient(i))
                for i, p in enumerate(step.model.parameters())
                if p.requires_grad
            ),
        ):
            stack.callback(handle.remove)
        yield


def recorded(
    native: Any, step: Any, assumptions: Assumptions, *, saved: bool
) -> tuple[Log, int, Known, set[int], int | None]:
    """(the log, the row at which a steady step begins, what is alive then, and what `saved_allocations` has of it).

    Without `saved` the step is not run once more to see what autograd keeps: nothing, and None.
    """
    with settled():
        return _recorded(native, step, assumptions, saved=saved)


@contextmanager
def settled() -> Iterator[None]:
    """What is there already is no garbage, and is not looked through each time that garbage is collected."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def unsteady() -> int:
    """Steps before those that are alike: the first makes the optimizer's state, in the second DDP cuts new buckets.

    `Reducer::rebuild_buckets` of torch/csrc/distributed/c10d/reducer.cpp.
    """
    return 2 if dist.is_initialized() else 1


def _recorded(
    native: Any, step: Any, assumptions: Assumptions, *, saved: bool
) -> tuple[Log, int, Known, set[int], int | None]:
    for _ in range(unsteady()):
        step()
    with marks(step, native):
        assumptions.counts.clear()
        log, first = _observed(native, step)
        assumptions.fixed = dict(assumptions.counts)
        known = _known(native, step, log, first)
        if not saved:
            return log, first, known, set(), None
        native.start()
        again, begun = _observed(native, lambda: saving(native, step))
    return log, first, known, *saved_allocations(again, begun)


def _observed(native: Any, step: Callable[[], object]) -> tuple[Log, int]:
    """(the log so far and one more call of `step`, the row at which that begins)."""
    gc.collect()
    native.observe(True)
    native.mark(Mark.UPDATE_END, 0, 0)
    gc.disable()
    try:
        step()
    finally:
        gc.enable()
        native.observe(False)
    log = Log.of(native, SENT)
    return log, next(i for i, row in enumerate(log.rows) if row[:2] == (Kind.MARKED, Mark.UPDATE_END))


def _known(native: Any, step: Any, log: Log, first: int) -> Known:
    alive: dict[int, int] = {}
    for kind, number, nbytes, *_ in log.rows[:first]:
        if kind == Kind.ALLOCATED:
            alive[number] = nbytes
        elif kind == Kind.FREED:
            alive.pop(number, None)
    found = dict.fromkeys(alive, (Category.BUFFER, ""))
    for name, t in step.model.named_buffers():
        found[number_of(native, t)] = Category.BUFFER, name.rpartition(".")[0]
    for t in (x for x in tree_leaves(step.inputs) if isinstance(x, torch.Tensor)):
        found[number_of(native, t)] = Category.INPUT, ""
    for what, category in (("state", Category.OPTIMIZER), ("gradients", Category.GRADIENT)):
        for t in getattr(step, what, tuple)():
            found[number_of(native, t)] = category, ""
    names = {id(p): name for name, p in step.model.named_parameters()}
    for p, state in step.optimizer.state.items():
        for t in state.values():
            if isinstance(t, torch.Tensor):
                found[number_of(native, t)] = Category.OPTIMIZER, names.get(id(p), "").rpartition(".")[0]
    for name, p in step.model.named_parameters():
        found[number_of(native, p)] = Category.PARAMETER, name.rpartition(".")[0]
    return Known(
        {number: (nbytes, *found[number]) for number, nbytes in alive.items()},
        [name for name, _ in step.model.named_parameters()],
        [name for name, _ in step.model.named_modules()],
    )
