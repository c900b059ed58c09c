"""Recording a step: the allocators, the observer, the hooks that say whose turn it is, and the device's rules."""

from __future__ import annotations

import gc
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers

from estimator.eager.ledger import Category
from trainer.referee.recorder.assumptions import Assumptions
from trainer.referee.recorder.extension import extension
from trainer.referee.recorder.ledger import Known
from trainer.referee.recorder.log import Kind, Log, Mark
from trainer.referee.recorder.rules import device_rules, kernels_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))  # whose code is not the user's


@contextmanager
def recording(device: str, assumptions: Assumptions | None = None) -> Iterator[Any]:
    """The extension, its allocators in place and its log begun; PyTorch decides as on `device`."""
    native = extension()
    native.set_kernels(kernels_of(device))
    native.set_libraries(LIBRARIES)
    with device_rules(device, assumptions or Assumptions(LIBRARIES)):
        native.install()
        try:
            native.start()
            yield native
        finally:
            native.uninstall()


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


def number_of(native: Any, t: torch.Tensor) -> int:
    """The number of a tensor's storage in the log."""
    return native.number_of(t.untyped_storage()._cdata)  # noqa: SLF001 - the storage's identity


def recorded(native: Any, step: Any) -> tuple[Log, int, Known]:
    """(the log, the row at which a steady step begins, what was alive then)."""
    step()  # the first step makes the optimizer's state; the steady ones are alike
    with marks(step, native):
        gc.collect()
        native.observe(True)
        native.mark(Mark.UPDATE_END, 0, 0)
        gc.disable()
        try:
            step()
        finally:
            gc.enable()
            native.observe(False)
    log = Log.of(native)
    first = next(i for i, row in enumerate(log.rows) if row[0] == Kind.MARKED)
    return log, first, _known(native, step, log, first)


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
    for t in step.inputs:
        found[number_of(native, t)] = Category.INPUT, ""
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
