"""The sizes of a step: shape classes, and facts that a step asks of its sizes.

PyTorch decides by sizes in two ways that change memory. A dimension of 1 is contiguous with anything, so a step is
executed once per *shape class*: which sizes are 1 (they are numbers in that class) and which coincide (h e = d in a
model whose heads share its width, g k = h with grouped queries). And some code compares sizes (do D accelerators share
these rows evenly?): such a *fact* is asked when the execution comes to it, and noted; the account of the step holds for
all sizes of its class that give the same answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

from estimator.eager.letters import ONE, ZERO, Size, Sizes, as_sizes, constant, index_of, is_letter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from estimator.eager.polynomials import Monomial

__all__ = ["ONE", "ZERO", "Fact", "ShapeClass", "Size"]

COUNTS = (
    "L",
    "n",
    "D",
    "g",
    "W",
    "A",
    "t",
    "x",
    "c",
    "i",
    "M",
    "w",
)  # letters whose value of 1 says nothing of a shape, or is said by another: they stay


def is_count(name: str) -> bool:
    """Whether a letter counts something, so that no shape is another where it is 1: `COUNTS`, and L_1, L_2, ..."""
    return name in COUNTS or name.startswith("L_")


class Fact(NamedTuple):
    """A question about sizes: whether the first divides the second, or is at most the second."""

    kind: str  # "divides" or "at most"
    a: Size
    b: Size

    def answer(self, sizes: Mapping[str, Any]) -> Any:
        """The answer at `sizes`, an array of them where sizes are arrays."""
        values = as_sizes(sizes)
        a, b = values.value(self.a), values.value(self.b)
        return b % a == 0 if self.kind == "divides" else a <= b


@dataclass(frozen=True)
class ShapeClass:
    """The sizes of a class of models and plans, as far as shapes depend on them.

    Attributes:
        numbers: (letter, value) of the sizes that are numbers in this class: those that are 1, and a head_dim of 2
            whose rotary half is 1.
        shared_width: h e = d.
        grouped: fewer key/value heads than query heads (else k = h).
    """

    numbers: frozenset[tuple[str, int]]
    shared_width: bool
    grouped: bool

    @classmethod
    def at(cls, sizes: Mapping[str, int], halved: frozenset[str] = frozenset()) -> ShapeClass:
        """The class of these sizes; a letter that is `halved` is a number below 4, since its half is 1."""
        numbers = frozenset(
            (name, int(size))
            for name, size in sizes.items()
            if not is_count(name) and is_letter(name) and _is_number(name, size, halved)
        )
        named = {name for name, _ in numbers}
        degenerate = bool(halved) and (
            bool(named & halved) or "h" in named
        )  # the relation would tie numbers to letters
        shared = sizes["h"] * sizes["e"] == sizes["d"] and not degenerate
        return cls(numbers, shared, sizes["k"] != sizes["h"])

    @classmethod
    def general(cls, sizes: Mapping[str, int]) -> ShapeClass:
        """The same with no size that is a number: the class whose formulas keep every letter."""
        return cls(frozenset(), sizes["h"] * sizes["e"] == sizes["d"], sizes["k"] != sizes["h"])

    def large(self, sizes: Mapping[str, int]) -> Sizes:
        """`sizes` made large enough that none is a number, and so that what coincides in this class still does."""
        values = Sizes({name: size if is_count(name) else max(size, 4) for name, size in sizes.items()})
        values["g"] = max(values["g"], 4) if self.grouped else 1
        values["h"] = values["k"] * values["g"]
        if self.shared_width:
            values["d"] = values["h"] * values["e"]
        return values

    @cached_property
    def letters(self) -> dict[str, Size]:
        """What stands for each size in this class: its letter, a number, or the letter that it equals."""
        to = _Letters({name: constant(value) for name, value in self.numbers})
        ones = {name for name, value in self.numbers if value == 1}
        if not self.grouped:
            to["k"], to["g"] = to["h"], ONE
        elif "k" in ones:
            to["g"] = to["h"]
        if self.shared_width and "h" in ones:
            to["e"] = to["d"]
        if self.shared_width and "e" in ones:
            to["h"] = to["d"]
            if not self.grouped:
                to["k"] = to["d"]
        return to

    @cached_property
    def relations(self) -> tuple[tuple[int, int, int], ...]:
        """(i, j, k): the product of letters i and j is letter k."""
        named = {name for name, _ in self.numbers}
        rules = []
        if self.grouped and "k" not in named:
            rules.append(("g", "k", "h"))
        if self.shared_width and not named & {"h", "e"}:
            rules.append(("h", "e", "d"))
        return tuple((index_of(a), index_of(b), index_of(c)) for a, b, c in rules)

    def product(self, sizes: Iterable[Size]) -> Size:
        """The product in normal form: equal sizes are equal polynomials."""
        result = ONE
        for size in sizes:
            if size is not ONE:
                result = result * size
        return self.normal(result)

    def normal(self, size: Size) -> Size:
        """`size` with each relation applied as often as it can be."""
        for i, j, k in self.relations:
            if any(i in m and j in m for m, _ in size.terms):
                size = size.rewritten(partial(_related, i=i, j=j, k=k))
        return size


class _Letters(dict[str, Size]):
    """Sizes by name; one that is not a number in the class is its letter."""

    def __missing__(self, name: str) -> Size:
        return Size({(index_of(name),): 1})


def _is_number(name: str, size: int, halved: frozenset[str]) -> bool:
    return size < 4 if name in halved else size == 1


def _related(monomial: Monomial, i: int, j: int, k: int) -> Monomial:
    count = min(monomial.count(i), monomial.count(j))
    rest = list(monomial)
    for _ in range(count):
        rest.remove(i)
        rest.remove(j)
    return tuple(sorted([*rest, *[k] * count]))
