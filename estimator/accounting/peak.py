"""The closed form of the peak: the few polynomials of live bytes that no other one dominates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from estimator.eager.sizes import BLOCKS, INDEX, LETTER, NAMES, ONE, SHARES, TILES, ZERO, Size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from estimator.accounting.trace import Moment, Trace
    from estimator.eager.ledger import Category, Where
    from estimator.eager.sizes import ShapeClass

Monomial = tuple[int, ...]
COUNTED_FROM_ONE = ("n", "s", "w", "c", "z", "r", "v", *SHARES, *BLOCKS, *TILES)


@dataclass(frozen=True)
class Piece:
    """One polynomial of the peak's maximum.

    Attributes:
        live: live bytes at that moment.
        where: phase, module, block and operator of the allocation that makes it so many.
        categories: the same bytes by what they are for; their sum is `live`.
    """

    live: Size
    where: Where
    categories: Mapping[Category, Size]


def peak_pieces(trace: Trace, shapes: ShapeClass, layers: Size) -> tuple[Piece, ...]:
    """The undominated moments of a trace, those that rule at large sizes first.

    A polynomial dominates another if their difference has no negative coefficient once every letter is written as its
    least value plus something (a size that is not 1 is at least 2), and once known products are multiplied out (d is
    h e, h is g k): then it is at least as great at every point of the class.
    """
    monomials, coefficients, moments = _polynomials(trace, layers)
    kept: list[int] = []
    shifted = coefficients @ _shift_matrix(monomials, shapes, floor=trace.executed)
    for i in np.argsort(-shifted.sum(1, dtype=np.float64), kind="stable"):
        if not any(bool((shifted[k] >= shifted[i]).all()) for k in kept):
            kept = [k for k in kept if not bool((shifted[i] >= shifted[k]).all())]
            kept.append(int(i))
    return tuple(_piece(trace, moments[i], layers) for i in kept)


def _polynomials(trace: Trace, layers: Size) -> tuple[list[Monomial], NDArray[np.int64], list[Moment]]:
    """(monomials, coefficients of each distinct moment, those moments)."""
    counts = np.array([np.concatenate((m.constant, m.slope)) for m in trace.moments])
    _, first = np.unique(counts, axis=0, return_index=True)
    moments = [trace.moments[i] for i in np.sort(first)]
    sizes = [n for n, _ in trace.classes]
    index: dict[Monomial, int] = {}
    times = trace.repetitions(layers)
    columns = [[(index.setdefault(x, len(index)), c) for x, c in p.terms()] for p in sizes]
    columns += [[(index.setdefault(x, len(index)), c) for x, c in (p * times).terms()] for p in sizes]
    matrix = np.zeros((len(columns), len(index)), dtype=np.int64)
    for row, terms in enumerate(columns):
        for column, coefficient in terms:
            matrix[row, column] = int(coefficient * trace.unit)  # whole, and no different to compare
    rows = np.array([np.concatenate((m.constant, m.slope)) for m in moments])
    coefficients, first = np.unique(rows @ matrix, axis=0, return_index=True)
    return list(index), coefficients, [moments[i] for i in first]


def _shift_matrix(monomials: list[Monomial], shapes: ShapeClass, floor: int) -> NDArray[np.int64]:
    """(monomials, shifted monomials): each monomial in letters that start from 0."""
    index: dict[Monomial, int] = {}
    rows = []
    for monomial in monomials:
        shifted = ONE
        for name, exponent in zip(NAMES, monomial, strict=True):
            if exponent:
                shifted = shifted * _shifted_letter(shapes, name, floor) ** exponent
        rows.append([(index.setdefault(x, len(index)), int(c)) for x, c in shifted.terms()])
    matrix = np.zeros((len(rows), len(index)), dtype=np.int64)
    for row, terms in enumerate(rows):
        for column, coefficient in terms:
            matrix[row, column] = coefficient
    return matrix


@lru_cache(maxsize=4096)
def _shifted_letter(shapes: ShapeClass, name: str, floor: int) -> Size:
    """A letter as a product of shifted ones: at least 2, unless it counts scratch or layers; C is at least T."""
    for i, j, k in shapes.relations:
        if INDEX[name] == k:
            return _shifted_letter(shapes, NAMES[i], floor) * _shifted_letter(shapes, NAMES[j], floor)
    least = floor if name == "L" else 1 if name in COUNTED_FROM_ONE else 2
    if name == "C" and "C" not in shapes.ones and shapes.letters["T"] != ONE:
        return LETTER["C"] + _shifted_letter(shapes, "T", floor)
    return LETTER[name] + least


def _piece(trace: Trace, moment: Moment, layers: Size) -> Piece:
    categories: dict[Category, Size] = {}
    times = trace.repetitions(layers)
    for (size, category), constant, slope in zip(trace.classes, moment.constant, moment.slope, strict=True):
        if constant or slope:
            part = int(constant) * size + int(slope) * size * times
            categories[category] = categories.get(category, ZERO) + part
    return Piece(sum(categories.values(), ZERO), moment.where, categories)
