"""The first event at which a step's ledger and a real step differ: where to look for a rule that is not known yet.

    python -m trainer.referee.first_difference gpt2 --set num_layers=2 d_model=24 num_heads=3 --plan batch_size=2

A real step's events are the profiler's raw memory events, each with the operator that was running; the ledger's are
those of the symbolic step at the same sizes. Both are printed side by side, from ten events before the first that
differs.
"""

from __future__ import annotations

import argparse
import ast
import sys
from bisect import bisect_right
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__" and find_spec("torch") is None:
    sys.exit("first_difference: error: torch is missing: pip install 'transformer-estimator[trainer]'")

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from estimator.accounting.accounts import account_at, recipe_of, sizes_for
from estimator.describe.checks import ConfigError
from estimator.describe.hf import from_hf
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from estimator.describe.schedules import read
from estimator.memory.device import timeline
from trainer.referee.measure import build_step, onednn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from estimator.describe.model import ModelConfig
    from estimator.describe.schedules import Schedule
    from trainer.referee.measure import Step

STEADY = "the steady step"  # as the profiler has it
BEFORE, AFTER = 10, 5  # events that are printed around the first difference


class Event(NamedTuple):
    """Bytes that were allocated, or with a minus freed, and where."""

    nbytes: int
    place: str


def symbolic_events(m: ModelConfig, p: Plan, schedule: Schedule | None = None) -> list[Event]:
    """The events of the symbolic step, the setup left out; of `schedule` in place of the plan's accumulation."""
    recipe, sizes = recipe_of(m, p, "cpu"), sizes_for(m, p, threads=1)
    known = account_at(recipe if schedule is None else replace(recipe, schedule=schedule), sizes, "cpu")
    line = timeline(known, sizes_for(m, p))
    events = (line.where(i) for i in range(len(line)))
    return [
        Event(int(delta), f"{where.phase} {where.module or 'model'} {where.op}")
        for delta, where in zip(line.delta, events, strict=True)
    ]


def real_events(step: Step) -> list[Event]:
    """The events of one steady step on the CPU, each with the innermost operator that was running.

    The profiler does not see the end of what it has not seen begin: it watches the step before too.
    """
    with onednn(enabled=False), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
        with record_function(STEADY):
            step()
    results = prof.profiler.kineto_results
    assert results is not None
    cpu = torch._C._autograd.DeviceType.CPU  # noqa: SLF001 - kineto's own enum
    memory, ops = [], []
    for e in results.events():
        if e.name() == "[memory]" and e.device_type() == cpu:
            memory.append((e.start_ns(), e.nbytes()))
        elif e.name() != "[memory]":
            ops.append((e.start_ns(), e.start_ns() + e.duration_ns(), e.name()))
    ops.sort()
    starts = [start for start, _, _ in ops]
    begun = next(start for start, _, name in ops if name == STEADY)
    found = []
    for at, nbytes in sorted((event for event in memory if event[0] >= begun), key=lambda event: event[0]):
        first = bisect_right(starts, at)
        running = (name for start, end, name in reversed(ops[max(0, first - 60) : first]) if end >= at)
        found.append(Event(nbytes, next(running, "between operators")))
    return found


def in_one_order(events: Sequence[Event]) -> list[Event]:
    """The same with each run of frees from the largest: nothing depends on their order, and the two differ in it."""
    found: list[Event] = []
    run: list[Event] = []
    for event in events:
        if event.nbytes < 0:
            run.append(event)
            continue
        found += [*sorted(run, key=lambda e: e.nbytes), event]
        run = []
    return found + sorted(run, key=lambda e: e.nbytes)


def first_difference(ours: Sequence[Event], real: Sequence[Event]) -> int | None:
    """The index of the first event whose bytes differ; None where all are equal."""
    for i, (a, b) in enumerate(zip(ours, real, strict=False)):
        if a.nbytes != b.nbytes:
            return i
    return None if len(ours) == len(real) else min(len(ours), len(real))


def report(ours: Sequence[Event], real: Sequence[Event]) -> str:
    """The events around the first difference, side by side."""
    at = first_difference(ours, real)
    if at is None:
        return f"all {len(ours)} events are equal"
    lines = [f"event {at} of {len(ours)} in the ledger, {len(real)} in the real step"]
    nothing = Event(0, "")
    for i in range(max(0, at - BEFORE), at + AFTER + 1):
        a, b = (events[i] if i < len(events) else nothing for events in (ours, real))
        mark = ">" if a.nbytes != b.nbytes else " "
        lines.append(f"{mark} {i:6d} {a.nbytes:12d} {b.nbytes:12d}  {a.place:60.60s}  {b.place}")
    return "\n".join(lines)


def compare(m: ModelConfig, p: Plan, seed: int = 0, schedule: Schedule | None = None) -> str:
    """`report` of a model and plan on the CPU."""
    real = real_events(build_step(m, p, "cpu", seed, schedule))
    return report(in_one_order(symbolic_events(m, p, schedule)), in_one_order(real))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all events are equal."""
    said = "The first event at which a step's ledger and a real step differ, with those around it."
    parser = argparse.ArgumentParser(prog="first_difference", description=said)
    parser.add_argument("model", help="a preset or the path of a config.json")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="FIELD=VALUE", help="sizes of the model"
    )
    parser.add_argument(
        "--plan", nargs="*", action="extend", default=[], metavar="FIELD=VALUE", help="fields of the plan"
    )
    parser.add_argument("--schedule", metavar="MOVES", help='micro-batches in another order: "F0 F1 B0 B1"')
    args = parser.parse_args(argv)
    try:
        named = from_hf(Path(args.model)) if Path(args.model).exists() else preset(args.model)
        schedule = None if args.schedule is None else read(args.schedule)
        said = compare(named.replace(**_fields(args.set)), Plan(**_fields(args.plan)), schedule=schedule)
    except ConfigError as error:
        parser.exit(2, f"first_difference: error: {error}\n")
    sys.stdout.write(said + "\n")
    return 0 if said.startswith("all") else 1


def _fields(given: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE pairs, a value as Python writes it or a plain word."""
    found: dict[str, Any] = {}
    for pair in given:
        name, _, value = pair.partition("=")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
