"""Reports to keep: what was asked and answered, as JSON, CSV and Markdown."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from estimator.describe.words import in_words
from estimator.show.csv_file import csv_of
from estimator.show.formatting import dollars, duration, hours, prefixed, size, verdict

if TYPE_CHECKING:
    from estimator.answers.request import Request
    from estimator.pricing.money import Cost


def to_json(request: Request, cost: Cost | None = None) -> str:
    """Everything as JSON: the estimate, what it costs, and how to ask again."""
    plain = request.estimate().to_dict() | {"cost": cost_dict(cost), "python": request.python()}
    return json.dumps(plain | {"command": request.command()}, indent=1, allow_nan=False)


def cost_dict(cost: Cost | None) -> dict[str, Any] | None:
    """The figures of a cost, JSON-ready, with what was assumed."""
    if cost is None:
        return None
    spread = None
    if cost.dollars is not None:
        spread = {"low": cost.dollars.low, "median": cost.dollars.median, "high": cost.dollars.high}
    return {
        "accelerator_hours": cost.accelerator_hours,
        "dollars": spread,
        "energy_joules": cost.energy_joules,
        "co2_kg": cost.co2_kg,
        "assumptions": list(cost.assumptions),
        "missing": list(cost.missing),
    }


def to_csv(request: Request) -> str:
    """The account by module as CSV: one row a part of the model, and the total; each row names the recipe too."""
    r = request.estimate()
    recipe: dict[str, Any] = {"model": request.name, "accelerator": request.gpu, "count": request.count}
    recipe |= r.plan.to_dict() | {"command": request.command()}
    return csv_of(r.to_frame().assign(**recipe))


def to_markdown(request: Request, cost: Cost | None = None, unit: str = "GiB") -> str:
    """A report in Markdown."""
    r = request.estimate()
    plan = ", ".join(
        f"{name} {value}" for name, value in (r.plan.to_dict() | {"seq_len": r.plan.tokens(r.model)}).items()
    )
    lines = [
        f"# {request.name} on {request.count} x {r.accelerator.name}",
        "",
        verdict(r, unit),
        "",
        f"Model: {in_words(r.model)}.",
        "",
        f"Recipe: {plan}.",
    ]
    lines += ["", "| memory at the peak | bytes | |", "|---|---:|---:|"]
    for name, held in r.memory.parts.items():
        lines.append(f"| {name} | {held:,} | {size(held, unit)} |")
    reserve = r.memory.needed - r.memory.peak
    lines.append(f"| allocator and context | {reserve:,} | {size(reserve, unit)} |")
    lines.append(f"| needed | {r.memory.needed:,} | {size(r.memory.needed, unit)} |")
    lines += ["", "| figure | |", "|---|---:|", f"| parameters | {r.values.parameters:,} |"]
    if r.values.active_parameters != r.values.parameters:
        lines.append(f"| parameters that a token goes through | {r.values.active_parameters:,} |")
    if r.values.trained_parameters != r.values.parameters:
        lines.append(f"| parameters that are trained | {r.values.trained_parameters:,} |")
    lines.append(f"| FLOPs of a step | {prefixed(r.flops.step, 'FLOP')} |")
    if r.time is not None:
        lines.append(f"| time of a step | {duration(r.time.seconds_per_step)} |")
        lines.append(f"| time of the run | {hours(r.time.seconds)} |")
        lines.append(f"| MFU | {r.time.mfu:.1%} |")
        if r.time.interval is not None:
            low, high = hours(r.time.interval.low), hours(r.time.interval.high)
            lines.append(f"| interval of the run's time | {low} to {high} |")
            lines += [f"| {name}, of a step | {duration(seconds)} |" for name, seconds in r.time.parts.items()]
    if cost is not None and cost.dollars is not None:
        spread = f"{dollars(cost.dollars.low)} to {dollars(cost.dollars.high)}"
        lines.append(f"| dollars | {dollars(cost.dollars.median)} ({spread}) |")
    if cost is not None and cost.kilowatt_hours is not None:
        lines.append(f"| energy | {prefixed(cost.kilowatt_hours * 1e3, 'Wh')} |")
    behind = (r.time.origin, r.time.rows) if r.time is not None and r.time.predicted else ()
    for said in (
        *r.notes,
        *r.memory_notes,
        *behind,
        *(cost.assumptions if cost is not None else ()),
        *(cost.missing if cost is not None else ()),
    ):
        lines += ["", f"- {said}"]
    lines += ["", "```python", request.python(), "```", "", "```sh", request.command(), "```", ""]
    return "\n".join(lines)
