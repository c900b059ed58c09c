"""What would make it fit or go faster: every single change of the recipe, computed, with what it saves and costs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import account
from estimator.answers.estimates import Estimate, estimate
from estimator.describe import plan as declared
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.memory.device import memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


# Fields that change what is learned; all others compute the same step in another way.
LEARNING = ("precision", "optimizer", "dropout", "max_grad_norm")
NOTICEABLE = 0.001  # of the memory, the work or the time: a change that saves less is no advice


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a recipe and what it does.

    Attributes:
        fields: the plan's fields that change, with their new values.
        estimate: of the changed plan.
        saves: bytes that no longer must be free; negative if more must be.
        work: FLOPs that a step executes over those that it did (1.33 is a third more).
        seconds: time of a step over what it was; None without a time.
    """

    fields: Mapping[str, Any]
    estimate: Estimate
    saves: int
    work: float
    seconds: float | None

    @property
    def fits(self) -> bool:
        """Whether the step fits after the change."""
        return self.estimate.fits

    @property
    def alters(self) -> bool:
        """Whether it changes what is learned, not only how it is computed."""
        return any(name in LEARNING for name in self.fields)


def choices() -> dict[str, tuple[str, ...]]:
    """The plan's fields that are one of a few names, and those names."""
    found = {}
    for f in fields(Plan):
        plural = f"{f.name}es" if f.name.endswith("s") else f"{f.name}s"
        names = getattr(declared, plural.upper(), None)
        if names is not None:
            found[f.name] = tuple(names)
    return found


def single_changes(plan: Plan) -> Iterator[dict[str, Any]]:
    """Every single change of `plan`: another name for a field, or half the micro-batch with twice the accumulation."""
    for name, names in choices().items():
        yield from ({name: other} for other in names if other != getattr(plan, name))
    yield from ({f.name: not getattr(plan, f.name)} for f in fields(plan) if isinstance(getattr(plan, f.name), bool))
    if plan.checkpoint_every > 1:
        yield {"checkpoint_every": 1}
        yield {"checkpointing": "none", "checkpoint_every": 1}
    elif plan.checkpointing != "none":
        yield {"checkpoint_every": 2}
    if plan.batch_size % 2 == 0:
        yield {"batch_size": plan.batch_size // 2, "grad_accumulation": plan.grad_accumulation * 2}


def advice(now: Estimate, estimated: Callable[[Plan], Estimate] | None = None) -> tuple[Change, ...]:
    """Single changes of the recipe that save memory, work or time; those that make it fit first, the cheapest first.

    A change that comes out as the same recipe (an implementation that "auto" means anyway), or as the same as another
    change, is left out, and so is one that is no better in anything.

    Args:
        now: the estimate of the recipe as it is.
        estimated: the estimate of another plan; by default of the same model on the same accelerator, without a run.
    """
    if estimated is None:
        time, sequences = now.time, now.flops.sequences
        mfu = time.mfu if time is not None and not time.predicted else None
        count = time.count if time is not None else 1

        def estimated(plan: Plan) -> Estimate:
            return estimate(now.model, plan, now.accelerator, mfu=mfu, count=count, global_batch_size=sequences)

    found, seen = [], {_same_step(now)}
    for changed in single_changes(now.plan):
        try:
            then = estimated(now.plan.replace(**changed))
        except ConfigError:  # not with this optimizer, not on this accelerator: no advice
            continue
        if _same_step(then) in seen:
            continue
        seen.add(_same_step(then))
        change = _compared(now, then, changed)
        faster = min(change.work, change.seconds or 1) < 1 - NOTICEABLE
        if faster or change.saves > NOTICEABLE * now.memory.needed:
            found.append(change)
    return tuple(sorted(found, key=lambda c: (not c.fits, c.seconds or c.work, -c.saves)))


def _same_step(r: Estimate) -> tuple[Any, ...]:
    return r.account.recipe, r.plan.batch_size, r.plan.compile


def chunking_saves(now: Estimate) -> int:
    """Bytes that must not be free where the loss is chunked; 0 where there are no logits at the peak to chunk."""
    if not now.memory.logits:
        return 0
    sizes = now.memory.sizes
    a = account(now.model, now.plan.replace(loss="chunked"), now.account.device)
    return now.memory.needed - memory(a, a.values(sizes), sizes, now.accelerator).needed


def _compared(now: Estimate, then: Estimate, changed: dict[str, Any]) -> Change:
    seconds = None
    if now.time is not None and then.time is not None:
        seconds = then.time.seconds_per_step / now.time.seconds_per_step
    work = then.flops.step / now.flops.step
    return Change(changed, then, now.memory.needed - then.memory.needed, work, seconds)
