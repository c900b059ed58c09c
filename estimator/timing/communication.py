"""Which messages a step sends, read from its ledger. How long they take is `estimator.timing.waiting`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from estimator.eager.letters import ONE, ZERO, as_sizes
from estimator.parallel.placement import DATA

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from estimator.accounting.accounts import Account
    from estimator.eager.ledger import Message as Sent
    from estimator.eager.letters import Size

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Message:
    """The collectives of a step that are of one kind, together.

    Attributes:
        collective: "all-gather", "reduce-scatter", "all-reduce", "broadcast" or "all-to-all".
        axis: of the device mesh (`estimator.parallel.placement`).
        phase: "forward", "backward" or "optimizer".
        waits: what waits for it (`estimator.eager.ledger.WAITS`).
        nbytes: bytes of the whole tensors.
        count: how many messages that is.
        pieces: how many of them follow one another; each accelerator's broadcasts of a unit's rows go together.
    """

    collective: str
    axis: str
    phase: str
    waits: str
    nbytes: Any
    count: Any
    pieces: Any


def _remembered(function: Callable[[Account], T]) -> Callable[[Account], T]:
    """`function` of an account, remembered as long as the account is: it has megabytes that nothing else may need."""
    known: WeakKeyDictionary[Account, T] = WeakKeyDictionary()

    @wraps(function)
    def of(form: Account) -> T:
        if form not in known:
            known[form] = function(form)
        return known[form]

    return of


Key = tuple[str, str, str, str, int]  # collective, axis, phase, waits, bytes of an element


@_remembered
def _totals(form: Account) -> dict[Key, list[tuple[Size, Size]]]:
    """Of each kind of message, (bytes, count) in the first micro-batch and in those after it."""
    terms: dict[tuple[Key, int], list[Sent]] = {}
    for sent in form.traced.ledger.messages:
        updates = sent.where.phase.value == "optimizer"
        again = form.recipe.pipeline and sent.axis != DATA and sent.micro_batch > 1 and not updates
        if sent.kind == "send" or again:
            continue  # what a stage sends on is its schedule's; a third micro-batch sends what the second does
        key = (sent.kind, sent.axis, sent.where.phase.value, sent.waits, sent.itemsize)
        turn = 0 if updates else min(sent.micro_batch, 1)
        terms.setdefault((key, turn), []).append(sent)
    total = form.traced.total
    found: dict[Key, list[tuple[Size, Size]]] = {}
    for (key, turn), those in terms.items():
        row = found.setdefault(key, [(ZERO, ZERO), (ZERO, ZERO)])
        count = total([(m.where.block, m.count) for m in those])
        row[turn] = total([(m.where.block, m.nbytes) for m in those]), count
    return found


@_remembered
def _units(form: Account) -> Size:
    """Parts of the model whose parameters are sent as one: its blocks, and one for all else."""
    blocks = range(len(form.traced.stack.places))
    return form.traced.total([(None, ONE), *((block, ONE) for block in blocks)])


@_remembered
def _copies(form: Account) -> tuple[Size, Size]:
    """Bytes that go to the host and come back, in the first micro-batch and in each after it."""
    copies = form.traced.ledger.copies
    first, later = (form.traced.total([(where.block, n) for where, at, n in copies if at == turn]) for turn in (0, 1))
    return first, later


def copied(form: Account, sizes: Mapping[str, Any], micro_batches: Any) -> Any:
    """Bytes that go to the host and come back in an optimizer step at `sizes`."""
    known, (first, later) = as_sizes(sizes), _copies(form)
    return known.value(first) + (micro_batches - 1) * known.value(later)


def messages(
    form: Account,
    sizes: Mapping[str, Any],
    micro_batches: Any,
    parameter_width: int | None = None,
    gradient_width: int | None = None,
    *,
    whole_updates: bool = False,
) -> tuple[Message, ...]:
    """The collectives of one optimizer step at `sizes`, those of a kind as one.

    What only the last micro-batch sends is sent once; what each sends, as often as there are some.

    Args:
        form: the account of the step.
        sizes: numbers or arrays behind its letters.
        micro_batches: forward and backward passes in a step.
        parameter_width: bytes of one parameter, if not the ledger's.
        gradient_width: the same of one gradient.
        whole_updates: each parameter is broadcast whole, by itself; else all of a unit's go together.
    """
    known, found = as_sizes(sizes), []
    for (kind, axis, phase, waits, itemsize), ((first, first_count), (later, later_count)) in _totals(form).items():
        again = micro_batches - 1 if first else 1
        nbytes = known.value(first) + again * known.value(later)
        count = known.value(first_count) + again * known.value(later_count)
        own = phase == "optimizer" and kind == "broadcast"  # each accelerator its rows: together an all-gather
        width = parameter_width if kind == "all-gather" or own else gradient_width if waits == "update" else None
        if width is not None:
            nbytes = nbytes * width / itemsize
        pieces = count
        if own:
            pieces = count / known["D"] if whole_updates else known.value(_units(form))
        found.append(Message(kind, axis, phase, waits, nbytes, count, pieces))
    return tuple(found)
