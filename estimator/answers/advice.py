"""What would make it fit, go faster or cost less: changes of the recipe, alone and together, and other machines.

Each is computed, with what it saves and costs; those that are better for what was asked come first.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import account
from estimator.accounting.collector import collected_later
from estimator.answers.estimates import Estimate, estimate, max_batch_size
from estimator.describe.checks import ConfigError, choose
from estimator.describe.plan import Plan
from estimator.describe.settings import choices
from estimator.hardware.accelerators import accelerator, accelerators
from estimator.memory.device import memory
from estimator.pricing.money import cost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


# Fields that change what is learned; all others compute the same step in another way.
LEARNING = ("precision", "float8", "optimizer", "dropout", "max_grad_norm", "adapter", "base_precision")
NOTICEABLE = 0.001  # of the memory, the work or the time: a change that saves less is no advice


# What an improvement can be for, and of two changes the one that is better has the lesser of these.
GOALS: dict[str, Callable[[Change], float]] = {
    "memory": lambda change: change.estimate.memory.needed,
    "speed": lambda change: change.seconds or change.work,
    "batch": lambda change: -change.largest,
    "cost": lambda change: change.dollars or change.seconds or change.work,
}
MOST = 4  # changes at once: more is another recipe
TRIED = 8  # combinations of each number of changes: those that promise most by what each change does alone
COUNTS = tuple(2**i for i in range(1, 11))  # accelerators that are tried where one is too small
LEAST_BITS = 4  # of a parameter at rest, whatever the recipe (NF4)
# What shares of a model leave room with, where no accelerator holds it: each with all that is in those before it.
THRIFTY: tuple[dict[str, Any], ...] = (
    {},
    {"checkpointing": "block"},
    {"checkpointing": "block", "attention": "sdpa"},
    {"checkpointing": "block", "attention": "sdpa", "precision": "bf16"},
)


@dataclass(frozen=True, slots=True)
class Change:
    """Changes of a recipe or of the machine, made together, and what they do.

    Attributes:
        fields: the plan's fields that change, with their new values.
        machine: "gpu" and "count" as far as they change.
        estimate: of the changed plan.
        saves: bytes that no longer must be free; negative if more must be.
        work: FLOPs that a sequence takes over those that it did (1.33 is a third more).
        seconds: time of a sequence over what it was; None without a time.
        dollars: of a sequence over what it was, at the median price; None without a time or a price.
        global_batch_size: what a step must have, if that was asked for.
    """

    fields: Mapping[str, Any]
    machine: Mapping[str, Any]
    estimate: Estimate
    saves: int
    work: float
    seconds: float | None
    dollars: float | None
    global_batch_size: int | None

    @property
    def largest(self) -> int:
        """The largest micro-batch that fits, all else as changed."""
        then = self.estimate
        return max_batch_size(then.model, then.plan, then.accelerator, global_batch_size=self.global_batch_size)

    @property
    def fits(self) -> bool:
        """Whether the step fits after the change."""
        return self.estimate.fits

    @property
    def alters(self) -> bool:
        """Whether it changes what is learned, not only how it is computed."""
        return any(name in LEARNING for name in self.fields)

    @property
    def size(self) -> int:
        """How many changes it is; a micro-batch and its accumulation are one, and so are a count and its sharding."""
        return max(1, len(self.fields) - ("grad_accumulation" in self.fields)) if self.fields else len(self.machine)


def single_changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every single change of `plan`: another name for a field, or half the micro-batch with twice the accumulation."""
    for name, names in choices(Plan).items():
        if name == "implementation":  # whose code runs is not a change of the recipe
            continue
        yield from ({name: other} for other in names if other != getattr(plan, name))
    yield from ({f.name: not getattr(plan, f.name)} for f in fields(plan) if isinstance(getattr(plan, f.name), bool))
    if plan.checkpoint_every > 1:
        yield {"checkpoint_every": 1}
        yield {"checkpointing": "none", "checkpoint_every": 1}
    elif plan.checkpointing != "none":
        yield {"checkpoint_every": 2}
    if plan.batch_size % 2 == 0:
        yield {"batch_size": plan.batch_size // 2, "grad_accumulation": plan.grad_accumulation * 2}


class Advisor:
    """Improvements of one estimate.

    Args:
        now: the estimate of the recipe as it is.
        global_batch_size: what a step must have, if that was asked for; else a step has what the plans say.
        progress: told how much is done, of 1, as it goes; it may raise to give up.
        options: the other arguments of `estimate` that `now` was made with (mfu, network, ...).
    """

    def __init__(
        self,
        now: Estimate,
        global_batch_size: int | None = None,
        progress: Callable[[float], object] = lambda _: None,
        **options: Any,
    ) -> None:
        self.now, self.global_batch_size, self.progress, self.options = now, global_batch_size, progress, options
        self.seen = {_same_step(now)}

    def _estimate(self, plan: Plan, gpu: str | None = None, count: int | None = None) -> Estimate:
        if self.global_batch_size is not None:
            plan = plan.replace(grad_accumulation=1)  # it follows
        return estimate(
            self.now.model,
            plan.replace(data_parallel=count or plan.data_parallel),
            gpu or self.now.accelerator,
            global_batch_size=self.global_batch_size,
            **self.options,
        )

    @collected_later()
    def single(self) -> tuple[Change, ...]:
        """Single changes that save memory, work or time; those that make it fit first, the fastest first.

        A change that comes out as the same recipe (an implementation that "auto" means anyway), or as the same as
        another change, is left out, and so is one that is no better in anything.
        """
        tried = list(single_changes(self.now.plan))
        found = []
        for i, fields_ in enumerate(tried):
            self.progress(i / len(tried))
            change = self._change(fields_)
            if change is not None and _better(change):
                found.append(change)
        return tuple(sorted(found, key=_by_time))

    @collected_later()
    def improvements(self, goal: str = "memory") -> tuple[Change, ...]:
        """What is better for `goal`, fewest changes first, up to four together; then, if it must, another machine.

        Where the recipe does not fit, every row either fits or needs less, those that fit come first, for "memory" the
        fastest of them, and there are no larger sets of changes than it takes. Where no set of changes fits, the rows
        end with the smallest number of these accelerators, and with the smallest accelerator, on which it does.

        Raises:
            ConfigError: an unknown goal.
        """
        choose("goal", goal, GOALS)
        if not self.now.fits and self.beyond_one:
            # If all together are not enough, none is.
            return self.machines(THRIFTY) if self.machines(THRIFTY[-1:]) else ()
        alone = self.single()
        if self.now.fits:
            return self._towards(goal, alone)
        every = list(alone)
        for size in range(2, MOST + 1):
            if any(c.fits and not c.alters for c in every):
                break
            # Where something fits already, only what leaves alone what is learned is still of interest.
            some = [c for c in alone if not c.alters] if any(c.fits for c in every) else alone
            if some is not alone and self._held_is_too_much(some):
                break
            every += self._together(some, size, lambda change: -change.saves)
        best = GOALS["speed" if goal == "memory" else goal]  # of what fits, less memory is no better
        fitting = sorted((c for c in every if c.fits), key=lambda c: (c.size, c.alters, best(c), _by_time(c)))
        if any(not c.alters for c in fitting):
            return tuple(fitting)
        least = [min(some, key=GOALS["memory"]) for some in ([c for c in every if not c.alters], every) if some]
        kept = sorted((c for c in alone if not c.alters), key=GOALS["memory"])
        recipes = [{}, *(c.fields for c in (*kept[:3], *least))]
        return (*(fitting or least[-1:]), *self.machines(recipes))

    @property
    def beyond_one(self) -> bool:
        """No recipe leaves room for the parameters on one of these accelerators."""
        return self.now.values.parameters * LEAST_BITS > 8 * self.now.accelerator.memory_bytes

    def _held_is_too_much(self, changes: Sequence[Change]) -> bool:
        """Parameters, gradients and states alone do not fit, and none of `changes` shares them."""
        v, shared = self.now.values, any("sharding" in c.fields for c in changes)
        held = v.parameter_bytes + v.gradient_bytes + v.optimizer_bytes
        return not shared and held > self.now.accelerator.memory_bytes

    def _towards(self, goal: str, alone: tuple[Change, ...]) -> tuple[Change, ...]:
        """For a recipe that fits: of each number of changes the best three that beat all smaller ones."""
        value = GOALS[goal]
        if goal in ("speed", "cost"):
            most = max_batch_size(
                self.now.model, self.now.plan, self.now.accelerator, global_batch_size=self.global_batch_size
            )
            fuller = self._change({"batch_size": most}) if most > self.now.plan.batch_size else None
            alone = (*alone, fuller) if fuller is not None else alone
        gain = (lambda c: -c.saves) if goal in ("memory", "batch") else (lambda c: math.log(value(c)))
        least, rows = value(self._same()), []
        for size in range(1, MOST + 1):
            made = alone if size == 1 else self._together(alone, size, gain)
            better = [c for c in made if c.fits and value(c) < least - NOTICEABLE * abs(least)]
            if not better:
                break
            better.sort(key=lambda c: (value(c), _by_time(c)))
            rows += better[:3]
            least = value(better[0])
        return tuple(rows)

    def machines(self, recipes: Sequence[Mapping[str, Any]] = ({},)) -> tuple[Change, ...]:
        """The smallest count and the smallest accelerator that fit the first of `recipes` (changed fields) that can."""
        found: list[Change] = []
        for ways in (self._counts, self._cards):
            for fields_ in recipes:
                made = (self._change({**fields_, **own}, machine) for machine, own in ways())
                fitting = next((c for c in made if c is not None and c.fits), None)
                if fitting is not None:
                    found.append(fitting)
                    break
        return tuple(found)

    def _counts(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        plan = self.now.plan
        for count in COUNTS:
            if count > plan.data_parallel:
                yield {"count": count}, {} if plan.sharding == "zero3" else {"sharding": "zero3"}

    def _cards(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        here = self.now.accelerator
        cards = (accelerator(id_) for id_ in accelerators())
        able = [a for a in cards if a.device == here.device and a.memory_bytes > here.memory_bytes]
        for a in sorted(able, key=lambda a: a.memory_bytes):
            yield {"gpu": a.id}, {}

    def _together(self, alone: Sequence[Change], size: int, gain: Callable[[Change], float]) -> tuple[Change, ...]:
        """The sets of `size` changes of different fields that promise most: what each gains alone, added up."""
        ranked = []
        for chosen in itertools.combinations([c for c in alone if gain(c) < 0], size):
            names = [name for c in chosen for name in c.fields]
            if len(names) == len(set(names)):
                ranked.append((sum(map(gain, chosen)), chosen))
        ranked.sort(key=lambda entry: entry[0])
        found = []
        for i, (_, chosen) in enumerate(ranked[:TRIED]):
            self.progress(i / TRIED)
            change = self._change({name: value for c in chosen for name, value in c.fields.items()})
            if change is not None:
                found.append(change)
        return tuple(found)

    def _change(self, fields_: Mapping[str, Any], machine: Mapping[str, Any] | None = None) -> Change | None:
        """The change, or None for what cannot be (not with this optimizer, ...) and for what is the same as another."""
        try:
            then = self._estimate(self.now.plan.replace(**fields_), **(machine or {}))
        except ConfigError:
            return None
        if not machine and _same_step(then) in self.seen:
            return None
        self.seen.add(_same_step(then))
        return self._compared(then, fields_, machine or {})

    def _same(self) -> Change:
        return self._compared(self.now, {}, {})

    def _compared(self, then: Estimate, fields_: Mapping[str, Any], machine: Mapping[str, Any]) -> Change:
        now, seconds, dollars = self.now, None, None
        # Of a sequence: a step of more accelerators may have more of them.
        share = now.flops.sequences / then.flops.sequences
        if now.time is not None and then.time is not None:
            seconds = share * then.time.seconds_per_step / now.time.seconds_per_step
            paid, before = dollars_of(then), dollars_of(now)
            dollars = share * paid / before if paid and before else None
        saves = now.memory.needed - then.memory.needed
        work = share * then.flops.step / now.flops.step
        return Change(fields_, machine, then, saves, work, seconds, dollars, self.global_batch_size)


def advice(now: Estimate, global_batch_size: int | None = None, **options: Any) -> tuple[Change, ...]:
    """`Advisor.single`: every single change of the recipe that saves memory, work or time."""
    return Advisor(now, global_batch_size, **options).single()


def dollars_of(r: Estimate) -> float | None:
    """US dollars of a step at the median price on file; None without a time or a price."""
    if r.time is None:
        return None
    spent = cost(r.accelerator, r.time.seconds_per_step, r.time.count).dollars
    return spent.median if spent is not None else None


def _better(change: Change) -> bool:
    faster = min(change.work, change.seconds or 1) < 1 - NOTICEABLE
    return faster or change.saves > NOTICEABLE * (change.estimate.memory.needed + change.saves)


def _by_time(change: Change) -> tuple[Any, ...]:
    return not change.fits, change.seconds or change.work, -change.saves


def _same_step(r: Estimate) -> tuple[Any, ...]:
    return r.account.recipe, r.plan.batch_size, r.plan.compile, r.plan.float8


def chunking_saves(now: Estimate) -> int | None:
    """Bytes that must not be free where the loss is chunked; 0 where there are no logits at the peak to chunk.

    None where the plan or the model cannot have such a loss (logits with a soft cap, a head with a bias, ...).
    """
    if not now.memory.logits:
        return 0
    sizes = now.memory.sizes
    try:
        a = account(now.model, now.plan.replace(loss="chunked"), now.account.device)
    except ConfigError:
        return None
    return now.memory.needed - memory(a, a.values(sizes), sizes, now.accelerator).needed
