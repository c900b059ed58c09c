"""Which earlier tokens a token sees; `trainer.model.masks`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.letters import A, W
from estimator.eager.tensor import BOOL, INT64, Locals

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.describe.parts import Layer
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Machine, Tensor


def attention_kinds(machine: Machine, layers: Sequence[Layer], length: Size) -> dict[str, str]:
    """What each layer's attention comes down to: one that all tokens fit in is "full"."""
    sizes = {"full": None, "window": W, "chunk": A}
    present = {layer.attention for layer in layers}
    return {
        kind: "full" if size is None or machine.at_most(length, size) else kind
        for kind, size in sizes.items()
        if kind in present
    }


def build_mask(ids: Tensor, kind: str, length: Size, keys: Size | None, *, naive: bool) -> Tensor | None:
    """(T, T), or None where attention needs none; of a part of the sequence (T, `keys`)."""
    if kind == "full" and naive:
        return ops.causal_mask(ids, length, keys)
    if kind == "full":
        return None if keys is None else ops.window_mask(ids, length, keys, seen=True, window=False)
    keys = keys or length
    if kind == "window":
        return ops.window_mask(ids, length, keys, seen=not naive)
    machine = ids.machine
    with Locals() as v:
        seen = machine.empty((length, keys), BOOL)
        seen.hold()
        machine.kernel("fill_", (), (seen,))
        machine.kernel("tril_", (seen,), (seen,))
        v.chunk = machine.empty((keys,), INT64)
        if machine.wraps_scalars:
            machine.empty((), INT64).discard()
        v.same = machine.empty((length, keys), BOOL)
        machine.kernel("eq", (v.chunk,), (v.same,))
        machine.kernel("logical_and_", (seen, v.same), (seen,))
        del v.same
        if naive:
            machine.kernel("logical_not_", (seen,), (seen,))
        seen.owners -= 1
        return seen
