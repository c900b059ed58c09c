"""Sizes as polynomials: sums of products of letters, exact, each made once.

A letter is an integer here (its place in `estimator.eager.letters`), a monomial the sorted tuple of its letters, one
for each time that it is a factor. Two equal polynomials are one object, so that comparing them is comparing addresses:
the symbolic execution compares shapes a million times.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Self, cast
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from collections.abc import Callable, ItemsView, Mapping

    Monomial = tuple[int, ...]
    Coefficient = int | Fraction

_made: WeakValueDictionary[frozenset[tuple[tuple[int, ...], Coefficient]], Size] = WeakValueDictionary()


class Size:
    """A polynomial in letters with rational coefficients; immutable, equal ones are the same object."""

    __slots__ = ("__weakref__", "_terms")

    _terms: dict[Monomial, Coefficient]

    def __new__(cls, terms: Mapping[Monomial, Coefficient]) -> Self:
        """The polynomial of these terms; zero coefficients must have been left out."""
        key = frozenset(terms.items())
        found = _made.get(key)
        if found is None:
            found = object.__new__(cls)
            found._terms = dict(terms)
            found = _made.setdefault(key, found)
        return cast("Self", found)

    def __reduce__(self) -> tuple[object, ...]:
        return Size, (self._terms,)

    @property
    def terms(self) -> ItemsView[Monomial, Coefficient]:
        """(monomial, coefficient) pairs."""
        return self._terms.items()

    @property
    def letters(self) -> set[int]:
        """The letters that occur."""
        return {i for monomial in self._terms for i in monomial}

    @property
    def number(self) -> Coefficient | None:
        """The value of a polynomial without letters, None of any other."""
        if not self._terms:
            return 0
        return self._terms.get(()) if len(self._terms) == 1 else None

    def coefficient(self, monomial: Size) -> Coefficient:
        """The coefficient of a product of letters."""
        (letters,) = monomial._terms
        return self._terms.get(letters, 0)

    def __bool__(self) -> bool:
        return bool(self._terms)

    def __add__(self, other: Size | Coefficient) -> Size:
        if not isinstance(other, Size):
            other = constant(other)
        return _summed(self._terms, other._terms, 1)

    __radd__ = __add__

    def __sub__(self, other: Size | Coefficient) -> Size:
        if not isinstance(other, Size):
            other = constant(other)
        return _summed(self._terms, other._terms, -1)

    def __rsub__(self, other: Coefficient) -> Size:
        return constant(other) - self

    def __mul__(self, other: Size | Coefficient) -> Size:
        if not isinstance(other, Size):
            return Size({m: _plain(c * other) for m, c in self._terms.items()}) if other else ZERO
        if len(self._terms) == len(other._terms) == 1:
            ((a, x),), ((b, y),) = self._terms.items(), other._terms.items()
            return Size({_product(a, b): x * y if type(x) is type(y) is int else _plain(x * y)})
        terms: dict[Monomial, Coefficient] = {}
        for a, x in self._terms.items():
            for b, y in other._terms.items():
                monomial = _product(a, b)
                terms[monomial] = terms.get(monomial, 0) + x * y
        return Size({m: _plain(c) for m, c in terms.items() if c})

    __rmul__ = __mul__

    def __truediv__(self, number: Coefficient) -> Size:
        return self * Fraction(1, number)

    def __pow__(self, exponent: int) -> Size:
        result = ONE
        for _ in range(exponent):
            result = result * self
        return result

    def substituted(self, values: Mapping[int, Size]) -> Size:
        """With polynomials in place of some letters."""
        if not self.letters & values.keys():
            return self
        result = ZERO
        for monomial, coefficient in self._terms.items():
            kept = tuple(i for i in monomial if i not in values)
            term = Size({kept: coefficient})
            for i in monomial:
                if i in values:
                    term = term * values[i]
            result = result + term
        return result

    def rewritten(self, rule: Callable[[Monomial], Monomial]) -> Size:
        """With each monomial as `rule` writes it."""
        terms: dict[Monomial, Coefficient] = {}
        for monomial, coefficient in self._terms.items():
            new = rule(monomial)
            terms[new] = terms.get(new, 0) + coefficient
        return Size({m: c for m, c in terms.items() if c})


def _product(a: Monomial, b: Monomial) -> Monomial:
    if not a or not b:
        return a or b
    return tuple(sorted(a + b))


def _plain(c: Coefficient) -> Coefficient:
    """An integer as an int."""
    return c.numerator if type(c) is Fraction and c.denominator == 1 else c


def _summed(a: Mapping[Monomial, Coefficient], b: Mapping[Monomial, Coefficient], sign: int) -> Size:
    terms = dict(a)
    for monomial, coefficient in b.items():
        total = terms.get(monomial, 0) + sign * coefficient
        if total:
            terms[monomial] = _plain(total)
        else:
            terms.pop(monomial, None)
    return Size(terms)


def constant(number: Coefficient) -> Size:
    """A polynomial without letters."""
    return Size({(): number}) if number else ZERO


ZERO = Size({})
ONE = Size({(): 1})
