"""Drawing: each function takes the library's figures and gives a Vega-Lite chart, and a sentence that says the same.

The charts are plain Vega-Lite specifications: altair validates each of its objects against a schema, which takes longer
than everything else on the page together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from app_pages.vega import Drawing, Spec, chart, layer, tooltip
from estimator.eager.ledger import Category
from estimator.show.formatting import BYTE_UNITS, NOUNS, in_unit, place, size
from estimator.show.snapshot import thinned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.answers.estimates import Estimate
    from estimator.memory.device import Memory, Timeline

# The order of the colours in .streamlit/config.toml.
CATEGORIES = tuple(NOUNS[c.value] for c in Category)
RESERVE = "allocator and context"
VISIBLE = 0.002  # of the peak: what is thinner than a pixel gets no legend
BUSY = 0.5  # of the capacity: from there on the timeline shows it as a line
READABLE = 0.045  # of an icicle's height: what is thinner has no room for its name
HATCH = 20  # hatches across a map
# Dark enough for white letters on them, in either theme.
SOLID = ("#2468b8", "#12745a", "#8f5f00", "#5a48b8", "#b13436", "#565e6d", "#8a4f9e", "#a34a12")


def memory_parts(memory: Memory) -> dict[str, int]:
    """The bytes that must be free, by what they are for; what the allocator adds comes last."""
    parts = {NOUNS[name]: held for name, held in memory.parts.items() if held}
    return parts | {RESERVE: memory.needed - memory.peak}


def memory_bars(memories: Mapping[str, Memory], unit: str) -> Drawing:
    """For each name a stacked bar of what must be free, against the capacity; a single one needs no name."""
    bars: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    said = []
    for name, memory in memories.items():
        assert memory.capacity is not None, "an Estimate is always on an accelerator"
        start = 0.0
        texts = []
        for what, held in memory_parts(memory).items():
            end, text = start + in_unit(held, unit), size(held, unit)
            bars.append({"name": name, "what": what, "text": text, "start": start, "end": end})
            texts.append(f"{what} {text}")
            start = end
        capacity = size(memory.capacity, unit)
        ends.append({"name": name, "end": in_unit(memory.capacity, unit), "said": f"capacity {capacity}"})
        said.append(f"{name + ': ' if name else ''}{', '.join(texts)}; the capacity is {capacity}")
    scale = {"domain": [0, max(row["end"] for row in (*bars, *ends)) * 1.01], "nice": False}
    x = {"field": "start", "type": "quantitative", "scale": scale, "axis": None}
    at = {"field": "end", "type": "quantitative", "scale": scale}
    hidden = len(memories) == 1
    seen = () if hidden else tuple(dict.fromkeys(row["what"] for row in bars))
    y: Spec = {"field": "name", "type": "nominal", "sort": None, "title": None}
    y["axis"] = None if hidden else {"ticks": False, "domain": False, "labelFontSize": 13}
    bar = layer(
        "bar", bars, x=x, x2={"field": "end"}, y=y, color=_colour(seen), tooltip=tooltip(what="What", text="Memory")
    )
    bar["mark"]["height"] = {"band": 0.62}
    rule = layer("tick", ends, x=at, y=y, strokeWidth=2, color="gray")
    rule["mark"]["height"] = {"band": 0.95}
    name_ = {"align": "right", "dx": -6, "dy": -22 if hidden else -20, "color": "gray", "fontSize": 11}
    label = layer("text", ends, x=at, y=y, text={"field": "said"}, **name_)
    spec = chart([bar, rule, label], height={"step": 62})
    return Drawing(spec, f"Memory in a step's greatest moment. {'. '.join(said)}.")


def bars(rows: Sequence[tuple[str, float, str]], title: str) -> Drawing:
    """A bar for each (name, amount, amount as text), the longest as wide as there is room for, with its text beside it.

    Args:
        rows: from the top down.
        title: what the sentence begins with.
    """
    most = max((amount for _, amount, _ in rows), default=0) or 1
    values = [
        {"name": name, "amount": amount, "text": text, "colour": SOLID[i % len(SOLID)]}
        for i, (name, amount, text) in enumerate(rows)
    ]
    scale = {"domain": [0, most * 1.7], "nice": False}  # room for the text
    x: Spec = {"field": "amount", "type": "quantitative", "axis": None, "scale": scale}
    style = {"ticks": False, "domain": False, "labelFontSize": 13, "labelLimit": 220}
    y: Spec = {"field": "name", "type": "nominal", "sort": None, "title": None, "axis": style}
    colour = {"field": "colour", "type": "nominal", "scale": None, "legend": None}
    bar = layer("bar", values, x=x, y=y, color=colour, tooltip=tooltip(name="What", text="Amount"))
    bar["mark"]["height"] = {"band": 0.6}
    text = {"field": "text", "type": "nominal"}
    label = layer("text", values, x=x, y=y, text=text, align="left", baseline="middle", dx=5, color="gray", fontSize=12)
    words = "; ".join(f"{name} {text}" for name, _, text in rows)
    return Drawing(chart([bar, label], height={"step": 30}), f"{title}: {words}.")


def timeline_frame(timeline: Timeline, unit: str) -> pd.DataFrame:
    """The thinned timeline: one row a moment, one column a category that is ever alive, and where it is."""
    index = thinned(timeline)
    factor = BYTE_UNITS[unit]
    columns: dict[str, Any] = {"event": index}
    columns |= {NOUNS[name]: live[index] / factor for name, live in timeline.categories.items() if live.any()}
    where = [timeline.where(int(i)) for i in index]
    columns["live"] = [size(timeline.live[i], unit) for i in index]
    columns["phase"] = [w.phase.value for w in where]
    columns["at"] = [f"{w.module or 'step'} · {w.op}" for w in where]
    return pd.DataFrame(columns)


def phases_of(timeline: Timeline) -> list[tuple[str, int, int]]:
    """(phase, first event, one past the last) of each stretch of the step."""
    edges = np.flatnonzero(timeline.phases[1:] != timeline.phases[:-1]) + 1
    starts, ends = [0, *edges], [*edges, len(timeline)]
    return [(str(timeline.phases[a]), int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def timeline_chart(estimate: Estimate, unit: str) -> Drawing:
    """Live bytes over the events of one step, by category, with the phases banded and the peak marked and named."""
    timeline, memory = estimate.memory.timeline, estimate.memory
    frame = timeline_frame(timeline, unit)
    peak, events = in_unit(memory.peak, unit), len(timeline)
    present = [name for name in CATEGORIES if name in frame]
    seen = [name for name in present if frame[name].max() > VISIBLE * peak]
    capacity = in_unit(memory.capacity or 0, unit)
    crowded = memory.peak > BUSY * (memory.capacity or 0)
    plane = Plane(events, max(1.2 * peak, 1.08 * capacity if crowded else 0))  # room above the peak for its name

    band, names = _phases(phases_of(timeline), plane)
    layers = [band, _areas(present, seen, plane, unit), names, _ruler(plane), *_peak(estimate, peak, plane, unit)]
    if crowded:
        limit = [{"number": capacity}]
        layers.insert(2, layer("rule", limit, y=plane.y("number"), strokeDash=[5, 3], strokeWidth=2, color="gray"))
    text = (
        f"Live memory over the {events:,} allocations and frees of one step. It starts and ends at "
        f"{size(timeline.start, unit)} and is greatest, {size(memory.peak, unit)}, in {place(estimate)}."
    )
    spec = chart(layers, height=340)
    spec["data"] = {"values": _records(frame)}
    return Drawing(spec, text)


class Plane(NamedTuple):
    """What a timeline is drawn in: `events` wide, `top` high, from 0."""

    events: int
    top: float

    def x(self, field: str, **more: Any) -> Spec:
        """A field that says where from left to right."""
        return {"field": field, "type": "quantitative", "scale": {"domain": [0, self.events], "nice": False}, **more}

    def y(self, field: str, **more: Any) -> Spec:
        """A field that says how high."""
        return {"field": field, "type": "quantitative", "scale": {"domain": [0, self.top], "nice": False}, **more}


def _phases(phases: Sequence[tuple[str, int, int]], plane: Plane) -> tuple[Spec, Spec]:
    """Every second phase as a band behind all else, and the phases' names above."""
    bands = [{"start": a, "end": b, "bottom": 0, "top": plane.top} for _, a, b in phases[1::2]]
    x2, y2 = {"field": "end"}, {"field": "top"}
    band = layer("rect", bands, x=plane.x("start"), x2=x2, y=plane.y("bottom"), y2=y2, color="gray", opacity=0.1)
    named = [{"middle": (a + b) / 2, "phase": phase} for phase, a, b in phases if b - a > 0.04 * plane.events]
    style = {"baseline": "bottom", "color": "gray", "fontSize": 12}
    return band, layer("text", named, x=plane.x("middle"), y={"value": -4}, text={"field": "phase"}, **style)


def _areas(present: Sequence[str], seen: Sequence[str], plane: Plane, unit: str) -> Spec:
    """Live bytes, the categories on top of each other."""
    axis = {"gridOpacity": 0.4, "tickCount": 6, "format": "~s"}
    area = layer(
        "area",
        None,
        x=plane.x("event", title="allocations and frees of one step, in order", axis={"grid": False, "tickCount": 5}),
        y=plane.y("number", stack="zero", title=f"live memory, {unit}", axis=axis),
        color=_colour(seen),
        order={"field": "order", "type": "quantitative"},
        interpolate="step-after",
        opacity=0.92,
    )
    area["transform"] = [
        {"fold": present, "as": ["what", "number"]},
        {"calculate": f"indexof({present!r}, datum.what)", "as": "order"},
    ]
    return area


def _ruler(plane: Plane) -> Spec:
    """A line under the pointer, which tells what is alive there."""
    shown = {"condition": {"param": "hover", "empty": False, "value": 0.8}, "value": 0}
    tips = tooltip(live="Live", phase="Phase", at="At")
    ruler = layer("rule", None, x=plane.x("event"), opacity=shown, tooltip=tips, color="gray")
    select = {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout", "fields": ["event"]}
    ruler["params"] = [{"name": "hover", "select": select}]
    return ruler


def _peak(estimate: Estimate, peak: float, plane: Plane, unit: str) -> tuple[Spec, Spec]:
    """A point at the peak, and beside it how much it is; where it is in the step says the sentence below the chart."""
    timeline = estimate.memory.timeline
    mark = [{"event": timeline.peak, "number": peak}]
    style = {"filled": True, "size": 70, "opacity": 1, "color": "gray", "stroke": "white", "strokeWidth": 1.5}
    point = layer("point", mark, x=plane.x("event"), y=plane.y("number"), **style)
    late = timeline.peak > plane.events / 2
    side = {"align": "right" if late else "left", "dx": -9 if late else 9}
    said = f"peak {size(estimate.memory.peak, unit)}"
    style = {"baseline": "bottom", "dy": -5, "fontSize": 12, "fontWeight": 600, "color": "gray"}
    called = layer("text", mark, x=plane.x("event"), y=plane.y("number"), text={"value": said}, **side, **style)
    return point, called


def icicle(whole: str, parts: Mapping[str, Mapping[str, float]], say: Callable[[float], str], title: str) -> Drawing:
    """A whole, its parts and theirs, as boxes of proportional height, from left to right.

    Args:
        whole: what the whole is called.
        parts: amount by part and by part of the part ("" where it has none); what is zero is left out.
        say: an amount as text.
        title: what the sentence begins with.
    """
    sums = {name: sum(inner.values()) for name, inner in parts.items()}
    total = sum(sums.values())
    order = [name for name in sorted(sums, key=sums.__getitem__, reverse=True) if sums[name] > 0]
    boxes: list[dict[str, Any]] = []

    def box(level: int, start: float, amount: float, name: str, path: str, colour: str) -> None:
        share = amount / total
        label = f"{name} {share:.0%}" if level else [name, say(amount)]
        boxes.append(
            {
                "x": level + 0.01,
                "x2": level + 0.99,
                "y": start,
                "y2": start + share,
                "label": label if share > READABLE else "",
                "path": path,
                "text": f"{say(amount)} · {share:.1%}",
                "colour": colour,
                "opacity": 1 - 0.14 * max(level - 1, 0),
            }
        )

    box(0, 0, total, whole, whole, "")
    start = 0.0
    for name in order:
        box(1, start, sums[name], name, name, name)
        for kind, amount in parts[name].items():
            if amount and kind:
                box(2, start, amount, kind, f"{name}, {kind}", name)
            start += amount / total
    deep = 3 if any(kind for inner in parts.values() for kind in inner) else 2
    x = {"field": "x", "type": "quantitative", "axis": None, "scale": {"domain": [0, deep], "nice": False}}
    y = {"field": "y", "type": "quantitative", "axis": None, "scale": {"domain": [1, 0], "nice": False}}
    colours = {"domain": ["", *order], "range": ["#6b7280", *(SOLID[i % len(SOLID)] for i in range(len(order)))]}
    colour = {"field": "colour", "type": "nominal", "scale": colours, "legend": None}
    tips = tooltip(path="What", text="Amount")
    opacity = {"field": "opacity", "type": "quantitative", "scale": None}
    rect = layer(
        "rect", boxes, x=x, x2={"field": "x2"}, y=y, y2={"field": "y2"}, color=colour, opacity=opacity, tooltip=tips
    )
    rect["mark"] |= {"stroke": "white", "strokeWidth": 1, "strokeOpacity": 0.6, "cornerRadius": 2}
    middle = [b | {"x": (b["x"] + b["x2"]) / 2, "y": (b["y"] + b["y2"]) / 2} for b in boxes if b["label"]]
    style = {"color": "white", "fontSize": 12, "fontWeight": 500, "lineHeight": 16, "baseline": "middle"}
    label = layer("text", middle, x=x, y=y, text={"field": "label"}, tooltip=tips, **style)
    words = "; ".join(f"{name} {say(sums[name])} ({sums[name] / total:.0%})" for name in order)
    return Drawing(chart([rect, label], height=320), f"{title}: {words}.")


class Axis(NamedTuple):
    """One side of a map: its title, the middle of each cell, and whether they are spaced logarithmically."""

    title: str
    values: Sequence[int]
    logarithmic: bool = False

    @property
    def edges(self) -> NDArray[np.float64]:
        """Where the cells begin and end: halfway between their middles."""
        at = np.asarray(self.values, dtype=np.float64)
        at = np.log(at) if self.logarithmic else at
        if len(at) == 1:
            at = np.array([at[0] - 0.5, at[0] + 0.5])
        else:
            half = np.diff(at) / 2
            at = np.concatenate([[at[0] - half[0]], at[:-1] + half, [at[-1] + half[-1]]])
        return np.exp(at) if self.logarithmic else at


def cells(
    x: Axis,
    y: Axis,
    shown: NDArray[Any],
    colour: Spec,
    tips: Mapping[str, NDArray[Any]],
    hatched: NDArray[np.bool_] | None = None,
    here: tuple[float, float] | None = None,
) -> Spec:
    """A map: a cell for each pair of values, coloured by what is `shown` there.

    Args:
        x: the axis of the arrays' first index.
        y: the axis of their second one.
        shown: of each cell, (x, y); the field that `colour` encodes.
        colour: the encoding.
        tips: what is said, by title, when the pointer is on a cell, each (x, y).
        hatched: which cells are hatched, (x, y).
        here: the (x, y) to mark.
    """
    x_edges, y_edges = x.edges, y.edges
    i, j = (index.ravel() for index in np.indices((len(x.values), len(y.values))))
    frame = pd.DataFrame({"x": x_edges[i], "x2": x_edges[i + 1], "y": y_edges[j], "y2": y_edges[j + 1]})
    frame[x.title] = np.asarray(x.values)[i]
    frame[y.title] = np.asarray(y.values)[j]
    frame["shown"] = shown.ravel()
    for name, values in tips.items():
        frame[name] = values.ravel()

    def position(field: str, axis: Axis, edges: NDArray[np.float64]) -> Spec:
        scale = {"type": "log" if axis.logarithmic else "linear", "domain": [edges[0], edges[-1]], "nice": False}
        style = {"grid": False, "tickCount": 8, "format": ",d", "tickMinStep": 1, "labelOverlap": True}
        return {"field": field, "type": "quantitative", "scale": scale, "title": axis.title.lower(), "axis": style}

    at = {"x": position("x", x, x_edges), "y": position("y", y, y_edges)}
    ends = {"x2": {"field": "x2"}, "y2": {"field": "y2"}}
    fields = [{"field": name} for name in (x.title, y.title, *tips)]
    layers = [layer("rect", None, **at, **ends, color=colour | {"field": "shown"}, tooltip=fields)]
    if hatched is not None and hatched.any():
        every = max(1, round(max(hatched.shape) / HATCH))
        drawn = np.flatnonzero(hatched.ravel() & ((i + j) % every == 0))
        lines = frame.loc[drawn, ["x", "x2", "y", "y2"]]
        crossed = _records(lines.rename(columns={"y": "y2", "y2": "y"}))
        layers.append(layer("rule", crossed, **at, **ends, color="#20242c", opacity=0.55, strokeWidth=1))
    if here is not None:
        style = {"filled": True, "size": 90, "color": "white", "stroke": "#20242c", "strokeWidth": 2, "opacity": 1}
        layers.append(layer("point", [{"x": here[0], "y": here[1]}], **at, **style))
    spec = chart(layers, height=420)
    spec["data"] = {"values": _records(frame)}
    return spec


def line(
    x: str, y: str, rows: Sequence[Mapping[str, Any]], *, logarithmic: bool, limit: tuple[float, str] | None
) -> Spec:
    """`shown` over `at`, of each row; where it does not `fit` the line is red and hatched below.

    Args:
        x: title of the horizontal axis.
        y: title of the vertical one.
        rows: "at", "shown", "text" (of shown) and "fits" of each point, in order.
        logarithmic: whether the horizontal axis is.
        limit: a height to mark, and what it is.
    """
    scale = {"type": "log" if logarithmic else "linear", "nice": False, "zero": False}
    at = {
        "field": "at",
        "type": "quantitative",
        "title": x,
        "scale": scale,
        "axis": {"grid": False, "format": ",d", "tickMinStep": 1, "tickCount": 8},
    }
    height = {"field": "shown", "type": "quantitative", "title": y, "axis": {"format": "~s", "gridOpacity": 0.4}}
    curve = layer("line", rows, x=at, y=height, strokeWidth=2.5)
    layers = [curve]
    wrong = [row for row in rows if not row["fits"]]
    if wrong:
        floor = {"value": "height"}
        every = wrong[:: max(1, len(wrong) // 60)]
        bars = layer("rule", every, x=at, y=height, y2=floor, color="#d43f42", opacity=0.35, strokeDash=[2, 4])
        red = layer("line", wrong, x=at, y=height, strokeWidth=3.5, color="#d43f42")
        layers = [bars, curve, red]
    if limit is not None:
        mark = [{"shown": limit[0], "said": limit[1]}]
        layers.append(layer("rule", mark, y=height, strokeDash=[5, 3], color="gray"))
        style = {"align": "right", "dx": -4, "dy": -7, "color": "gray"}
        layers.append(layer("text", mark, y=height, x={"value": "width"}, text={"field": "said"}, **style))
    tips = [{"field": "at", "title": x}, {"field": "text", "title": y}, {"field": "fits", "title": "fits"}]
    layers.append(layer("point", rows, x=at, y=height, tooltip=tips, opacity=0, size=200))
    return chart(layers, height=420)


HOURS = (
    "datum.value < 0.95 ? format(datum.value * 60, '.2~r') + ' min' : "
    "datum.value < 48 ? format(datum.value, '.2~r') + ' h' : format(datum.value / 24, ',.2~r') + ' days'"
)
# Of what options trade: the field of a row, the axis's title, and how its ticks are written.
AXES = {
    "hours": ("time", HOURS),
    "dollars": ("US dollars", "replace(format(datum.value, '$~s'), 'G', 'B')"),
    "parameters": ("parameters of the model", "replace(format(datum.value, '~s'), 'G', 'B')"),
    "tokens": ("training tokens", "replace(format(datum.value, '~s'), 'G', 'B')"),
}


def options(rows: Sequence[Mapping[str, Any]], x: str, y: str, said: str) -> Drawing:
    """What ways to do a run trade for each other, and the line of those that no other beats in both.

    Args:
        rows: both axes, "accelerator", "what" (said of it) and "best" of each.
        x: one of `AXES`.
        y: another.
        said: of the others, what the best ones have that they have not.
    """

    def axis(field: str) -> Spec:
        title, written = AXES[field]
        style = {"grid": True, "gridOpacity": 0.3, "tickCount": 6, "labelExpr": written}
        style |= {"labelOverlap": True, "labelBound": True}
        scale = {"type": "log", "nice": False, "padding": 20}
        return {"field": field, "type": "quantitative", "title": title, "scale": scale, "axis": style}

    front = sorted((row for row in rows if row["best"]), key=lambda row: row[x])
    legend = {"orient": "bottom", "columns": 2, "title": None}
    colour = {"field": "accelerator", "type": "nominal", "legend": legend, "scale": {"scheme": "tableau20"}}
    line = layer("line", front, x=axis(x), y=axis(y), color="gray", strokeWidth=2, strokeDash=[4, 3])
    tips = tooltip(what="What", accelerator="Accelerator")
    size = {"condition": {"test": "datum.best", "value": 150}, "value": 45}
    points = layer(
        "point", rows, x=axis(x), y=axis(y), color=colour, tooltip=tips, size=size, filled=True, opacity=0.85
    )
    named = "; ".join(str(row["what"]) for row in front[:6])
    text = f"{len(rows):,} ways, by {AXES[x][0]} and {AXES[y][0]}. No other {said} than these: {named}."
    return Drawing(chart([line, points], height=480), text)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): x for name, x in row.items()} for row in frame.to_dict("records")]


def _colour(shown: Sequence[str] = ()) -> Spec:
    """Each category's colour, and a legend of those `shown`."""
    legend = {"values": list(shown), "orient": "bottom", "title": None, "columns": 2, "symbolType": "square"}
    domain = [*CATEGORIES, RESERVE]
    return {
        "field": "what",
        "type": "nominal",
        "scale": {"domain": domain},
        "sort": domain,
        "legend": legend if shown else None,
    }
