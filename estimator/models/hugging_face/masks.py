"""`masking_utils`: which earlier tokens a token sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.letters import ONE, ZERO, W
from estimator.eager.ops import additive_mask
from estimator.eager.tensor import BOOL, INT64, Locals
from estimator.models.hugging_face.positions import integers, position_ids

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Tensor


def attention_mask(
    machine: Machine, length: Size, sequences: Size, kind: str, dtype: Dtype, *, eager: bool, used: bool = True
) -> Tensor | None:
    """`create_causal_mask` or `create_sliding_window_causal_mask`: (B, 1, T, T), None where a fused kernel needs none.

    Bools of what is seen; for eager attention numbers of `dtype` that are added to the scores. The window that no layer
    uses is 0 wide.
    """
    if not eager and (kind == "full" or (used and machine.at_most(length + 1, W))):
        return None
    if not eager:
        return seen(machine, length, sequences, kind)
    with Locals() as v:
        v.seen = seen(machine, length, sequences, kind)
        zero, least = machine.empty((), dtype).hold(), machine.empty((), dtype).hold()
        mask = machine.empty(v.seen.shape, dtype)
        machine.kernel("where", (v.seen,), (mask,))
        zero.drop()
        least.drop()
        return mask


def seen(machine: Machine, length: Size, sequences: Size, kind: str) -> Tensor:
    """`sdpa_mask`, a view of the same for all sequences."""
    square = (ONE, ONE, length, length)
    with Locals() as v:
        v.batch, v.head = machine.empty((sequences,), INT64), machine.empty((ONE,), INT64)
        v.queries, v.keys = position_ids(machine, length), position_ids(machine, length)
        if kind == "full":
            v.seen = machine.empty(square, BOOL)
            machine.kernel("le", (v.keys, v.queries), (v.seen,))
        else:
            v.result = machine.empty((), BOOL)
            for compared in ("gt", "le"):
                with Locals() as w:
                    if compared == "gt":
                        w.edge = integers(machine, "sub", (ONE, ONE, length, ONE), v.queries)
                    w.mask = machine.empty(square, BOOL)
                    machine.kernel(compared, (v.keys, v.queries), (w.mask,))
                    w.edge = None
                    w.both = machine.empty(square, BOOL)
                    machine.kernel("bitwise_and", (v.result, w.mask), (w.both,))
                    w.mask = None
                    v.result = w.both
            v.seen = v.result
        stride = (ZERO, *v.seen.stride[1:])
        return v.seen.view((sequences, *square[1:]), stride)


def no_padding(machine: Machine, sequences: Size, length: Size) -> None:
    """A mask of ones as bools, of which a fused kernel needs nothing: `fast_all`."""
    with Locals() as v:
        v.mask = machine.empty((sequences, length), BOOL)
        v.sum = machine.empty((), INT64)
        if machine.device == "cpu":
            machine.empty((sequences, length), INT64).discard()
        machine.kernel("sum", (v.mask,), (v.sum,))
        with Locals() as w:
            w.all = integers(machine, "eq", (), v.sum, dtype=BOOL)
            del v.sum


def padded_mask(machine: Machine, sequences: Size, length: Size, dtype: Dtype) -> Tensor:
    """What eager attention adds of a mask of ones, (B, 1, T, T): `and_masks` of what is causal and no padding."""
    square = (ONE, ONE, length, length)
    with Locals() as v:
        v.padding = machine.empty((sequences, length), BOOL)
        with Locals() as w:
            w.batch, w.head = machine.empty((sequences,), INT64), machine.empty((ONE,), INT64)
            w.queries, w.keys = position_ids(machine, length), position_ids(machine, length)
            w.result = machine.empty((), BOOL)
            w.causal = machine.empty(square, BOOL)
            machine.kernel("le", (w.keys, w.queries), (w.causal,))
            w.both = machine.empty(square, BOOL)
            machine.kernel("bitwise_and", (w.result, w.causal), (w.both,))
            w.result = w.take("both")
            del w.causal
            w.kept = machine.empty((sequences, ONE, ONE, length), BOOL)
            machine.kernel("index", (v.padding, w.kept), (w.kept,))
            w.both = machine.empty((sequences, ONE, length, length), BOOL)
            machine.kernel("bitwise_and", (w.result, w.kept), (w.both,))
            del w.kept
            v.seen = w.take("both")
        return additive_mask(v.seen, dtype)
