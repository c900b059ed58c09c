"""Polynomials compiled for evaluation: at one point in exact integers, at a million points in numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager.sizes import NAMES, Size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray


class Polynomials:
    """Named polynomials over one table of monomials; their coefficients are multiples of 1 / `denominator`."""

    def __init__(self, rows: Mapping[tuple[Any, ...], Size], denominator: int = 1) -> None:
        index: dict[tuple[int, ...], int] = {}
        self._denominator = denominator
        self._rows = {
            key: [(index.setdefault(x, len(index)), int(c * denominator)) for x, c in p.terms() if c]
            for key, p in rows.items()
        }
        self._monomials = [[(n, e) for n, e in zip(NAMES, x, strict=True) if e] for x in index]

    def at(self, sizes: Mapping[str, int]) -> list[int]:
        """The value of each monomial at one point."""
        values = []
        for letters in self._monomials:
            value = 1
            for name, exponent in letters:
                value *= sizes[name] ** exponent
            values.append(value)
        return values

    def value(self, key: tuple[Any, ...], point: Sequence[int]) -> int:
        """A polynomial's exact value, given `at` the point."""
        return sum(c * point[i] for i, c in self._rows[key]) // self._denominator

    def letters(self, keys: Sequence[tuple[Any, ...]]) -> set[str]:
        """The letters that occur in the polynomials `keys`."""
        return {name for key in keys for i, _ in self._rows[key] for name, _ in self._monomials[i]}

    def greatest(self, keys: Sequence[tuple[Any, ...]], sizes: Mapping[str, int | NDArray[np.float64]]) -> Any:
        """The greatest of the polynomials `keys` where `sizes` are numbers or arrays of one length; exact below 2^53.

        Numbers go into the coefficients first, so that only the letters that vary cost anything a point.
        """
        varying: dict[tuple[tuple[str, int], ...], int] = {}
        rows: list[dict[int, int]] = []
        for key in keys:
            row: dict[int, int] = {}
            for i, coefficient in self._rows[key]:
                fixed, free = coefficient, []
                for name, exponent in self._monomials[i]:
                    size = sizes[name]
                    if isinstance(size, int):
                        fixed *= size**exponent
                    else:
                        free.append((name, exponent))
                column = varying.setdefault(tuple(free), len(varying))
                row[column] = row.get(column, 0) + fixed
            rows.append(row)
        matrix = np.zeros((len(rows), len(varying)))
        for r, row in enumerate(rows):
            for column, coefficient in row.items():
                matrix[r, column] = coefficient
        matrix = matrix[_undominated(matrix)]
        arrays = {name: x for name, x in sizes.items() if not isinstance(x, int)}
        points = len(next(iter(arrays.values()))) if arrays else 1
        out = np.empty(points, dtype=np.int64)
        block = 4096  # points whose table of monomials stays in a core's cache
        table = np.ones((len(varying), block))
        for start in range(0, points, block):
            stop = min(start + block, points)
            for letters, column in varying.items():
                monomial = table[column, : stop - start]
                monomial.fill(1.0)
                for name, exponent in letters:
                    for _ in range(exponent):
                        monomial *= arrays[name][start:stop]
            out[start:stop] = (matrix @ table[:, : stop - start]).max(0) / self._denominator
        return out


def _undominated(matrix: NDArray[np.float64]) -> list[int]:
    """Rows that no other row exceeds in every coefficient: monomials are positive, so the others never win."""
    kept: list[int] = []
    for i in np.argsort(-matrix.sum(1), kind="stable"):
        if not any(bool((matrix[k] >= matrix[i]).all()) for k in kept):
            kept.append(int(i))
    return kept
