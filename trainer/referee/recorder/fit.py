"""Polynomials through values at points, exactly: rational coefficients, and points that were not used to judge."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Monomial = tuple[int, ...]  # the exponent of each letter
    Polynomial = dict[Monomial, Fraction]
    Point = tuple[int, ...]

MOST_CANDIDATES = 60  # monomials among which two or three terms are looked for


def value(p: Mapping[Monomial, Fraction], point: Point) -> Fraction:
    """The polynomial at a point."""
    return sum((c * prod(v**e for v, e in zip(point, x, strict=True)) for x, c in p.items()), Fraction(0))


def times(a: Mapping[Monomial, Fraction], b: Mapping[Monomial, Fraction]) -> Polynomial:
    """The product of two polynomials."""
    found: Polynomial = {}
    for x, c in a.items():
        for y, d in b.items():
            key = tuple(i + j for i, j in zip(x, y, strict=True))
            found[key] = found.get(key, Fraction(0)) + c * d
    return {x: c for x, c in found.items() if c}


class Fitter:
    """Fits values at a base point, at further values of each letter, and at mixed points.

    Args:
        letters: names of the sizes.
        values: of each letter, three values or more; the first are the base point.

    Attributes:
        points: where values are wanted, in this order.
    """

    def __init__(self, letters: Sequence[str], values: Mapping[str, Sequence[int]]) -> None:
        self.letters = tuple(letters)
        self.base = tuple(values[x][0] for x in letters)
        self.points = [self.base]
        self.axis: list[list[int]] = []  # of each letter, the points along it
        for i, x in enumerate(letters):
            along = range(len(self.points), len(self.points) + len(values[x]) - 1)
            self.points += [(*self.base[:i], v, *self.base[i + 1 :]) for v in values[x][1:]]
            self.axis.append(list(along))
        mixed = [
            tuple(values[x][1 + (i + turn) % (len(values[x]) - 1)] for i, x in enumerate(letters)) for turn in (0, 1)
        ]
        self.checks = list(range(len(self.points), len(self.points) + len(mixed)))
        self.points += mixed
        self._known: dict[tuple[int, ...], Polynomial | None] = {}

    def fit(self, values: Sequence[int]) -> Polynomial | None:
        """The polynomial that has these values at all points; None if none of few terms has."""
        key = tuple(values)
        if key not in self._known:
            self._known[key] = self._fitted(key)
        return self._known[key]

    def _fitted(self, values: Sequence[int]) -> Polynomial | None:
        if not any(values):
            return {}
        along = [self._along(i, values) for i in range(len(self.letters))]
        whole: Polynomial = {(0,) * len(self.letters): Fraction(values[0])}
        for i, coefficients in enumerate(along):
            one = {self._power(i, e): c / values[0] for e, c in enumerate(coefficients) if c}
            whole = times(whole, one)
        if self._holds(whole, values):
            return whole
        return self._sum(values, [max((e for e, c in enumerate(cs) if c), default=0) for cs in along])

    def _power(self, letter: int, exponent: int) -> Monomial:
        return tuple(exponent if i == letter else 0 for i in range(len(self.letters)))

    def _holds(self, p: Mapping[Monomial, Fraction], values: Sequence[int]) -> bool:
        return all(value(p, x) == y for x, y in zip(self.points, values, strict=True))

    def _along(self, letter: int, values: Sequence[int]) -> list[Fraction]:
        """Coefficients of the polynomial in one letter, the lowest first (Lagrange)."""
        at = [(self.base[letter], values[0]), *((self.points[j][letter], values[j]) for j in self.axis[letter])]
        found = [Fraction(0)] * len(at)
        for i, (x, y) in enumerate(at):
            basis = [Fraction(1)]
            for j, (other, _) in enumerate(at):
                if j != i:
                    shifted = [Fraction(0), *basis]
                    basis = [(s - other * b) / (x - other) for s, b in zip(shifted, [*basis, Fraction(0)], strict=True)]
            for e, c in enumerate(basis):
                found[e] += c * y
        return found

    def _sum(self, values: Sequence[int], degrees: Sequence[int]) -> Polynomial | None:
        """A sum of two or three monomials of the degrees that are seen along the letters."""
        candidates = list(product(*(range(d + 1) for d in degrees)))
        if len(candidates) > MOST_CANDIDATES:
            return None
        for count in (2, 3):
            for monomials in combinations(candidates, count):
                found = self._solved(monomials, values)
                if found is not None and self._holds(found, values):
                    return found
        return None

    def _solved(self, monomials: Sequence[Monomial], values: Sequence[int]) -> Polynomial | None:
        """Coefficients from as many points as it takes (Gauss), the points in order."""
        rows: list[list[Fraction]] = []
        for point, y in zip(self.points, values, strict=True):
            row = [Fraction(prod(v**e for v, e in zip(point, x, strict=True))) for x in monomials] + [Fraction(y)]
            for pivot, known in enumerate(rows):
                row = [a - row[pivot] * b for a, b in zip(row, known, strict=True)]
            pivot = len(rows)
            if row[pivot] == 0:
                if any(row[:-1]) or row[-1] == 0:
                    continue
                return None
            row = [a / row[pivot] for a in row]
            rows = [[a - known[pivot] * b for a, b in zip(known, row, strict=True)] for known in rows] + [row]
            if len(rows) == len(monomials):
                return {x: row[-1] for x, row in zip(monomials, rows, strict=True) if row[-1]}
        return None
