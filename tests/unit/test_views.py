"""Which windows need no copy, and how results are laid out: numpy decides the same by the same rules."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.eager import views
from estimator.eager.letters import ONE, B, D, Sizes, T, V, constant, d, e, f, h
from estimator.eager.repetition import Group, Stack
from estimator.eager.sizes import ShapeClass
from estimator.eager.tensor import BFLOAT16, Machine, dense_strides, empty_like

pytestmark = pytest.mark.quick
# Different primes, so that two shapes have as many elements only if they have the same factors.
PRIMES = {"B": 2, "T": 3, "h": 5, "e": 7, "d": 11, "f": 13, "V": 17, "D": 19}
LETTERS = {"B": B, "T": T, "h": h, "e": e, "d": d, "f": f, "V": V, "D": D}


def machine(device="cpu"):
    return Machine(ShapeClass(frozenset(), False, True), device, Stack((Group(("a",), 1),)), PRIMES)


def numbers(sizes):
    return tuple(int(Sizes(PRIMES).value(x)) for x in sizes)


@st.composite
def windows(draw):
    """A tensor of some letters, permuted, perhaps a part of its last dimension; and numpy's array of the same."""
    names = draw(st.lists(st.sampled_from(sorted(PRIMES)), min_size=1, max_size=4, unique=True))
    ones = draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names)))
    shape = [ONE if one else LETTERS[name] for name, one in zip(names, ones, strict=True)]
    x = machine().empty(shape).hold()
    array = np.zeros(numbers(shape), dtype=np.float32)
    if draw(st.booleans()) and shape[-1] is not ONE:
        x = x.machine.empty((*shape[:-1], 3 * shape[-1])).hold()
        array = np.zeros(numbers(x.shape), dtype=np.float32)[..., : numbers(shape)[-1]]
        x = views.split(x, (shape[-1],) * 3)[0].hold()
    order = draw(st.permutations(range(len(shape))))
    x = x.view(tuple(x.shape[i] for i in order), tuple(x.stride[i] for i in order))
    return x, array.transpose(order)


def merged(shape, cuts):
    """The shape with neighbours multiplied: a cut after i keeps dimensions i and i + 1 apart."""
    out = [shape[0]]
    for size, cut in zip(shape[1:], cuts, strict=True):
        if cut:
            out.append(size)
        else:
            out[-1] = out[-1] * size
    return tuple(out)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(windows(), st.lists(st.booleans(), min_size=3, max_size=3))
def test_a_view_exists_where_numpy_needs_no_copy(window, cuts):
    x, array = window
    shape = merged(x.shape, cuts[: len(x.shape) - 1])
    found = views.view_stride(x, shape)
    try:
        expected = array.reshape(numbers(shape), copy=False)
    except ValueError:
        expected = None
    assert (found is None) == (expected is None)
    if found is not None:
        strides = zip(numbers(found), expected.strides, expected.shape, strict=True)
        assert all(n == 1 or mine == theirs // 4 for mine, theirs, n in strides)
        assert numbers(shape) == expected.shape


@settings(max_examples=200, deadline=None, derandomize=True)
@given(windows())
def test_contiguous_and_the_layout_of_a_new_tensor_are_numpys(window):
    x, array = window
    assert x.is_contiguous == array.flags.c_contiguous
    like = np.empty_like(array)  # order "K", the nesting of the strides
    expected = [theirs // 4 for theirs in like.strides]
    mine = numbers(empty_like(x).stride)
    assert all(n == 1 or a == b for a, b, n in zip(mine, expected, array.shape, strict=True))


def test_heads_of_the_attention():
    """(B, T, d) seen as (B, T, h, e), its heads brought forward: together again only after a copy."""
    x = machine().empty((B, T, h * e)).hold()
    heads = views.transpose(views.view(x, (B, T, h, e)), 1, 2).hold()
    assert heads.shape == (B, h, T, e)
    assert heads.stride == (T * h * e, e, h * e, ONE)
    assert views.view_stride(heads, (B, T, h * e)) is None
    assert views.view_stride(heads, (B * h, T, e)) is None
    back = views.transpose(heads, 1, 2).hold()
    assert back.is_contiguous
    before = len(x.machine.ledger.events)
    views.reshape(back, (B * T, h * e)).discard()
    assert len(x.machine.ledger.events) == before  # nothing was allocated
    views.reshape(heads, (B * h, T, e)).discard()
    assert [event.sign for event in x.machine.ledger.events[before:]] == [1, -1]


def test_a_third_of_a_fused_projection():
    """One of three chunks of (B, T, 3 d): rows fold, a row's own elements stay apart from the next row's."""
    fused = machine().empty((B, T, 3 * d)).hold()
    q, _, _ = (x.hold() for x in views.split(fused, (d, d, d)))
    assert q.stride == (3 * T * d, 3 * d, ONE)
    assert not q.is_contiguous
    assert views.view_stride(q, (B * T, d)) == (3 * d, ONE)
    assert views.view_stride(q, (B, T * d)) is None


def test_a_dimension_of_one_is_contiguous_with_anything():
    """One head: moving it in front of the tokens changes no address."""
    x = machine().empty((B, T, ONE, e)).hold()
    forward = views.transpose(x, 1, 2).hold()
    assert forward.is_contiguous
    assert views.view_stride(forward, (B, T, e)) == (T * e, e, ONE)


def test_an_expanded_dimension_has_no_stride_and_cannot_be_folded():
    x = machine().empty((B, ONE, e)).hold()
    wide = views.expand(x, (B, T, e)).hold()
    assert numbers(wide.stride) == (7, 0, 1)
    assert views.view_stride(wide, (B * T, e)) is None
    assert [k.name for k in x.machine.ledger.kernels] == []
    views.repeat_heads(views.unsqueeze(x, 1), constant(1)).discard()
    assert len(x.machine.ledger.events) == 1


def test_the_first_operand_with_another_order_decides():
    """Two operands of a sum, one transposed: TensorIterator lays its result out as the first of them."""
    m = machine()
    rows, columns = m.empty((T, d)).hold(), views.transpose(m.empty((d, T)).hold(), 0, 1).hold()
    assert dense_strides((T, d), (rows, columns)) == (d, ONE)
    assert dense_strides((T, d), (columns, rows)) == (ONE, T)
    row = m.empty((d,)).hold()  # broadcast: it says nothing of the order of rows
    assert dense_strides((T, d), (row, columns)) == (ONE, T)


@pytest.mark.parametrize(("rows", "allocated"), [(59, 0), (60, 60 * 60 * 2)])
def test_a_transposed_copy_takes_a_block_of_60_by_60(rows, allocated):
    """copy_same_type_transpose_ in aten/src/ATen/native/Copy.cpp, from as many elements on."""
    m = machine()
    x = views.transpose(m.empty((constant(rows), constant(60)), BFLOAT16).hold(), 0, 1).hold()
    before = len(m.ledger.events)
    views.clone(x).hold()
    sizes = [numbers((event.storage.nbytes,))[0] for event in m.ledger.events[before:] if event.sign > 0]
    assert sizes == [rows * 60 * 2, *([allocated] if allocated else [])]
