"""A recording of transformers' class beside the models here of the same config.json: by how much, and where first."""

from __future__ import annotations

import importlib
from collections import Counter
from itertools import groupby, zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import estimator as est
from estimator.accounting.accounts import sizes_for
from estimator.describe.checks import ConfigError
from estimator.eager.ledger import Category, Phase
from estimator.memory.device import timeline

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from estimator.describe.plan import Plan
    from trainer.referee.recorder.recording import Recording

# Whose statements, what they are called, and the loss beside which a class of transformers is.
MODELS = {
    "transformers": ("transformers' class, in symbols", "bundled"),
    "bundled": ("the model here, with the loss in fp32", "torch-fp32"),
}
NO_STEP = ("summary", "classifier", "layerdrop", "layer_drop")  # in the name of a dropout that a decoder's step has not
ATTENTIONS = ("sdpa", "naive-fp32")  # what a class takes by default, and where no fused kernel has its scores


class Event(NamedTuple):
    """Bytes that are allocated, or with a minus freed, and in which module."""

    nbytes: int
    module: str


def beside(config: dict[str, Any], recording: Recording, plan: Plan, tokens: tuple[int, int]) -> Iterator[str]:
    """A sentence on each model here: the difference of its figures, and where it first does otherwise.

    Args:
        config: the fields of the config.json.
        recording: of transformers' class.
        plan: the recipe that was recorded.
        tokens: sequences, and tokens of each.
    """
    try:
        m = est.from_hf(config)
    except ConfigError as error:
        yield f"There is no model here to lay beside it: {error}."
        return
    dropout = dropout_of(config)
    if dropout is None:
        yield "Its class has several probabilities of dropout, and the models here have one: the figures are without."
    for implementation, (name, loss) in MODELS.items():
        given = {
            "dropout": dropout or 0.0,
            "batch_size": tokens[0],
            "seq_len": tokens[1],
            "implementation": implementation,
            "loss": loss,
        }
        try:
            yield f"{name[0].upper()}{name[1:]}: {_difference(m, plan.replace(**given), recording)}."
        except ConfigError as error:
            yield f"{name[0].upper()}{name[1:]}: not known, {error}."


def dropout_of(config: dict[str, Any]) -> float | None:
    """The probability of dropout in the class of a config.json; None if it has several."""
    whole = importlib.import_module("transformers").CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    found = {
        value
        for name, value in whole.items()
        if "drop" in name and isinstance(value, float) and not any(word in name for word in NO_STEP)
    }
    return None if len(found) > 1 else next(iter(found), 0.0)


def _difference(m: est.ModelConfig, plan: Plan, recording: Recording) -> str:
    device = recording.account.device
    p = _attended(m, plan)
    account = est.account(m, p, device=device)
    values = account.evaluate(m, p)
    figures = {
        "peak": (values.peak_bytes, recording.peak_bytes),
        "what is saved for backward": (values.activation_bytes, recording.saved_bytes),
        "parameters": (values.parameters, recording.parameters),
        "optimizer state": (values.optimizer_bytes, recording.bytes_before(Category.OPTIMIZER)),
    }
    if all(ours == theirs for ours, theirs in figures.values()):
        return f"equal in {', '.join(figures)}"
    off = [
        f"{name} {ours - theirs:+,} ({_gb(ours)} beside {_gb(theirs)})" if name != "parameters" else f"{name} {ours:,}"
        for name, (ours, theirs) in figures.items()
        if ours != theirs
    ]
    setup = sum(e.where.phase is Phase.SETUP for e in recording.ledger.events)
    theirs = (
        Event(int(nbytes), e.where.module)
        for nbytes, e in zip(recording.account.delta[setup:], recording.ledger.events[setup:], strict=True)
    )
    line = timeline(account, sizes_for(m, p))
    ours = (Event(int(nbytes), line.where(i).module) for i, nbytes in enumerate(line.delta))
    return f"{', '.join(off)}; {first(ours, theirs)}"


def _attended(m: est.ModelConfig, plan: Plan) -> Plan:
    """The plan with the attention that transformers takes by default."""
    try:
        p = plan.replace(attention=ATTENTIONS[0])
        p.attention_kernel("cuda", m)
    except ConfigError:
        p = plan.replace(attention=ATTENTIONS[1])
    return p


def _gb(nbytes: float | None) -> str:
    assert nbytes is not None
    return f"{nbytes / 1e9:.2f} GB"


def first(ours: Iterable[Event], theirs: Iterable[Event]) -> str:
    """Where the two first do otherwise: an allocation or a free, in runs in which nothing depends on the order."""
    nothing: list[Event] = []
    for a, b in zip_longest(_runs(ours), _runs(theirs), fillvalue=nothing):
        more, missing = _only(a, b), _only(b, a)
        if more or missing:
            said = [
                f"{_said(e)} in {e.module or 'the step itself'} {whose}"
                for e, whose in ((missing, "there"), (more, "here"))
                if e
            ]
            return "first " + ", ".join(said)
    return "each allocation and each free is the same"


def _runs(events: Iterable[Event]) -> Iterator[list[Event]]:
    return (list(run) for _, run in groupby(events, key=lambda e: e.nbytes > 0))


def _only(a: Sequence[Event], b: Sequence[Event]) -> Any:
    """The first event of `a` that `b` has not as often."""
    left = Counter(e.nbytes for e in b)
    for e in a:
        if not left[e.nbytes]:
            return e
        left[e.nbytes] -= 1
    return None


def _said(e: Event) -> str:
    return f"{abs(e.nbytes):,} bytes {'allocated' if e.nbytes > 0 else 'freed'}"
