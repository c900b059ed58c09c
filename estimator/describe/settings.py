"""A setting is declared once, beside its field: what it is, what it may be, what it cannot go with and why.

Validation, command line, page, link, the tables of the documentation and the random configurations of the tests are
made from these declarations; whoever adds a setting writes its declaration and the code that acts on it.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from estimator.describe.checks import NORM, ConfigError, choose, positive_int, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Mapping
    from random import Random

T = TypeVar("T")


class Needs(NamedTuple):
    """What must hold beside a setting that has one of some values.

    Attributes:
        other: a field, or a property, of the object that has the setting.
        allowed: the values of it that the setting goes with.
        why: the reason why it goes with no others, with fields in braces: "precision is {precision!r}".
        values: the values of the setting that this is about; empty for every one but its default.
        say: what is allowed, in words; empty for the list of `allowed`.
        where: (field, value) of the object for which alone it is asked; empty for all.
    """

    other: str
    allowed: Collection[Any]
    why: str
    values: Collection[Any] = ()
    say: str = ""
    where: tuple[str, Any] | tuple[()] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field of a description.

    Attributes:
        name: the field's.
        meaning: what it is, in a sentence without what each choice is.
        kind: what values it takes.
        default: what it is where nobody says it; None is "none of it", or follows from others.
        choices: of a choice, its names and what each means.
        spellings: other names that people have for a choice, and the choice that they mean.
        least, most: of a count or a number, its bounds.
        above, below: of a number, whether it must be above `least` (rather than at it), below `most`.
        optional: what None means; empty where None is not allowed.
        also: other values that are allowed, such as True beside counts.
        parse: what makes a text of a text that is given, and refuses what cannot be.
        needs: what it cannot go without.
        common: whether most people set it: short help and first inputs.
        follows: what sets it on the page and in `estimate`, where it has no input of its own there.
        label: what its input is called on the page.
        draws: values that tests take, where it has no choices.
    """

    name: str = ""
    meaning: str
    kind: Literal["choice", "count", "number", "flag", "text", "part"]
    default: Any = MISSING
    choices: Mapping[str, str] = field(default_factory=dict)
    spellings: Mapping[str, str] = field(default_factory=dict)
    least: float = 1
    most: float = 10**9
    above: bool = False
    below: bool = False
    optional: str = ""
    also: tuple[Any, ...] = ()
    parse: Callable[[str, Any], str] | None = None
    needs: tuple[Needs, ...] = ()
    common: bool = False
    follows: str = ""
    label: str = ""
    draws: tuple[Any, ...] = ()

    @property
    def help(self) -> str:
        """Meaning, choices with their words, and what None means, in one paragraph."""
        said = [self.meaning.rstrip(".")]
        if self.choices:
            said = [f"{said[0]}: " + "; ".join(f'"{name}" ({words})' for name, words in self.choices.items())]
        if self.spellings:
            said.append(", ".join(f'"{other}" is "{name}"' for other, name in self.spellings.items()))
        if self.optional:
            said.append(f"None means {self.optional}")
        return "; ".join(said) + "."

    @property
    def markdown(self) -> str:
        """The same with a line for each choice."""
        rest = replace(self, choices={}, spellings={}).help
        names = {name: [other for other, meant in self.spellings.items() if meant == name] for name in self.choices}
        lines = [
            f"- **{name}**{''.join(f', {other}' for other in names[name])}: {words}"
            for name, words in self.choices.items()
        ]
        return "\n".join((rest, "", *lines)) if lines else rest

    @property
    def range(self) -> str:
        """What a count or a number may be, in words."""
        if self.kind == "count":
            said = "an integer of at least 1"
        else:
            said = f"a finite number {'above' if self.above else 'of at least'} {self.least:g} and "
            said += f"{'below' if self.below else 'at most'} {self.most:g}"
        return f"{said}, or None for {self.optional}" if self.optional else said

    def checked(self, value: Any) -> Any:
        """`value` as the object keeps it.

        Raises:
            ConfigError: it is not allowed.
        """
        if (value is None and self.optional) or any(value is x for x in self.also):
            return value
        match self.kind:
            case "choice":
                meant = self.spellings.get(value, value) if isinstance(value, str) else value
                return choose(self.name, meant, self.choices)
            case "count":
                return positive_int(self.name, value, int(self.most))
            case "flag":
                if not isinstance(value, bool):
                    raise ConfigError(f"{self.name} = {shown(value)}: must be true or false")
                return value
            case "number":
                return self._number(value)
            case "part":
                return value
            case "text":
                return self.parse(self.name, value) if self.parse is not None else value

    def _number(self, value: Any) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
        fits = fits and (self.least < value if self.above else self.least <= value)
        if not (fits and (value < self.most if self.below else value <= self.most)):
            raise ConfigError(f"{self.name} = {shown(value)}: must be {self.range}")
        return value

    def drawn(self, rng: Random) -> Any:
        """A value at random, for tests."""
        if self.kind == "flag":
            return rng.random() < 1 / 2
        return rng.choice(self.draws or tuple(self.choices) or (1, 2, 3))


def _declared(setting: Setting) -> Any:
    if setting.default is MISSING:
        return field(metadata={"setting": setting})
    return field(default=setting.default, metadata={"setting": setting})


def choice(default: str, meaning: str, choices: Mapping[str, str], **more: Any) -> Any:
    """A field that is one of a few names, each with its words."""
    return _declared(Setting(meaning=meaning, kind="choice", default=default, choices=choices, **more))


def integer(default: Any, meaning: str, **more: Any) -> Any:
    """A field that is an integer of at least 1."""
    return _declared(Setting(meaning=meaning, kind="count", default=default, **more))


def size(default: Any, meaning: str, *, most: int = 1_000_000, **more: Any) -> Any:
    """A field that is a size of a model, an integer of at least 1; far above what is in use there is a limit."""
    return integer(default, meaning, most=most, **more)


def number(default: float | None, meaning: str, **more: Any) -> Any:
    """A field that is a finite number."""
    return _declared(Setting(meaning=meaning, kind="number", default=default, **{"least": 0, "most": NORM, **more}))


def probability(meaning: str, **more: Any) -> Any:
    """A field that is a number of at least 0 and below 1."""
    return number(0.0, meaning, most=1, below=True, draws=(0.0, 0.1), **more)


def flag(meaning: str, *, default: bool | None = False, **more: Any) -> Any:
    """A field that is true or false."""
    return _declared(Setting(meaning=meaning, kind="flag", default=default, **more))


def part(meaning: str, **more: Any) -> Any:
    """A field that is an object with fields of its own, which its class checks."""
    return _declared(Setting(meaning=meaning, kind="part", default=None, **more))


def text(default: Any, meaning: str, **more: Any) -> Any:
    """A field that is text, read by `parse`."""
    return _declared(Setting(meaning=meaning, kind="text", default=default, **more))


def settings(cls: type[Any]) -> dict[str, Setting]:
    """The settings that a class declares, by name, in their order."""
    return _settings(cls)  # type: ignore[arg-type]  # mypy takes no class for hashable


@cache
def _settings(cls: Hashable) -> dict[str, Setting]:
    declared = fields(cls)  # type: ignore[arg-type]  # a class, which a cache takes as anything
    return {f.name: replace(f.metadata["setting"], name=f.name) for f in declared if "setting" in f.metadata}


def choices(cls: type) -> dict[str, tuple[str, ...]]:
    """The settings of a class that are one of a few names, and those names."""
    return {name: tuple(setting.choices) for name, setting in settings(cls).items() if setting.choices}


def limits(*classes: type[Any]) -> dict[str, int]:
    """The greatest that each count of these classes may be."""
    return {
        name: int(setting.most) for cls in classes for name, setting in settings(cls).items() if setting.kind == "count"
    }


def checked(cls: type, name: str, value: Any) -> Any:
    """`value` as the field `name` of `cls` keeps it.

    Raises:
        ConfigError: it is not allowed.
    """
    return settings(cls)[name].checked(value)


def check_values(described: Any) -> None:
    """Put each field's value in the form that is kept.

    Raises:
        ConfigError: a value is not allowed.
    """
    for name, setting in settings(type(described)).items():
        object.__setattr__(described, name, setting.checked(getattr(described, name)))


def check_needs(described: Any) -> None:
    """Raise ConfigError if a setting stands beside a value of another one that it does not go with."""
    for name, setting in settings(type(described)).items():
        value = getattr(described, name)
        for need in setting.needs:
            about = value in need.values if need.values else value != setting.default
            if need.where and getattr(described, need.where[0]) != need.where[1]:
                continue
            if about and getattr(described, need.other) not in need.allowed:
                allowed = need.say or f"allowed with {need.other} {', '.join(map(str, need.allowed))}"
                why = need.why.format_map(_Fields(described))
                raise ConfigError(f"{name} = {shown(value)}: {why}; {allowed}")


class _Fields(dict[str, Any]):
    """The fields and properties of an object, for `format_map`."""

    def __init__(self, described: Any) -> None:
        super().__init__()
        self.described = described

    def __missing__(self, name: str) -> Any:
        return getattr(self.described, name)


def gathered(
    cls: type[T], values: Mapping[str, Any], *, start: T | None = None, accepts: Callable[[T], object] = lambda _: None
) -> tuple[T, dict[str, ConfigError]]:
    """(an object with those of `values` that go together, why the others do not go with them).

    What comes first has the right of way; a value that goes only with a later one waits for it.

    Args:
        cls: a class whose fields are settings.
        values: of its fields.
        start: the object that they are changes of; None for one of defaults.
        accepts: raises ConfigError for what cannot be for another reason.
    """
    found = cls() if start is None else start
    waiting, refused = dict(values), dict[str, ConfigError]()
    while waiting:
        refused = {}
        for name, value in waiting.items():
            try:
                other = replace(found, **{name: value})  # type: ignore[type-var]
                accepts(other)
            except ConfigError as error:
                refused[name] = error
            else:
                found = other
        if len(refused) == len(waiting):
            break
        waiting = {name: waiting[name] for name in refused}
    return found, refused


def drawn(cls: type[T], rng: Random, *, accepts: Callable[[T], object] = lambda _: None, **fixed: Any) -> T:
    """An object with settings at random, those of them that go together; for tests.

    Args:
        cls: a class whose fields are settings.
        rng: where the draws come from.
        accepts: raises ConfigError for what cannot be for another reason.
        fixed: fields with the values that they have.
    """
    names = [name for name in settings(cls) if name not in fixed]
    rng.shuffle(names)
    values = {name: settings(cls)[name].drawn(rng) for name in names}
    return gathered(cls, values, start=cls(**fixed), accepts=accepts)[0]
