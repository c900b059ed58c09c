"""The symbolic machine on programs of a few lines, whose bytes at every moment are worked out by hand.

What autograd saves is from PyTorch's tools/autograd/derivatives.yaml; who holds what, from its engine.cpp.
"""

from __future__ import annotations

import pytest

from estimator.accounting.peak import peak_pieces
from estimator.accounting.trace import Trace
from estimator.eager import ops, views
from estimator.eager.autograd import backward
from estimator.eager.checkpointing import RNG_STATE_BYTES
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ONE, B, L, T, d, evaluate, f, written
from estimator.eager.linalg import linear
from estimator.eager.repetition import Group, Stack, layout
from estimator.eager.sizes import ShapeClass
from estimator.eager.tensor import BFLOAT16, BOOL, FLOAT32, INT64, Locals, Machine, arguments, op
from estimator.models.layers import Module

pytestmark = pytest.mark.quick
SIZES = {"B": 2, "T": 3, "d": 5, "f": 7, "L": 9, "n": 1}
CLASS = ShapeClass(frozenset(), False, True)
ALONE = Stack((Group(("only",), 1),))


def machine(device="cpu", stack=ALONE):
    return Machine(CLASS, device, stack, SIZES)


def live(m):
    """Bytes alive now."""
    return sum((event.sign * event.storage.nbytes for event in m.ledger.events), 0 * ONE)


def parameter(m, *shape):
    return ops.parameter(m, shape, FLOAT32)


def given(m, *shape, dtype=FLOAT32):
    return m.empty(shape, dtype, category=Category.INPUT).hold()


# ---- who holds what


def test_rebinding_a_name_frees_what_it_held_after_the_new_value_is_made():
    """x = x + x: the old x lives until the sum is there; out of the frame nothing is left."""
    m = machine()
    with Locals() as v:
        v.x = m.empty((d,))
        v.x = ops.add(v.x, v.x)
        assert live(m) == 4 * d
    assert live(m) == 0 * ONE
    assert [(event.sign, event.storage.nbytes) for event in m.ledger.events] == [
        (1, 4 * d), (1, 4 * d), (-1, 4 * d), (-1, 4 * d),
    ]  # fmt: skip


def test_a_temporary_goes_with_the_operator_that_read_it():
    """(x + x) * x: the sum is gone when the product returns."""
    m = machine()
    x = given(m, d)
    y = ops.mul(ops.add(x, x), x).hold()
    assert live(m) == 8 * d
    y.drop()
    assert live(m) == 4 * d


def test_an_argument_outlives_a_function_that_forgets_it():
    """Python's caller holds what it passes until the call returns."""
    m = machine()
    seen = []

    @op
    def forgetful(x):
        out = ops.add(x, x).hold()
        with arguments((out,)):
            seen.append(live(m))
        out.owners -= 1
        return out

    y = forgetful(m.empty((d,))).hold()
    assert seen == [8 * d]
    assert live(m) == 4 * d
    y.drop()
    assert live(m) == 0 * ONE


def test_a_view_keeps_the_storage_of_its_base():
    m = machine()
    x = m.empty((B, T)).hold()
    row = views.transpose(x, 0, 1).hold()
    x.drop()
    assert live(m) == 4 * B * T
    row.drop()
    assert live(m) == 0 * ONE


def test_dropping_twice_is_an_error():
    x = machine().empty((d,)).hold()
    x.drop()
    with pytest.raises(AssertionError, match="dropped more often than held"):
        x.discard()


# ---- what operators save


def kept(program):
    """Bytes that are alive for backward only, after a forward whose result is held."""
    m = machine()
    x, w = parameter(m, B, d), parameter(m, d)
    before = live(m)
    y = program(x, w).hold()
    return live(m) - before - y.storage.nbytes


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (ops.add, 0 * ONE),  # the gradient needs neither operand
        (ops.mul, 0 * ONE),  # both operands, parameters that live anyway
        (lambda x, w: ops.mul(ops.add(x, w), w), 4 * B * d),  # the sum, for the gradient of w
        (lambda x, _: ops.softmax(x), 0 * ONE),  # its result, which is held
        (lambda x, w: ops.add(ops.softmax(x), w), 4 * B * d),  # the softmax's result alone
        (lambda x, w: ops.activation("gelu", ops.add(x, w)), 4 * B * d),  # its input
        (lambda x, w: ops.layer_norm(x, w, w), 8 * B),  # a mean and a 1 / std a row
        (lambda x, w: ops.layer_norm(ops.add(x, w), w, w), 4 * B * d + 8 * B),
        (lambda x, _: ops.mul_number(x), 8 * ONE),  # the number, a double on the CPU
    ],
)
def test_bytes_kept_for_backward(program, expected):
    assert kept(program) == expected


def test_nothing_is_kept_where_no_gradient_is_wanted():
    m = machine()
    x = given(m, B, d)
    y = ops.activation("gelu", ops.add(x, x)).hold()
    assert live(m) == 8 * B * d
    assert y.grad_fn is None
    with m.no_grad():
        p = parameter(m, B, d)
        assert ops.activation("gelu", ops.add(p, p)).hold().grad_fn is None


def test_cuda_keeps_no_number_and_half_precision_keeps_half():
    m = machine("cuda")
    x = ops.parameter(m, (B, d), BFLOAT16)
    before = live(m)
    y = ops.mul_number(x).hold()
    z = ops.activation("gelu", y).hold()
    y.drop()
    assert live(m) - before == 2 * (2 * B * d)
    assert z.dtype is BFLOAT16


def test_a_mask_is_kept_as_bools():
    m = machine()
    x, mask = parameter(m, T, T), given(m, T, T, dtype=BOOL)
    before = live(m)
    y = ops.masked_fill(ops.add(x, x), mask).hold()
    mask.drop()
    assert live(m) - before == y.storage.nbytes  # the node holds the mask in the caller's place
    y.drop()
    assert live(m) == 4 * T * T  # the parameter


# ---- backward


def test_a_gradient_that_nobody_else_holds_is_taken_as_it_is():
    """y = gelu(p): the result of gelu's backward becomes p.grad, no copy is made."""
    m = machine()
    p = parameter(m, B, d)
    y = ops.activation("gelu", p).hold()
    backward(y)
    assert [k.name for k in m.ledger.kernels] == ["gelu", "gelu_backward"]
    assert p.grad.storage.category is Category.GRADIENT
    assert live(m) == 3 * 4 * B * d  # p, its gradient, y


def test_a_gradient_that_is_passed_on_twice_is_cloned_once():
    """y = a + b: both gradients are the incoming one, which Python holds to the end, so both are cloned."""
    m = machine()
    a, b = parameter(m, d), parameter(m, d)
    y = ops.add(a, b).hold()
    backward(y)
    assert [k.name for k in m.ledger.kernels] == ["add", "clone", "clone"]
    assert a.grad.storage is not b.grad.storage


def test_a_parameter_used_twice_sums_its_gradients_in_place_where_it_may():
    """y = gelu(p) + gelu(p): the second gradient is added to the first, which nothing else holds."""
    m = machine()
    p = parameter(m, d)
    y = ops.add(ops.activation("gelu", p), ops.activation("gelu", p)).hold()
    backward(y)
    assert [k.name for k in m.ledger.kernels][3:] == ["gelu_backward", "gelu_backward", "add_"]
    assert live(m) == 3 * 4 * d


def test_a_second_backward_adds_to_the_gradient():
    m = machine()
    p = parameter(m, d)
    for _ in range(2):
        y = ops.activation("gelu", p).hold()
        backward(y)
        y.drop()
    assert [k.name for k in m.ledger.kernels][-1] == "add_"
    assert live(m) == 2 * 4 * d


def test_the_gradient_of_what_was_broadcast_is_summed():
    m = machine()
    x, bias = parameter(m, B, T, d), parameter(m, d)
    backward(ops.add(x, bias).hold())
    assert bias.grad.shape == (d,)
    assert [k.name for k in m.ledger.kernels] == ["add", "sum", "clone"]


def test_backward_goes_from_the_latest_to_the_earliest():
    m = machine()
    p = parameter(m, d)
    y = ops.softmax(ops.activation("silu", ops.activation("gelu", p))).hold()
    backward(y)
    names = [k.name for k in m.ledger.kernels]
    assert names == ["gelu", "silu", "_softmax", "_softmax_backward_data", "silu_backward", "gelu_backward"]


# ---- a step, its peak, any number of blocks


def two_layers():
    """y = linear(gelu(linear(x))), rows of x without a gradient; y and the gradient of y stay to the end."""
    m = machine()
    first, second, x = parameter(m, f, d), parameter(m, d, f), given(m, B, d)
    m.ledger.phase = Phase.FORWARD
    with Locals() as v:
        v.x = linear(x, first, None)
        v.x = ops.activation("gelu", v.x)
        v.x = linear(v.x, second, None)
        y = v.take("x").hold()
    m.ledger.phase = Phase.BACKWARD
    backward(y)
    m.ledger.phase = Phase.OPTIMIZER
    y.drop()
    for p in (first, second):
        p.grad.drop()
    return m


def test_the_peak_of_two_layers_is_one_of_two_moments():
    """Alive before: two matrices of d f, and x. In backward y and its gradient, 2 B d, and then

    - in gelu's backward: gelu's input, the gradients of its result and of it, 3 B f, and one matrix's gradient, d f;
    - in the first product's: the gradient of gelu's input, B f, and both matrices' gradients, 2 d f.

    In the second product's backward (gelu's input, its result, its gradient and d f) it is as much as in gelu's.
    """
    m = two_layers()
    before = 2 * d * f + B * d
    expected = {4 * (before + 2 * B * d + 3 * B * f + d * f), 4 * (before + 2 * B * d + B * f + 2 * d * f)}
    pieces = peak_pieces(Trace(m.ledger, ALONE), CLASS)
    assert {piece.live for piece in pieces} == expected, [written(piece.live) for piece in pieces]
    assert all(sum(piece.categories.values(), 0 * ONE) == piece.live for piece in pieces)
    assert live(m) == 4 * before


def test_flops_of_two_layers():
    """2 B d f forward, a product; backward the same for each factor that wants a gradient: x does not."""
    m = two_layers()
    flops = [k.flops for k in m.ledger.kernels if k.gemm]
    assert flops == [2 * B * d * f] * 5


class Gelu(Module):
    """A block that is two activations."""

    def forward(self, v, x):
        v.x = ops.activation("gelu", x)
        return ops.activation("gelu", v.x)


def blocks(number, *, checkpointed, stack):
    """x = block(x), `number` times, of a parameter; the result and its gradient stay to the end."""
    m = machine(stack=stack)
    p = parameter(m, B, d)
    modules = [Gelu(m, f"blocks.{i}", i) for i in range(number)]
    m.ledger.phase = Phase.FORWARD
    with Locals() as v:
        v.x = p
        for module in modules:
            module.checkpointed = checkpointed
            v.x = module(v.x)
        y = v.take("x").hold()
    m.ledger.phase = Phase.BACKWARD
    backward(y)
    m.ledger.phase = Phase.OPTIMIZER
    y.drop()
    p.grad.drop()
    return m


def test_the_peak_of_any_number_of_blocks():
    """Each activation keeps its input: of 2 L of them the first keeps the parameter, the result is held by name.

    So 2 L results are alive after forward, and at once the gradient of the last and of its input: 2 L + 2, and the
    parameter.
    """
    found = layout((), ("block",), 9)
    m = blocks(3, checkpointed=False, stack=found.stack)
    (piece,) = peak_pieces(Trace(m.ledger, found.stack), CLASS)
    assert piece.live == 4 * B * d * (2 * L + 3)
    whole = Stack(tuple(Group(("block",), 1) for _ in range(9)))
    (executed,) = peak_pieces(Trace(blocks(9, checkpointed=False, stack=whole).ledger, whole), CLASS)
    assert evaluate(executed.live, SIZES) == evaluate(piece.live, SIZES) == 4 * 2 * 5 * 21


def test_checkpointed_blocks_keep_their_inputs_and_the_random_state():
    """Forward leaves L results and L states of the generator. The last block, run again, has its own state's copy,

    its first result and, when its second is asked to save that, stops: with the incoming gradient, the gradients of
    the two activations. PyTorch's early stop spares it the second result.
    """
    found = layout((), ("block",), 9)
    m = blocks(3, checkpointed=True, stack=found.stack)
    pieces = peak_pieces(Trace(m.ledger, found.stack), CLASS)
    forward_end = 4 * B * d * (L + 1) + RNG_STATE_BYTES * L
    again = 2 * 4 * B * d  # the gradient of the result; the first activation's result
    largest = {piece.live - forward_end - again for piece in pieces}
    assert largest == {RNG_STATE_BYTES * ONE, 4 * B * d}, [written(piece.live) for piece in pieces]


def test_an_embedding_reads_ids_and_has_a_gradient_of_the_whole_table():
    m = machine()
    table, ids = parameter(m, f, d), given(m, B, T, dtype=INT64)
    y = ops.embedding(ids, table).hold()
    assert y.shape == (B, T, d)
    backward(y)
    assert table.grad.shape == (f, d)
    assert live(m) == 4 * (2 * f * d + B * T * d) + 8 * B * T
