"""Sizes as polynomials of letters: arithmetic against Python's, derived letters against values worked out by hand."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.accounting.polynomials import Polynomials
from estimator.eager.letters import (
    LETTERS,
    ONE,
    ZERO,
    B,
    D,
    Function,
    L,
    Size,
    Sizes,
    T,
    V,
    as_sizes,
    bases,
    ceiling,
    constant,
    d,
    e,
    evaluate,
    expression,
    g,
    h,
    index_of,
    k,
    larger,
    letter,
    rounded_up,
    smaller,
    substituted,
    written,
)
from estimator.eager.sizes import Fact, ShapeClass

pytestmark = pytest.mark.quick
SOME = (B, T, d, V)
NAMES = ("B", "T", "d", "V")


@st.composite
def polynomials(draw):
    """A polynomial, and the same as a function of Python's numbers."""
    terms = draw(
        st.lists(
            st.tuples(st.integers(-9, 9), st.integers(1, 3), st.lists(st.integers(0, 3), max_size=3)),
            max_size=4,
        )
    )
    size = ZERO
    for numerator, denominator, factors in terms:
        term = ONE * Fraction(numerator, denominator)
        for i in factors:
            term = term * SOME[i]
        size = size + term

    def at(values):
        total = Fraction(0)
        for numerator, denominator, factors in terms:
            product = Fraction(numerator, denominator)
            for i in factors:
                product *= values[i]
            total += product
        return total

    return size, at


POINTS = st.tuples(*[st.integers(1, 50)] * 4)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(polynomials(), polynomials(), POINTS)
def test_arithmetic_is_that_of_numbers(a, b, point):
    (x, x_at), (y, y_at) = a, b
    sizes = Sizes(zip(NAMES, point, strict=True))
    for found, expected in (
        (x + y, x_at(point) + y_at(point)),
        (x - y, x_at(point) - y_at(point)),
        (x * y, x_at(point) * y_at(point)),
        (x / 3, x_at(point) / 3),
        (5 - x, 5 - x_at(point)),
        (x**2, x_at(point) ** 2),
    ):
        assert sizes.value(found) == expected
        assert expression(found).subs({sympy.Symbol(n, positive=True): v for n, v in sizes.items()}) == expected


@settings(max_examples=50, deadline=None, derandomize=True)
@given(polynomials(), polynomials())
def test_equal_polynomials_are_one_object(a, b):
    x, y = a[0], b[0]
    assert x * y is y * x
    assert (x + y) - y is x
    assert (x - x) is ZERO
    assert pickle.loads(pickle.dumps(x)) is x  # noqa: S301 - what was written a moment ago


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(polynomials(), min_size=1, max_size=4), st.lists(POINTS, min_size=1, max_size=9))
def test_compiled_polynomials_are_the_polynomials(several, points):
    table = Polynomials({(i,): size * 6 for i, (size, _) in enumerate(several)})
    by_hand = [[int(6 * at(point)) for _, at in several] for point in points]
    for point, expected in zip(points, by_hand, strict=True):
        monomials = table.at(dict(zip(NAMES, point, strict=True)))
        assert [table.value((i,), monomials) for i in range(len(several))] == expected
    columns = {name: np.array([float(p[i]) for p in points]) for i, name in enumerate(NAMES)}
    assert list(table.greatest(list(table.keys), columns)) == [max(row) for row in by_hand]
    mixed = {**columns, "T": points[0][1]}
    one = [(p[0], points[0][1], *p[2:]) for p in points]
    assert list(table.greatest(list(table.keys), mixed)) == [max(int(6 * at(p)) for _, at in several) for p in one]


def test_a_value_beyond_64_bits_is_refused():
    table = Polynomials({(0,): B**3})
    with pytest.raises(OverflowError):
        table.greatest([(0,)], {"B": np.array([2.0**21, 3.0])})
    assert list(table.greatest([(0,)], {"B": np.array([2.0**20, 3.0])})) == [2**60, 27]


def test_polynomials_are_written_with_the_longest_products_first():
    assert written(1 + 2 * B * T * d * d - V) == "2*B*T*d**2 - V + 1"
    assert written(ZERO) == "0"
    assert written(T / 2) == "1/2*T"


def test_a_letter_has_one_meaning():
    again = letter("B", LETTERS[index_of("B")].meaning)
    assert again is B
    with pytest.raises(ValueError, match="already defined"):
        letter("B", "bytes")


@pytest.mark.parametrize(("rows", "ranks", "expected"), [(10, 4, 3), (8, 4, 2), (1, 8, 1), (50257, 8, 6283)])
def test_a_share_of_rows_is_rounded_up(rows, ranks, expected):
    share = ceiling(V, D)
    assert evaluate(share, {"V": rows, "D": ranks}) == expected
    assert expression(share) == sympy.ceiling(expression(V) / expression(D))
    assert list(Sizes(V=np.array([rows, 3]), D=ranks).value(share)) == [expected, -(-3 // ranks)]
    assert {LETTERS[i].name for i in bases(share.letters)} == {"V", "D"}


def test_blocks_of_256():
    """1,600 is 6.25 blocks of 256, so 7 of them, 1,792."""
    assert evaluate(rounded_up(d, 256), {"d": 1600}) == 1792
    assert evaluate(rounded_up(d, 256), {"d": 1536}) == 1536
    assert rounded_up(constant(1600), 256) is constant(1792)
    assert ceiling(d, 1) is d


def test_the_least_and_the_greatest_of_sizes():
    assert smaller(2 * T, 3 * T) is 2 * T
    assert smaller(T, 1) is ONE  # no size is less than 1
    assert larger(T, 1) is T
    assert smaller(T, 512) is smaller(512, T)
    for t, least, greatest in ((100, 100, 512), (512, 512, 512), (1024, 512, 1024)):
        assert evaluate(smaller(512, T), {"T": t}) == least
        assert evaluate(larger(512, T), {"T": t}) == greatest
    assert evaluate(smaller(B * T, d, V), {"B": 3, "T": 5, "d": 16, "V": 17}) == 15


def test_other_letters_in_place_of_some_reach_into_derived_ones():
    rows = 4 * ceiling(V + d, 8)
    swapped = substituted(rows, {"V": 3 * T, "d": constant(2)})
    assert evaluate(swapped, {"T": 5}) == 4 * 3  # ceil(17 / 8) = 3
    assert substituted(rows, {"B": T}) is rows


def test_a_function_that_is_long_to_write_has_a_symbol():
    tiles = Function(lambda t: -(-t // 7), "sevens({0})", "rows in sevens", symbol="s_7", usual=("T",))
    assert written(tiles(T)) == "s_7"
    assert written(tiles(2 * T)) == "s_7(2*T)"
    assert evaluate(tiles(T) + tiles(2 * T), {"T": 8}) == 2 + 3
    assert expression(tiles(T)) == sympy.Symbol("s_7", positive=True)


GPT2 = {"B": 4, "T": 8, "L": 3, "d": 12, "h": 3, "k": 3, "g": 1, "e": 4, "f": 48, "V": 50, "C": 8, "n": 2, "D": 1}


def test_a_size_of_one_is_a_number_in_its_class():
    shapes = ShapeClass.at({**GPT2, "B": 1, "L": 1, "n": 1})
    assert shapes.numbers == {("B", 1)}  # of layers, threads and accelerators 1 says nothing of a shape
    assert shapes.letters["B"] is ONE
    assert shapes.letters["T"] is T


def test_sizes_that_coincide_have_one_letter():
    shapes = ShapeClass.at(GPT2)
    assert shapes.letters["k"] is h  # as many key as query heads
    assert shapes.product((h, e)) is d  # heads share the width
    assert shapes.product((B, h, T, e)) is B * T * d
    grouped = ShapeClass.at({**GPT2, "k": 1, "g": 3})
    assert grouped.letters["g"] is h  # one key/value head serves all
    grouped = ShapeClass.at({**GPT2, "h": 6, "e": 2, "k": 3, "g": 2})
    assert grouped.product((g, k, e)) is d


def test_the_half_of_a_rotary_width_below_four_is_a_number():
    assert ("e", 2) in ShapeClass.at({**GPT2, "e": 2}, frozenset({"e"})).numbers
    assert ("e", 2) not in ShapeClass.at({**GPT2, "e": 2}).numbers


def test_a_fact_is_answered_for_one_point_or_many():
    assert Fact("divides", D, V).answer({"V": 50, "D": 5})
    assert not Fact("divides", D, V).answer({"V": 50, "D": 4})
    many = Fact("at most", T, constant(512)).answer(as_sizes({"T": np.array([511, 512, 513])}))
    assert list(many) == [True, True, False]


def test_a_value_that_is_not_whole_is_no_size():
    with pytest.raises(AssertionError, match="is not an integer"):
        evaluate(L / 2, {"L": 3})
    assert isinstance(evaluate(L / 2, {"L": 4}), int)
    assert Size({}) is ZERO
