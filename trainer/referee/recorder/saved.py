"""Which storages autograd keeps for backward: a second run of the step, whose saved tensors are looked at."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.autograd import graph
from torch.utils import checkpoint

from trainer.referee.recorder.log import NODE, Kind, Log, Mark

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


class Saved:
    """A tensor that autograd has been given to keep, alive as long as autograd keeps it."""

    __slots__ = ("native", "number", "tensor")

    def __init__(self, native: Any, tensor: Tensor) -> None:
        self.native, self.tensor = native, tensor.detach()  # a result that its own node keeps would never be freed
        self.number = number_of(native, tensor)
        native.mark(Mark.SAVED, self.number, 0)

    def __del__(self) -> None:
        self.native.mark(Mark.LET_GO, self.number, 0)


@contextmanager
def selected(native: Any) -> Iterator[None]:
    """The results that selective checkpoints hold for their recomputation are marked too: no hook is told of them."""
    holder = checkpoint._VersionWrapper  # noqa: SLF001 - what they hold each in
    begin = holder.__init__

    def held(self: Any, value: Any) -> None:
        begin(self, value)
        self.number = number_of(native, value) if isinstance(value, torch.Tensor) else 0
        native.mark(Mark.SAVED, self.number, 0)

    def let_go(self: Any) -> None:
        native.mark(Mark.LET_GO, self.number, 0)

    with patch.object(holder, "__init__", held), patch.object(holder, "__del__", let_go, create=True):
        yield


def saving(native: Any, step: Callable[[], object]) -> None:
    """Run the step with marks of what autograd saves, and of what checkpoints do when they run forward again."""
    hooks = graph.saved_tensors_hooks
    begin = hooks.__init__

    def watched(self: Any, pack_hook: Callable[[Tensor], Any], unpack_hook: Callable[[Any], Tensor]) -> None:
        def pack(t: Tensor) -> Any:
            native.mark(Mark.REMADE, number_of(native, t), 0)
            return pack_hook(t)

        begin(self, pack, unpack_hook)

    marked = hooks(lambda t: Saved(native, t), lambda saved: saved.tensor)
    with marked, patch.object(hooks, "__init__", watched), selected(native):
        step()


def number_of(native: Any, t: Tensor) -> int:
    """The number of a tensor's storage in the log; of a DTensor, this rank's."""
    t = getattr(t, "_local_tensor", t)
    return int(native.number_of(t.untyped_storage()._cdata))  # noqa: SLF001 - the storage's identity


def saved_allocations(log: Log, first: int) -> tuple[set[int], int]:
    """(allocations of a step that autograd keeps when a backward begins, the bytes that it keeps when the first does).

    An allocation is its position among all. What a checkpoint makes again and keeps is among the first alone.
    """
    kept: dict[int, int] = {}
    fresh: list[int] = []  # saved since a node last began: all others are found already
    found: set[int] = set()
    position: dict[int, int] = {}
    size: dict[int, int] = {}
    held: int | None = None
    allocations = depth = nodes = 0
    for kind, a, b, c, *_ in log.rows[first:]:
        if kind == Kind.ALLOCATED:
            position[a], size[a] = allocations, b
            allocations += 1
        elif kind == Kind.MARKED and a == Mark.SAVED:
            kept[b] = kept.get(b, 0) + 1
            fresh.append(b)
        elif kind == Kind.MARKED and a == Mark.LET_GO:
            kept[b] = kept.get(b, 0) - 1
        elif kind == Kind.MARKED and a == Mark.REMADE and nodes and b in position:
            found.add(position[b])
        elif kind == Kind.BEGUN:
            depth += 1
            if not nodes and (c == NODE or log.is_engine(a)):
                nodes = depth
                found.update(position[number] for number in fresh if kept[number] > 0 and number in position)
                fresh.clear()
                if held is None:
                    held = sum(size[number] for number, count in kept.items() if count > 0 and number in position)
        elif kind == Kind.ENDED:
            if depth == nodes:
                nodes = 0
            depth -= 1
    return found, held or 0
