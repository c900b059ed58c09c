"""What is made of positions once a step: the ids, a look for packed sequences, cosines and sines; and rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.letters import ONE
from estimator.eager.pointwise import neg
from estimator.eager.tensor import BOOL, INT64, Locals, arguments
from estimator.eager.views import cast, concatenate, slice_last

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Shape, Tensor


def integers(machine: Machine, name: str, shape: Shape, *reads: Tensor, dtype: Dtype = INT64) -> Tensor:
    """What an operator makes of integers and of a Python number, which autocast leaves alone."""
    number = ops.wrapped_number(machine)
    out = machine.empty(shape, dtype)
    machine.kernel(name, reads, (out,))
    if number is not None:
        number.drop()
    return out


def position_ids(machine: Machine, length: Size) -> Tensor:
    """torch.arange(T) + 0."""
    with Locals() as v:
        v.range = machine.empty((length,), INT64)
        machine.kernel("arange", (), (v.range,))
        return integers(machine, "add", (length,), v.range)


def look_for_packed_sequences(positions: Tensor, sequences: Size) -> None:
    """`find_packed_sequence_indices`, which finds none: sequences are not packed into one."""
    machine, (length,) = positions.machine, positions.shape
    with Locals() as v:
        v.first = integers(machine, "sub", (sequences, ONE), positions)
        with Locals() as inner:
            inner.both = machine.empty((sequences, length + 1), INT64)
            machine.kernel("cat", (v.first, positions), (inner.both,))
            v.diff = machine.empty((sequences, length), INT64)
            machine.kernel("sub", (inner.both,), (v.diff,))
        with Locals() as inner:
            inner.apart = integers(machine, "ne", (sequences, length), v.diff, dtype=BOOL)
            v.packed = machine.empty((sequences, length), INT64)
            if machine.device == "cpu":  # a copy of the bools in the dtype of the sums
                machine.empty((sequences, length), INT64).discard()
            machine.kernel("cumsum", (inner.apart,), (v.packed,))
        with Locals() as inner:
            inner.none = integers(machine, "eq", (sequences,), v.packed, dtype=BOOL)
            machine.empty((), BOOL).discard()


def rotary_embedding(v: Locals, positions: Tensor, frequencies: Tensor, dtype: Dtype) -> None:
    """`LlamaRotaryEmbedding`: `v.cos` and `v.sin`, (1, T, e) of `dtype`."""
    machine, (length,), (half,) = positions.machine, positions.shape, frequencies.shape
    with Locals() as w:
        w.positions = machine.empty((ONE, length, ONE))
        machine.kernel("_to_copy", (positions,), (w.positions,))
        w.freqs = ops.elementwise("mul", w.positions, frequencies)
        del w.positions
        w.emb = concatenate((w.freqs, w.freqs), 2 * half)
        w.cos = ops.with_number("mul", ops.elementwise("cos", w.emb))
        w.sin = ops.with_number("mul", ops.elementwise("sin", w.emb))
        v.cos, v.sin = cast(w.cos, dtype), cast(w.sin, dtype)


def rotate_half(x: Tensor) -> Tensor:
    """(-x2, x1) of the halves of the last dimension."""
    with arguments((x,)) as results, Locals() as v:
        half = x.shape[-1] / 2
        v.x1, v.x2 = slice_last(x, half), slice_last(x, half)
        results.append(concatenate((neg(v.x2), v.x1)))
    return results[0]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin."""
    return ops.add(ops.mul(x, cos), ops.mul(rotate_half(x), sin))
