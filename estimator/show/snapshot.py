"""An estimate as one HTML file that needs nothing else: no script, no network, nothing that changes."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

import estimator
from estimator.show.formatting import NOUNS, dollars, duration, hours, in_unit, place, prefixed, size, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from estimator.answers.estimates import Estimate
    from estimator.answers.request import Request
    from estimator.memory.device import Timeline
    from estimator.pricing.money import Cost

POINTS = 500  # moments of a timeline: about as many as a chart has pixels to show them
WIDTH, HEIGHT = 900.0, 240.0  # of the drawing
# By what the memory is for, in the order in which it is stacked; neighbours differ for colour-blind readers too.
COLOURS = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#8a919e", "#b9a3e3", "#12a5b8", "#c3c8d1")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f27;
  background: #fff }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .75rem; border-bottom: 1px solid #d5d9e0;
  text-align: right } th:first-child, td:first-child { text-align: left }
pre { background: #f3f4f6; padding: .75rem; overflow-x: auto; white-space: pre-wrap } .key { display: inline-block;
  width: .8em; height: .8em; margin-right: .4em }
svg { width: 100%; height: auto }
"""


def to_html(request: Request, cost: Cost | None = None, unit: str = "GiB", link: str | None = None) -> str:
    """The estimate as a page of its own.

    Args:
        request: what is asked.
        cost: what the run costs.
        unit: of memory.
        link: where the page that made it is.
    """
    r = request.estimate()
    title = f"{request.name} on {request.count:,} x {r.accelerator.name}"
    held = [(NOUNS[name], size(x, unit)) for name, x in r.memory.parts.items() if x]
    held += [("allocator and context", size(r.memory.needed - r.memory.peak, unit))]
    held += [("needed", size(r.memory.needed, unit)), ("there is", size(r.memory.capacity or 0, unit))]
    recipe = [("model", request.name), *((name, str(x)) for name, x in r.plan.to_dict().items())]
    said = [*r.notes]
    if r.time is not None and r.time.predicted:
        said += [r.time.origin, r.time.rows]
    if cost is not None:
        said += [*cost.assumptions, *cost.missing]
    frame = r.to_frame()
    modules = [
        (str(name), *(f"{int(x):,}" for x in row)) for name, row in zip(frame.index, frame.to_numpy(), strict=True)
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(verdict(r, unit))}</p>",
        _table(_headline(r, cost)),
        "<h2>One step, allocation by allocation</h2>",
        _drawing(r, unit),
        "<h2>Memory at the peak</h2>",
        _table(held),
        "<h2>By module</h2>",
        _table(modules, ("module", *(str(name).replace("_", " ") for name in frame))),
        "<h2>Recipe</h2>",
        _table(recipe),
        "<h2>What it rests on</h2>",
        "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in said) + "</ul>",
        "<h2>To ask again</h2>",
        f"<pre>{escape(request.command())}</pre>",
        f"<pre>{escape(request.python())}</pre>",
        f'<p><a href="{escape(link)}">{escape(link)}</a></p>' if link else "",
        f"<p>transformer-estimator {escape(estimator.__version__)}</p>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head, body = f"<head>{head}<style>{STYLE}</style></head>", f"<body><main>{''.join(parts)}</main></body>"
    return f'<!doctype html>\n<html lang="en">{head}{body}</html>\n'


def _headline(r: Estimate, cost: Cost | None) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("parameters", f"{r.values.parameters:,}")]
    rows.append(("FLOPs of a step", prefixed(r.flops.step, "FLOP")))
    if r.time is not None:
        rows += [("time of a step", duration(r.time.seconds_per_step)), ("training time", hours(r.time.seconds))]
        if r.time.interval is not None:
            rows.append(("nine runs of ten", f"{hours(r.time.interval.low)} to {hours(r.time.interval.high)}"))
        rows.append(("MFU", f"{r.time.mfu:.1%}"))
    if cost is not None and cost.dollars is not None:
        rows.append(("cost", dollars(cost.dollars.median)))
        rows.append(
            ("from the cheapest to the dearest", f"{dollars(cost.dollars.low)} to {dollars(cost.dollars.high)}")
        )
    if cost is not None and cost.kilowatt_hours is not None:
        rows.append(("energy", prefixed(cost.kilowatt_hours * 1e3, "Wh")))
    return rows


def _table(rows: Sequence[tuple[str, ...]], header: Sequence[str] = ()) -> str:
    head = "<tr>" + "".join(f"<th>{escape(x)}</th>" for x in header) + "</tr>" if header else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def thinned(timeline: Timeline, points: int = POINTS) -> NDArray[np.intp]:
    """Indices of at most `points` events, and the peak: of each run of events the one at which most is alive."""
    events = len(timeline)
    if events <= points:
        return np.arange(events)
    edges = np.linspace(0, events, points - 2).astype(np.intp)
    most = [start + int(timeline.live[start:end].argmax()) for start, end in pairwise(edges)]
    return np.unique([0, *most, timeline.peak, events - 1])


def _drawing(r: Estimate, unit: str) -> str:
    """Live bytes over the step, stacked by what they are for, as SVG."""
    timeline = r.memory.timeline
    index = thinned(timeline)
    across = index * (WIDTH / max(1, len(timeline) - 1))
    scale = HEIGHT / max(1, r.memory.peak)
    floor = np.zeros(len(index))
    areas, keys = [], []
    for colour, (name, live) in zip(COLOURS, timeline.categories.items(), strict=False):
        if not live.any():
            continue
        top = floor + live[index]
        edge = [*zip(across, HEIGHT - top * scale, strict=True)]
        edge += [*zip(across[::-1], (HEIGHT - floor * scale)[::-1], strict=True)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
        areas.append(f'<polygon points="{points}" fill="{colour}"/>')
        keys.append(f'<span class="key" style="background:{colour}"></span>{escape(NOUNS[name])} &nbsp; ')
        floor = top
    at = f"{size(r.memory.peak, unit)} at the peak, in {place(r)}; {in_unit(timeline.start, unit):,.3f} {unit} at rest"
    box = f'viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(at)}"'
    return f"<svg {box}>{''.join(areas)}</svg><p>{''.join(keys)}<br>{escape(at)}.</p>"
