"""The closed form of the peak: the few polynomials of live bytes that no other one dominates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np

from estimator.eager.letters import LETTERS, ONE, ZERO, Size, index_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from estimator.accounting.trace import Moment, Trace
    from estimator.eager.ledger import Category, Where
    from estimator.eager.repetition import Stack
    from estimator.eager.sizes import ShapeClass

Monomial = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One polynomial of the peak's maximum.

    Attributes:
        live: live bytes at that moment.
        moment: the allocation that makes it so many.
        trace: the step that it is of.
    """

    live: Size
    moment: Moment
    trace: Trace

    @property
    def where(self) -> Where:
        """Phase, module, block and operator of the allocation."""
        return self.moment.where

    @cached_property
    def categories(self) -> Mapping[Category, Size]:
        """The same bytes by what they are for; their sum is `live`. Of one piece in a hundred anybody asks."""
        found: dict[Category, Size] = {}
        for times, counts in zip((ONE, *self.trace.stack.repetitions), self.moment.counts, strict=True):
            terms: dict[Category, dict[Monomial, int | Fraction]] = {}
            for (size, category), count in zip(self.trace.classes, counts.tolist(), strict=True):
                own = terms.setdefault(category, {}) if count else {}
                for monomial, coefficient in size.terms if count else ():
                    own[monomial] = own.get(monomial, 0) + count * coefficient
            for category, own in terms.items():
                found[category] = found.get(category, ZERO) + Size({x: c for x, c in own.items() if c}) * times
        return found


def peak_pieces(trace: Trace, shapes: ShapeClass) -> tuple[Piece, ...]:
    """The undominated moments of a trace, those that rule at large sizes first.

    A polynomial dominates another if their difference has no negative coefficient once every letter is written as its
    least value plus something (a size that is not 1 is at least 2), and once known products are multiplied out (d is
    h e, h is g k): then it is at least as great at every point of the class.
    """
    monomials, coefficients, denominator, moments = _polynomials(trace)
    shifted = coefficients @ _shift_matrix(monomials, shapes, trace.stack)
    kept: list[int] = []
    for i in np.argsort(-shifted.sum(1, dtype=np.float64), kind="stable").tolist():
        others = shifted[kept]
        if not bool((others >= shifted[i]).all(1).any()):
            beaten = (shifted[i] >= others).all(1)
            kept = [k for k, less in zip(kept, beaten.tolist(), strict=True) if not less]
            kept.append(i)
    return tuple(Piece(_size(monomials, coefficients[i].tolist(), denominator), moments[i], trace) for i in kept)


def _size(monomials: list[Monomial], coefficients: list[int], denominator: int) -> Size:
    """The polynomial of these whole coefficients over one denominator."""
    found = ((x, Fraction(c, denominator)) for x, c in zip(monomials, coefficients, strict=True) if c)
    return Size({x: c.numerator if c.denominator == 1 else c for x, c in found})


def _polynomials(trace: Trace) -> tuple[list[Monomial], NDArray[np.int64], int, list[Moment]]:
    """(monomials, whole coefficients of each distinct moment, the denominator of all, those moments)."""
    every = trace.moments()
    _, first = np.unique(trace.moment_counts.reshape(len(every), -1), axis=0, return_index=True)
    moments = [every[i] for i in np.sort(first)]
    index: dict[Monomial, int] = {}
    columns = [
        [(index.setdefault(x, len(index)), c) for x, c in (size * times).terms]
        for times in (ONE, *trace.stack.repetitions)
        for size, _ in trace.classes
    ]
    denominator = math.lcm(*{c.denominator for terms in columns for _, c in terms})
    matrix = np.zeros((len(columns), len(index)), dtype=np.int64)
    for row, terms in enumerate(columns):
        for column, coefficient in terms:
            matrix[row, column] = int(coefficient * denominator)
    rows = np.array([moment.counts.ravel() for moment in moments], dtype=np.int64)
    coefficients, first = np.unique(rows @ matrix, axis=0, return_index=True)
    return list(index), coefficients, denominator, [moments[i] for i in first]


def _shift_matrix(monomials: list[Monomial], shapes: ShapeClass, stack: Stack) -> NDArray[np.int64]:
    """(monomials, shifted monomials): each monomial in letters that start from 0."""
    index: dict[Monomial, int] = {}
    rows = []
    for monomial in monomials:
        shifted = ONE
        for letter in monomial:
            shifted = shifted * _shifted_letter(shapes, letter, stack)
        rows.append([(index.setdefault(x, len(index)), int(c)) for x, c in shifted.terms])
    matrix = np.zeros((len(rows), len(index)), dtype=np.int64)
    for row, terms in enumerate(rows):
        for column, coefficient in terms:
            matrix[row, column] = coefficient
    return matrix


@lru_cache(maxsize=4096)
def _shifted_letter(shapes: ShapeClass, letter: int, stack: Stack) -> Size:
    """A letter as a product of shifted ones: at least its least value; C is at least T, L at least what is executed."""
    for i, j, k in shapes.relations:
        if letter == k:
            return _shifted_letter(shapes, i, stack) * _shifted_letter(shapes, j, stack)
    entry = LETTERS[letter]
    own = Size({(letter,): 1})
    if entry.name == "L":
        return own + len(stack.places)
    if entry.name == "C" and shapes.letters["T"].number is None:
        return own + _shifted_letter(shapes, index_of("T"), stack)
    return own + entry.least
