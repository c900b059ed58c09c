"""Letters: one for each size, defined where it is needed, and those that follow from others.

A letter has a name, a meaning and a least value, and is defined once, by whoever needs it (`letter`). What is computed
from sizes (a share of rows, a block of 256, the smaller side of a matrix) is a derived letter: a `Function` of any
sizes, named by what it is of. Nothing lists the letters or shapes that are allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager.polynomials import ONE, ZERO, Size, constant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from estimator.eager.polynomials import Monomial


__all__ = [
    "G_K",
    "LETTERS",
    "ONE",
    "SYMBOLS",
    "ZERO",
    "A",
    "B",
    "C",
    "D",
    "E",
    "Function",
    "G",
    "K",
    "L",
    "Letter",
    "Size",
    "Sizes",
    "T",
    "V",
    "W",
    "as_sizes",
    "bases",
    "ceiling",
    "constant",
    "d",
    "d_c",
    "d_e",
    "d_q",
    "e",
    "e_n",
    "e_r",
    "e_v",
    "evaluate",
    "expression",
    "f",
    "f_e",
    "f_s",
    "g",
    "h",
    "index_of",
    "is_letter",
    "k",
    "larger",
    "legend",
    "letter",
    "n",
    "rounded_up",
    "smaller",
    "spelled",
    "substituted",
    "written",
]


@dataclass(frozen=True, slots=True)
class Letter:
    """A size.

    Attributes:
        name: as it is written.
        meaning: what it counts.
        least: the smallest value that it has where it is a letter and not a number (a size of 1 is a number).
        index: its place among all letters; those that it follows from come before it.
        function, of: of a derived letter, the function and its arguments.
    """

    name: str
    meaning: str
    least: int
    index: int
    function: Function | None = None
    of: tuple[Size, ...] = ()


LETTERS: list[Letter] = []
_by_name: dict[str, Letter] = {}
_defining = Lock()


def letter(name: str, meaning: str, least: int = 2) -> Size:
    """The size `name`, defined now or before.

    Raises:
        ValueError: it has been defined with another meaning.
    """
    return _defined(name, meaning, least)


def _defined(name: str, meaning: str, least: int, function: Function | None = None, of: tuple[Size, ...] = ()) -> Size:
    with _defining:
        found = _by_name.get(name)
        if found is None:
            found = _by_name[name] = Letter(name, meaning, least, len(LETTERS), function, of)
            LETTERS.append(found)
            return Size({(found.index,): 1})
    if (found.meaning, found.function, found.of) != (meaning, function, of):
        raise ValueError(f"letter {name!r} is already defined: {found.meaning}")
    return Size({(found.index,): 1})


def index_of(name: str) -> int:
    """The place of the letter `name`."""
    return _by_name[name].index


def is_letter(name: str) -> bool:
    """Whether a size has this name."""
    return name in _by_name


@dataclass(frozen=True, eq=False)
class Function:
    """How derived letters of one kind follow from sizes; calling it gives the letter of these arguments.

    Attributes:
        compute: the value from the arguments' values, ints or numpy arrays.
        form: how it is written, "{0}", "{1}" being the arguments.
        meaning: what it is, with the same arguments; of a function with a `symbol`, without.
        symbolic: the sympy expression of the arguments' expressions; None where it is written as a symbol.
        symbol: the name of the letter where the arguments are `usual` (letters by name), for functions that are long
            to write.
        least: the smallest value.
    """

    compute: Callable[..., Any]
    form: str
    meaning: str
    symbolic: Callable[..., Any] | None = None
    symbol: str | None = None
    usual: tuple[str, ...] = ()
    least: int = 1

    def __call__(self, *args: Size | int) -> Size:
        """The derived letter, or its number where all arguments are numbers."""
        sizes = tuple(x if isinstance(x, Size) else constant(x) for x in args)
        numbers = [x.number for x in sizes]
        if all(number is not None for number in numbers):
            return constant(int(self.compute(*numbers)))
        texts = [written(x) for x in sizes]
        name = self.form.format(*texts)
        if self.symbol is not None:
            name = self.symbol if tuple(texts) == self.usual else f"{self.symbol}({', '.join(texts)})"
        return _defined(name, self.meaning.format(*texts), self.least, self, sizes)


def _ceiling(a: Any, b: Any) -> Any:
    return -(-a // b)


def _sympy_ceiling(a: Any, b: Any) -> Any:
    import sympy  # noqa: PLC0415 - half a second that only formulas need

    return sympy.ceiling(a / b)


def _sympy_least(*args: Any) -> Any:
    import sympy  # noqa: PLC0415 - likewise

    return sympy.Min(*args)


def _sympy_greatest(*args: Any) -> Any:
    import sympy  # noqa: PLC0415 - likewise

    return sympy.Max(*args)


_QUOTIENT = Function(_ceiling, "ceil({0}/{1})", "{0} over {1}, rounded up", _sympy_ceiling)


def ceiling(a: Size, b: Size | int) -> Size:
    """a / b, rounded up: rows of one of b accelerators, blocks of b elements."""
    return a if b in (1, ONE) else _QUOTIENT(a, b)


def rounded_up(a: Size, b: int) -> Size:
    """The least multiple of b that is not less than a."""
    return b * ceiling(a, b)


@lru_cache(maxsize=1024)
def _extreme(name: str, count: int) -> Function:
    compute = {"min": np.minimum, "max": np.maximum}[name]
    symbolic = {"min": _sympy_least, "max": _sympy_greatest}[name]

    def of_all(*args: Any) -> Any:
        result = args[0]
        for x in args[1:]:
            result = compute(result, x)
        return result

    slots = ", ".join(f"{{{i}}}" for i in range(count))
    words = {"min": "the least of", "max": "the greatest of"}[name]
    return Function(of_all, f"{name}({slots})", f"{words} {slots}", symbolic)


def smaller(*sizes: Size | int) -> Size:
    """The least of some sizes."""
    return _one_of("min", sizes)


def larger(*sizes: Size | int) -> Size:
    """The greatest of some sizes."""
    return _one_of("max", sizes)


def _one_of(name: str, sizes: Iterable[Size | int]) -> Size:
    """Of multiples of the same letters only one counts; what is left is in a fixed order."""
    best: dict[Monomial, Any] = {}
    others: dict[Size, None] = {}
    sign = 1 if name == "min" else -1
    for x in sizes:
        size = x if isinstance(x, Size) else constant(x)
        if len(size.terms) != 1:
            others[size] = None
            continue
        ((monomial, coefficient),) = size.terms
        if monomial not in best or sign * coefficient < sign * best[monomial]:
            best[monomial] = coefficient
    if name == "min" and best.get(()) == 1:  # no size is less than 1
        return ONE
    if name == "max" and len(best) + len(others) > 1 and best.get(()) == 1:
        del best[()]
    left = sorted([*(Size({m: c}) for m, c in best.items()), *others], key=written)
    return left[0] if len(left) == 1 else _extreme(name, len(left))(*left)


# ---- values


class Sizes(dict[str, Any]):
    """Numbers (or arrays of them) by the letters' names; those of derived letters are computed when asked for."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._derived: dict[int, Any] = {}

    def of(self, index: int) -> Any:
        """The value of a letter by its place."""
        entry = LETTERS[index]
        if entry.function is None:
            return self[entry.name]
        found = self._derived.get(index)
        if found is None:
            found = entry.function.compute(*(self.value(x) for x in entry.of))
            self._derived[index] = found = found if np.ndim(found) else int(found)
        return found

    def value(self, size: Size) -> Any:
        """The value of a polynomial."""
        total: Any = 0
        for monomial, coefficient in size.terms:
            term: Any = coefficient
            for i in monomial:
                term = term * self.of(i)
            total = total + term
        return total


def as_sizes(sizes: Mapping[str, Any]) -> Sizes:
    """`sizes` as Sizes."""
    return sizes if isinstance(sizes, Sizes) else Sizes(sizes)


def evaluate(size: Size, sizes: Mapping[str, int]) -> int:
    """The exact value of a polynomial."""
    total = as_sizes(sizes).value(size)
    assert total == int(total), f"{written(size)} is not an integer at {dict(sizes)}"
    return int(total)


# ---- text and sympy


def written(size: Size) -> str:
    """A polynomial as text: "2*B*T*d**2 + 1"."""
    parts = []
    for monomial, coefficient in sorted(size.terms, key=lambda term: (-len(term[0]), term[0])):
        unit = monomial and abs(coefficient) == 1
        factors = [] if unit else [str(coefficient)]
        for i in dict.fromkeys(monomial):
            times = monomial.count(i)
            factors.append(LETTERS[i].name + (f"**{times}" if times > 1 else ""))
        parts.append(("-" if unit and coefficient < 0 else "") + "*".join(factors))
    return " + ".join(parts).replace("+ -", "- ") or "0"


def substituted(size: Size, to: Mapping[str, Size]) -> Size:
    """A polynomial with others in place of some letters, in derived letters' arguments too."""
    by_index = {index_of(name): x for name, x in to.items() if is_letter(name)}

    def replaced(index: int) -> Size:
        entry = LETTERS[index]
        if entry.function is None:
            return by_index.get(index, Size({(index,): 1}))
        return entry.function(*(substituted(x, to) for x in entry.of))

    return size.substituted({i: replaced(i) for i in size.letters})


class _Symbols(dict[str, Any]):
    """A sympy symbol for each letter's name, made when it is asked for.

    Positive only: sympy's solve drops the roots of integer symbols that are not integers.
    """

    def __missing__(self, name: str) -> Any:
        import sympy  # noqa: PLC0415 - half a second that only formulas need

        self[name] = sympy.Symbol(name, positive=True)
        return self[name]


SYMBOLS = _Symbols()


def expression(size: Size) -> Any:
    """A polynomial as a sympy expression; derived letters as ceilings and the like, or by their symbols."""
    import sympy  # noqa: PLC0415 - half a second that only formulas need

    terms = []
    for monomial, coefficient in size.terms:
        factors = [sympy.Rational(coefficient.numerator, coefficient.denominator)]
        terms.append(sympy.Mul(*factors, *(_symbolic(i) for i in monomial)))
    return sympy.Add(*terms)


@lru_cache(maxsize=4096)
def _symbolic(index: int) -> Any:
    entry = LETTERS[index]
    if entry.function is None or entry.function.symbolic is None:
        return SYMBOLS[entry.name]
    return entry.function.symbolic(*(expression(x) for x in entry.of))


def legend(names: Iterable[str]) -> dict[str, str]:
    """What each of these letters means, in the order of the letters."""
    wanted = set(names)
    return {entry.name: entry.meaning for entry in LETTERS if entry.name in wanted}


def spelled(indices: Iterable[int]) -> Iterator[int]:
    """The letters in whose symbols `expression` writes these letters."""
    for index in indices:
        entry = LETTERS[index]
        if entry.function is None or entry.function.symbolic is None:
            yield index
        else:
            yield from spelled(i for x in entry.of for i in x.letters)


def bases(indices: Iterable[int]) -> Iterator[int]:
    """The letters that these letters follow from: themselves, or of a derived one those of its arguments."""
    for index in indices:
        entry = LETTERS[index]
        if entry.function is None:
            yield index
        else:
            yield from bases(i for x in entry.of for i in x.letters)


# ---- the letters that every model has

E = letter("E", "experts of a sparse layer")
K = letter("K", "experts that a token goes through")
f_e = letter("f_e", "hidden width of one expert")
f_s = letter("f_s", "hidden width of the shared expert")
G = letter("G", "groups that experts are chosen in")
G_K = letter("G_K", "groups that a token's experts are chosen from")
d_q = letter("d_q", "width of the vector that queries are made from, in latent attention")
d_c = letter("d_c", "width of the vector that keys and values are made from, in latent attention")
e_r = letter("e_r", "width of the part of a head that is rotated")
e_n = letter("e_n", "width of the part of a head that is not rotated, in latent attention")
e_v = letter("e_v", "width of a head's value, in latent attention")
d_e = letter("d_e", "width of embedding and head, where projections lead to d and back")
A = letter("A", "tokens of a chunk, of which a token sees those before it", least=1)
W = letter("W", "tokens that a sliding window lets a token see, itself among them", least=1)
B = letter("B", "micro-batch: sequences in one forward pass on one accelerator")
T = letter("T", "sequence length, tokens")
L = letter("L", "number of layers (blocks)", least=1)
d = letter("d", "d_model, width of the residual stream")
h = letter("h", "number of query heads")
k = letter("k", "number of key/value heads")
g = letter("g", "query heads served by one key/value head, h / k")
e = letter("e", "head_dim, width of one head")
f = letter("f", "d_ff, hidden width of the feed-forward")
V = letter("V", "vocabulary size")
C = letter("C", "context length, positions that the model holds")
n = letter("n", "CPU threads that PyTorch uses (torch.get_num_threads); scratch of some CPU kernels grows with them", 1)
D = letter("D", "data-parallel accelerators that share what is sharded", least=1)
