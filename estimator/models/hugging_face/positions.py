"""What is made of positions once a step: the ids, a look for packed sequences, cosines and sines; and rotations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager import ops
from estimator.eager.autograd import Context, attach, record
from estimator.eager.letters import ONE
from estimator.eager.pointwise import neg
from estimator.eager.tensor import BOOL, COMPLEX64, FLOAT32, INT64, Locals, arguments, converted, empty_like, op
from estimator.eager.views import alias, cast, concatenate, contiguous, slice_last, split, stack_last, unsqueeze

if TYPE_CHECKING:
    from estimator.describe.transformers import Written
    from estimator.eager.letters import Size
    from estimator.eager.ops import Gradients
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


def scale_of_positions(positions: Tensor, dtype: Dtype) -> Tensor:
    """`get_llama_4_attn_scale`: 1 + beta log(1 + floor(positions / n)), (1, 1, T, 1) of `dtype`."""
    machine, (length,) = positions.machine, positions.shape
    with Locals() as v:
        with ops.python_number(machine, FLOAT32):
            wide = converted(positions, FLOAT32).hold() if machine.casts_operands else positions.hold()
            part = machine.empty((ONE, length))
            machine.kernel("div", (wide,), (part,))
            wide.drop()
        log = ops.elementwise("log", ops.with_number("add", ops.elementwise("floor", part)))
        v.scaling = ops.with_number("add", ops.with_number("mul", log))
        shape = (ONE, ONE, length, ONE)
        return cast(v.scaling.view(shape, machine.contiguous(shape)), dtype)


def rotary_embedding(v: Locals, positions: Tensor, frequencies: Tensor, dtype: Dtype, written: Written) -> None:
    """`LlamaRotaryEmbedding`: `v.cos` and `v.sin`, (1, T, e) of `dtype`.

    As complex numbers (`DeepseekV2RotaryEmbedding`) both are one: `v.cos`, (1, T, e / 2).
    """
    v.sin = None
    machine, (length,), (half,) = positions.machine, positions.shape, frequencies.shape
    with Locals() as w:
        w.positions = machine.empty((ONE, length, ONE))
        machine.kernel("_to_copy", (positions,), (w.positions,))
        w.freqs = ops.elementwise("mul", w.positions, cast(frequencies, FLOAT32))
        del w.positions
        if written.rotation == "complex":
            w.ones = empty_like(w.freqs)
            w.polar = machine.empty(w.freqs.shape, COMPLEX64)
            machine.kernel("polar", (w.ones, w.freqs), (w.polar,))
            del w.ones
            v.cos = ops.with_number("mul", w.polar)
            return
        if written.rotation == "apart":
            w.emb = w.freqs
        elif written.rotation == "repeated-fp32":
            w.emb = repeated(w.freqs)
        else:
            w.emb = concatenate((w.freqs, w.freqs), 2 * half)
        w.cos = ops.with_number("mul", ops.elementwise("cos", w.emb))
        w.sin = ops.with_number("mul", ops.elementwise("sin", w.emb))
        if written.tables_fp32:
            v.cos, v.sin = w.cos, w.sin
        else:
            v.cos, v.sin = cast(w.cos, dtype), cast(w.sin, dtype)


@op
def repeated(x: Tensor) -> Tensor:
    """x.repeat_interleave(2, -1) of what wants no gradient."""
    out = x.machine.empty((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    x.machine.kernel("repeat_interleave", (x,), (out,))
    return out


def rotate_half(x: Tensor, written: Written) -> Tensor:
    """(-x2, x1) of the halves of the last dimension, or of its odd and even places."""
    with arguments((x,)) as results, Locals() as v:
        half = x.shape[-1] / 2
        if written.rotation == "halves":
            v.x1, v.x2 = slice_last(x, half), slice_last(x, half)
            results.append(concatenate((neg(v.x2), v.x1)))
        else:
            v.x1, v.x2 = slice_last(x, half, step=2), slice_last(x, half, step=2)
            results.append(stack_last(neg(v.x2), v.x1))
    return results[0]


@op
def turned(x: Tensor, angles: Tensor) -> Tensor:
    """view_as_real(view_as_complex(x) * angles): saves the angles, whose conjugate is a tensor of its own in backward.

    `view_as_real` has its gradient made contiguous (derivatives.yaml).
    """

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.grad = contiguous(grad)
        c.conjugate = empty_like(c.saved[0])
        return [ops.elementwise("mul", c.grad)]

    node = record("MulBackward0", (x,), backward, (angles,))
    return attach(node, ops.elementwise("mul", x))


def rotate_complex(v: Locals, angles: Tensor) -> None:
    """`apply_rotary_emb` of DeepSeek-V2: the names `q_rot` and `k_rot` of the frame are rotated."""
    dtype = v.q_rot.dtype
    with Locals() as w:
        w.q, w.k = cast(v.q_rot, FLOAT32), cast(v.k_rot, FLOAT32)
        w.q_out = cast(turned(w.q, angles), dtype)
        w.k_out = cast(turned(w.k, angles), dtype)
        v.q_rot, v.k_rot = w.q_out, w.k_out


def rotated_apart(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`_apply_rotary_emb` of gpt-oss: by the angles of half a head."""
    with arguments((x, cos, sin)) as results, Locals() as v:
        v.a, v.b = split(x, (x.shape[-1] / 2, x.shape[-1] / 2))
        v.first = ops.sub(ops.mul(v.a, cos), ops.mul(v.b, sin))
        v.second = ops.add(ops.mul(v.b, cos), ops.mul(v.a, sin))
        results.append(concatenate((v.first, v.second)))
    return results[0]


def rotated(x: Tensor, cos: Tensor, sin: Tensor, written: Written) -> Tensor:
    """x cos + rotate_half(x) sin."""
    if written.rotation == "apart":
        return rotated_apart(x, cos, sin)
    if written.rotation != "neighbours-fp32":
        return ops.add(ops.mul(x, cos), ops.mul(rotate_half(x, written), sin))
    return ops.add(ops.mul(cast(x, FLOAT32), cos), ops.mul(cast(rotate_half(x, written), FLOAT32), sin))


def taken_apart(x: Tensor, width: Size) -> tuple[Tensor, Tensor]:
    """x[..., :width], x[..., width:], of which the second may be nothing."""
    return alias(x) if width is x.shape[-1] else slice_last(x, width), slice_last(x, x.shape[-1] - width)


def apply_rotary(v: Locals, q: str, k: str, cos: Tensor, sin: Tensor, written: Written) -> None:
    """`apply_rotary_pos_emb`: the names `q` and `k` of the frame are rotated."""
    before = getattr(v, q), getattr(v, k)
    dtype, width = before[0].dtype, cos.shape[-1]
    with Locals() as w:
        if written.rotation == "repeated-fp32":
            before = cast(before[0], FLOAT32), cast(before[1], FLOAT32)
            w.wide_q, w.wide_k = before
        w.cos, w.sin = unsqueeze(cos, 1), unsqueeze(sin, 1)
        if written.rotation.startswith("neighbours"):
            w.cos = repeated(slice_last(w.cos, width / 2))
            w.sin = repeated(slice_last(w.sin, width / 2))
        if written.partial in ("", "before"):
            w.q, w.k = (rotated(x, w.cos, w.sin, written) for x in before)
        else:
            w.q_rot, w.q_pass = taken_apart(before[0], width)
            w.k_rot, w.k_pass = taken_apart(before[1], width)
        if written.partial == "whole":
            w.q = concatenate((rotated(w.q_rot, w.cos, w.sin, written), w.q_pass))
            w.k = concatenate((rotated(w.k_rot, w.cos, w.sin, written), w.k_pass))
        elif written.partial in ("inside", "returned"):
            w.q, w.k = rotated(w.q_rot, w.cos, w.sin, written), rotated(w.k_rot, w.cos, w.sin, written)
            if written.partial == "returned":
                w.of_q, w.of_k = w.q, w.k
            w.q = concatenate((w.q, w.q_pass))
            w.k = concatenate((w.k, w.k_pass))
        if written.tables_fp32 or written.rotation.endswith("fp32"):
            w.q, w.k = cast(w.q, dtype), cast(w.k, dtype)
        setattr(v, q, w.q)
        setattr(v, k, w.k)
