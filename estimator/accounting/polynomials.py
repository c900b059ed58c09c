"""Polynomials compiled for evaluation: at one point in exact integers, at a million points in numpy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.describe.checks import FIGURE
from estimator.eager.letters import LETTERS, Size, as_sizes, bases, spelled

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray


class Polynomials:
    """Named polynomials over one table of monomials, with whole coefficients over one denominator."""

    def __init__(self, rows: Mapping[tuple[Any, ...], Size]) -> None:
        index: dict[tuple[int, ...], int] = {}
        denominator = self._denominator = math.lcm(*{c.denominator for p in rows.values() for _, c in p.terms})
        self._rows = {
            key: [(index.setdefault(x, len(index)), int(c * denominator)) for x, c in p.terms]
            for key, p in rows.items()
        }
        self._monomials = [[(i, x.count(i)) for i in dict.fromkeys(x)] for x in index]

    def at(self, sizes: Mapping[str, int]) -> list[int]:
        """The value of each monomial at one point."""
        known, values = as_sizes(sizes), []
        for letters in self._monomials:
            value = 1
            for letter, exponent in letters:
                value *= known.of(letter) ** exponent
            values.append(value)
        return values

    def value(self, key: tuple[Any, ...], point: Sequence[int]) -> int:
        """A polynomial's exact value, given `at` the point."""
        return sum(c * point[i] for i, c in self._rows[key]) // self._denominator

    @property
    def keys(self) -> Iterable[tuple[Any, ...]]:
        """The names of the polynomials."""
        return self._rows.keys()

    def written(self, keys: Iterable[tuple[Any, ...]]) -> set[int]:
        """The letters in whose symbols the polynomials `keys` are written."""
        return set(spelled({letter for key in keys for i, _ in self._rows[key] for letter, _ in self._monomials[i]}))

    def letters(self, keys: Sequence[tuple[Any, ...]]) -> set[str]:
        """The letters that the polynomials `keys` follow from."""
        used = (letter for key in keys for i, _ in self._rows[key] for letter, _ in self._monomials[i])
        return {LETTERS[i].name for i in bases(set(used))}

    def greatest(self, keys: Sequence[tuple[Any, ...]], sizes: Mapping[str, int | NDArray[np.float64]]) -> Any:
        """The greatest of the polynomials `keys` where `sizes` are numbers or arrays of one length; exact below 2^53.

        Numbers go into the coefficients first, so that only the letters that vary cost anything a point.

        Raises:
            OverflowError: one is beyond 2^63 - 1.
        """
        known = as_sizes(sizes)
        varying: dict[tuple[tuple[int, int], ...], int] = {}
        rows: list[dict[int, int]] = []
        for key in keys:
            row: dict[int, int] = {}
            for i, coefficient in self._rows[key]:
                fixed, free = coefficient, []
                for letter, exponent in self._monomials[i]:
                    size = known.of(letter)
                    if isinstance(size, int):
                        fixed *= size**exponent
                    else:
                        free.append((letter, exponent))
                column = varying.setdefault(tuple(free), len(varying))
                row[column] = row.get(column, 0) + fixed
            rows.append(row)
        matrix = np.zeros((len(rows), len(varying)))
        for r, row in enumerate(rows):
            for column, coefficient in row.items():
                matrix[r, column] = coefficient
        matrix = matrix[_undominated(matrix)]
        points = next((len(x) for x in sizes.values() if not isinstance(x, int)), 1)
        arrays = {letter: known.of(letter) for letters in varying for letter, _ in letters}
        out = np.empty(points)
        block = 4096  # points whose table of monomials stays in a core's cache
        table = np.ones((len(varying), block))
        for start in range(0, points, block):
            stop = min(start + block, points)
            for letters, column in varying.items():
                monomial = table[column, : stop - start]
                monomial.fill(1.0)
                for letter, exponent in letters:
                    for _ in range(exponent):
                        monomial *= arrays[letter][start:stop]
            out[start:stop] = (matrix @ table[:, : stop - start]).max(0) / self._denominator
        if points and not out.max() < FIGURE:
            raise OverflowError("a value is beyond 64 bits")
        return out.astype(np.int64)


def _undominated(matrix: NDArray[np.float64]) -> list[int]:
    """Rows that no other row exceeds in every coefficient: monomials are positive, so the others never win."""
    kept: list[int] = []
    for i in np.argsort(-matrix.sum(1), kind="stable"):
        if not any(bool((matrix[k] >= matrix[i]).all()) for k in kept):
            kept.append(int(i))
    return kept
