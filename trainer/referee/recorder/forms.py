"""`trainer.closed_forms`: the peak of any code's step as polynomials of the sizes that it is built with.

The step is recorded at small sizes, its events are aligned, and the bytes of each are fitted exactly; what repeats with
the number of layers is found by what more layers insert. Nothing is rounded, and what does not fit is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.describe.checks import ConfigError
from trainer.referee.recorder.fit import Fitter, times, value
from trainer.referee.recorder.recording import record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import sympy
    from numpy.typing import NDArray

    from estimator.describe.plan import Plan
    from trainer.referee.recorder.fit import Monomial, Polynomial
    from trainer.referee.recorder.recording import Recording


class Place(NamedTuple):
    """What an event is, whatever its bytes: allocation or free, when, in which module, by which operator."""

    sign: int
    phase: str
    module: str
    op: str
    category: str

    def __str__(self) -> str:
        what = "an allocation" if self.sign > 0 else "a free"
        return f"{what} in {self.phase} of {self.module or 'the step'} ({self.op})"


Seen = tuple[Place, int]  # an event and its bytes


class Happening(NamedTuple):
    """An event whose bytes are a polynomial in the letters but the one that repeats."""

    place: Place
    nbytes: Polynomial


@dataclass(frozen=True, eq=False)
class ClosedForms:
    """A step's events at any sizes.

    Attributes:
        letters: names of the sizes, the one that repeats left out.
        repeated: the name of that one; None if the step is of one length.
        first: its value at which `events` are the whole step.
        unit: by how much it grows from one repetition to the next.
        events: of the step at `first`, what is alive before it first.
        segments: (index in `events`, what comes there once more for each further unit).
        points: how many recordings this was fitted to and judged by.
    """

    letters: tuple[str, ...]
    repeated: str | None
    first: int
    unit: int
    events: tuple[Happening, ...]
    segments: tuple[tuple[int, tuple[Happening, ...]], ...]
    points: int

    def expand(self, turns: int) -> list[Happening]:
        """All events, with so many further units."""
        found: list[Happening] = []
        last = 0
        for at, segment in self.segments:
            found += [*self.events[last:at], *segment * turns]
            last = at
        return [*found, *self.events[last:]]

    def turns(self, sizes: Mapping[str, int]) -> int:
        """How many units `sizes` has beyond `first`.

        Raises:
            ConfigError: a size is missing or not one of ours, or the repeated one is between two units or too small.
        """
        wanted = {*self.letters, *({self.repeated} if self.repeated else ())}
        if set(sizes) != wanted:
            raise ConfigError(f"sizes = {sorted(sizes)}: must be {', '.join(sorted(wanted))}")
        if self.repeated is None:
            return 0
        more = sizes[self.repeated] - self.first
        if more < 0 or more % self.unit:
            raise ConfigError(
                f"{self.repeated} = {sizes[self.repeated]}: must be {self.first} or more, in steps of {self.unit}"
            )
        return more // self.unit

    def timeline(self, **sizes: int) -> NDArray[np.int64]:
        """Live bytes after each event, those that make what is alive before the step included."""
        return self._deltas(sizes)[1].cumsum()

    def evaluate(self, **sizes: int) -> int:
        """The peak in bytes at `sizes`.

        Raises:
            ConfigError: see `turns`.
        """
        return int(self.timeline(**sizes).max())

    def by_module(self, **sizes: int) -> dict[str, int]:
        """Bytes at the peak by the module that made them (numbers in its name left out); they add up to the peak."""
        events, deltas = self._deltas(sizes)
        found: dict[str, int] = {}
        for event, delta in zip(events[: int(deltas.cumsum().argmax()) + 1], deltas.tolist(), strict=False):
            found[event.place.module] = found.get(event.place.module, 0) + delta
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda item: -item[1]))

    def where(self, **sizes: int) -> Place:
        """What the peak is."""
        events, deltas = self._deltas(sizes)
        return events[int(deltas.cumsum().argmax())].place

    def _deltas(self, sizes: Mapping[str, int]) -> tuple[list[Happening], NDArray[np.int64]]:
        events = self.expand(self.turns(sizes))
        point = tuple(sizes[x] for x in self.letters)
        known: dict[int, int] = {}
        deltas = []
        for event in events:
            key = id(event.nbytes)
            if key not in known:
                exact = value(event.nbytes, point)
                if exact.denominator != 1:
                    raise ConfigError(f"sizes = {dict(sizes)}: {event.place} would be of {exact} bytes")
                known[key] = int(exact)
            deltas.append(event.place.sign * known[key])
        return events, np.array(deltas, dtype=np.int64)

    @cached_property
    def pieces(self) -> list[Polynomial]:
        """The live polynomials, in `letters` and the repeated one, that no other is at least as great as everywhere.

        Where the repeated letter is beyond `first` and each other is 1 or more, a polynomial that is at least another
        in every coefficient, once the letters are written as that value plus something, is at least as great.
        """
        kept: list[tuple[Polynomial, Polynomial]] = []
        for live in self._moments():
            own = self._shifted(live)
            if any(_covers(other, own) for other, _ in kept):
                continue
            kept = [(other, p) for other, p in kept if not _covers(own, other)] + [(own, live)]
        return [p for _, p in sorted(kept, key=lambda pair: -sum(pair[0].values()))]

    @property
    def peak_bytes(self) -> sympy.Expr:
        """The peak: a Max of polynomials, where the step has one repetition or more beyond `first`."""
        import sympy  # noqa: PLC0415 - half a second that only formulas need

        names = [*self.letters, *([self.repeated] if self.repeated else [])]
        symbols = [sympy.Symbol(name, positive=True) for name in names]

        def expression(p: Polynomial) -> Any:
            terms = (
                sympy.Rational(c.numerator, c.denominator)
                * sympy.prod([s**e for s, e in zip(symbols, x[: len(symbols)], strict=True)])
                for x, c in p.items()
            )
            return sum(terms, sympy.Integer(0))

        return sympy.Max(*map(expression, self.pieces), evaluate=False)

    def _moments(self) -> list[Polynomial]:
        """Each different live polynomial at an allocation that a free follows, of the first and last repetition."""
        count = len(self.letters)
        one: Monomial = (0,) * (count + 1)
        more = {(*(0,) * count, 1): Fraction(1, self.unit), one: Fraction(-self.first, self.unit)}  # how many units
        live: Polynomial = {}
        found: dict[frozenset[tuple[Monomial, Fraction]], Polynomial] = {}

        def run(events: Sequence[Happening], following: Happening | None) -> None:
            for i, event in enumerate(events):
                for x, c in event.nbytes.items():
                    live[*x, 0] = live.get((*x, 0), Fraction(0)) + event.place.sign * c
                after = events[i + 1] if i + 1 < len(events) else following
                if event.place.sign > 0 and (after is None or after.place.sign < 0):
                    now = {x: c for x, c in live.items() if c}
                    found.setdefault(frozenset(now.items()), now)

        last = 0
        for at, segment in (*self.segments, (len(self.events), ())):
            rest = self.events[at] if at < len(self.events) else None
            run(self.events[last:at], segment[0] if segment else rest)
            last = at
            if not segment:
                continue
            before = dict(live)
            run(segment, segment[0])  # the first of them
            net = {x: c - before.get(x, Fraction(0)) for x, c in live.items()}
            earlier = times({x: c for x, c in net.items() if c}, {**more, one: more[one] - 1})
            live.clear()
            live.update(before)
            for x, c in earlier.items():
                live[x] = live.get(x, Fraction(0)) + c
            run(segment, rest)  # the last
        return list(found.values())

    def _shifted(self, p: Polynomial) -> Polynomial:
        """`p` with each letter written as its least value plus something."""
        found: Polynomial = {}
        for x, c in p.items():
            for y, d in _from_least(x, self.first + self.unit).items():
                found[y] = found.get(y, Fraction(0)) + c * d
        return found


@cache
def _from_least(x: Monomial, first: int) -> Polynomial:
    """The monomial with each letter written as its least value, 1 or of the last `first`, plus something."""
    found: Polynomial = {(0,) * len(x): Fraction(1)}
    for i, e in enumerate(x):
        least = Fraction(first if i == len(x) - 1 else 1)
        step = {tuple(int(j == i) for j in range(len(x))): Fraction(1), (0,) * len(x): least}
        for _ in range(e):
            found = times(found, step)
    return found


def _covers(a: Polynomial, b: Polynomial) -> bool:
    return all(a.get(x, Fraction(0)) >= b.get(x, Fraction(0)) for x in {*a, *b})


def closed_forms(
    build: Callable[..., Any], sizes: Mapping[str, Sequence[int]], plan: Plan | None = None
) -> ClosedForms:
    """The closed forms of the step that `build(**sizes)` makes, by the CPU's rules.

    Args:
        build: what `trainer.record` takes, as a function of the sizes.
        sizes: of each size, three values or more at which `build` works, whatever the others are; the first ones are
            the base. Of one of them, the number of layers, the step may become longer: its values are equally far
            apart. Values with no common factor, above 1, tell sizes from each other best.
        plan: as `trainer.record` has it.

    Raises:
        ConfigError: too few values, or events that are not alike at all sizes, or not polynomials of them; the first
            of them is named.
    """
    for name, values in sizes.items():
        if len(set(values)) < 3:
            raise ConfigError(f"{name} = {tuple(values)}: must be three different values or more")
    happened: dict[tuple[int, ...], list[Seen]] = {}
    names = tuple(sizes)

    def events(**point: int) -> list[Seen]:
        key = tuple(point[x] for x in names)
        if key not in happened:
            happened[key] = _events(record(lambda: build(**point), plan))
        return happened[key]

    base = {x: values[0] for x, values in sizes.items()}
    lengths = {x: len(events(**{**base, x: values[1]})) for x, values in sizes.items()}
    whole = events(**base)
    longer = [x for x, length in lengths.items() if length != len(whole)]
    if len(longer) > 1:
        raise ConfigError(f"sizes: the step becomes longer with {' and with '.join(longer)}; it may with one of them")
    repeated = longer[0] if longer else None
    letters = tuple(x for x in names if x != repeated)
    fitter = Fitter(letters, sizes)
    rest = {repeated: base[repeated]} if repeated else {}
    runs = [events(**dict(zip(letters, point, strict=True)), **rest) for point in fitter.points]
    fitted = _fitted(runs, fitter)
    if repeated is None:
        return ClosedForms(letters, None, 1, 1, tuple(fitted), (), len(happened))
    found = _repetition(fitted, whole, [events(**{**base, repeated: v}) for v in sizes[repeated]], sizes[repeated])
    forms = ClosedForms(
        letters, repeated, base[repeated], sizes[repeated][1] - base[repeated], *found, len(happened) + 1
    )
    last = {x: values[-1] for x, values in sizes.items()}
    _judge(forms, last, _events(record(lambda: build(**last), plan)))
    return forms


def _events(recording: Recording) -> list[Seen]:
    found = []
    for event, delta in zip(recording.ledger.events, recording.account.delta.tolist(), strict=True):
        module = re.sub(r"\d+", "#", event.where.module if event.sign > 0 else event.storage.where.module)
        place = Place(event.sign, event.where.phase.value, module, event.where.op, event.storage.category.value)
        found.append((place, abs(delta)))
    return found


def _fitted(runs: Sequence[Sequence[Seen]], fitter: Fitter) -> list[Happening]:
    for run, point in zip(runs, fitter.points, strict=True):
        for i, ((ours, _), (theirs, _)) in enumerate(zip(runs[0], run, strict=False)):
            if ours != theirs:
                raise ConfigError(f"event {i} at {_named(fitter, point)} is {theirs}; at the first sizes it is {ours}")
        if len(run) != len(runs[0]):
            raise ConfigError(
                f"at {_named(fitter, point)} are {len(run)} events, and at the first sizes {len(runs[0])}"
            )
    found = []
    for i, (place, _) in enumerate(runs[0]):
        values = [run[i][1] for run in runs]
        p = fitter.fit(values)
        if p is None:
            raise ConfigError(f"event {i}, {place}, is no polynomial of {', '.join(fitter.letters)}: {values} bytes")
        found.append(Happening(place, p))
    return found


def _named(fitter: Fitter, point: Sequence[int]) -> str:
    return ", ".join(f"{x} = {v}" for x, v in zip(fitter.letters, point, strict=True))


def _repetition(
    fitted: Sequence[Happening],
    whole: Sequence[Seen],
    runs: Sequence[Sequence[Seen]],
    values: Sequence[int],
) -> tuple[tuple[Happening, ...], tuple[tuple[int, tuple[Happening, ...]], ...]]:
    """(the events, what each further unit inserts), judged by all further values of the letter that repeats."""
    unit = values[1] - values[0]
    known: dict[Seen, Happening] = {}
    for key, happening in zip(whole, fitted, strict=True):
        if known.setdefault(key, happening).nbytes != happening.nbytes:
            raise ConfigError(
                f"{key[0]} of {key[1]} bytes is of two sizes that are alike at the first values: take others"
            )
    segments = _inserted(whole, runs[1])
    for run, v in zip(runs[2:], values[2:], strict=True):
        if (v - values[0]) % unit:
            raise ConfigError(f"{v}: must be as far from the value before as {values[1]} is from {values[0]}")
        expanded: list[Seen] = []
        last = 0
        for at, segment in segments:
            expanded += [*whole[last:at], *segment * ((v - values[0]) // unit)]
            last = at
        expanded += whole[last:]
        if expanded != list(run):
            raise ConfigError(f"what repeats from {values[0]} to {values[1]} is not what repeats to {v}")
    missing = next((key for _, segment in segments for key in segment if key not in known), None)
    if missing is not None:
        raise ConfigError(f"{missing[0]} comes with more layers only: begin with more of them")
    return tuple(fitted), tuple((at, tuple(known[key] for key in segment)) for at, segment in segments)


def _inserted(a: Sequence[Seen], b: Sequence[Seen]) -> list[tuple[int, list[Seen]]]:
    """[(position in a, what b has there besides)]: of all ways to insert, the one whose pieces match furthest on.

    Raises:
        ConfigError: b is not a with insertions.
    """
    i = j = 0
    left = len(b) - len(a)
    found: list[tuple[int, list[Seen]]] = []
    while i < len(a) or j < len(b):
        if i < len(a) and j < len(b) and a[i] == b[j]:
            i, j = i + 1, j + 1
            continue
        reach, best = -1, 0
        for length in range(1, left + 1):
            same = 0
            while i + same < len(a) and j + length + same < len(b) and a[i + same] == b[j + length + same]:
                same += 1
            ends = i + same == len(a) and j + length + same == len(b)
            if ends or same > reach:
                reach, best = (len(b) + 1 if ends else same), length
            if ends:
                break
        if not best or reach == 0:
            raise ConfigError(f"event {i}, {a[i][0] if i < len(a) else 'the end'}, is not followed by a repetition")
        found.append((i, list(b[j : j + best])))
        j, left = j + best, left - best
    return found


def _judge(forms: ClosedForms, sizes: Mapping[str, int], real: Sequence[Seen]) -> None:
    """The forms at sizes that nothing was fitted to.

    Raises:
        ConfigError: an event differs.
    """
    events, deltas = forms._deltas(sizes)  # noqa: SLF001 - ours
    for i, (event, delta, (place, nbytes)) in enumerate(zip(events, deltas.tolist(), real, strict=False)):
        if event.place != place or abs(delta) != nbytes:
            raise ConfigError(
                f"event {i} at {dict(sizes)} is {place} of {nbytes} bytes, not {event.place} of {abs(delta)}"
            )
    if len(events) != len(real):
        raise ConfigError(f"at {dict(sizes)} are {len(real)} events, not {len(events)}")
