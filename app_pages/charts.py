"""Drawing: each function takes the library's figures and gives a chart, and a sentence that says the same."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd

from estimator.eager.ledger import Category
from estimator.formatting import BYTE_UNITS, NOUNS, in_unit, place, prefixed, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from estimator.estimates import Estimate
    from estimator.memory import Memory, Timeline

# The order of the colours in .streamlit/config.toml.
CATEGORIES = tuple(NOUNS[c.value] for c in Category)
RESERVE = "allocator and context"
POINTS = 500  # moments of a timeline: about as many as a chart has pixels to show them
VISIBLE = 0.002  # of the peak: what is thinner than a pixel gets no legend
BUSY = 0.5  # of the capacity: from there on the timeline shows it as a line


def memory_frame(memory: Memory, unit: str) -> pd.DataFrame:
    """The bytes that must be free, by what they are for, largest first; what the allocator adds is the last row."""
    rows = [(NOUNS[name], held) for name, held in memory.parts.items() if held]
    rows.append((RESERVE, memory.needed - memory.peak))
    frame = pd.DataFrame(rows, columns=["what", "bytes"]).astype({"bytes": float})  # Arrow's integers end at 2^63
    frame["number"] = [in_unit(held, unit) for held in frame["bytes"]]
    frame["text"] = [size(held, unit) for held in frame["bytes"]]
    frame["share"] = frame["bytes"] / memory.needed
    frame["order"] = [(*CATEGORIES, RESERVE).index(what) for what in frame["what"]]
    return frame


def memory_bar(memory: Memory, unit: str) -> tuple[alt.LayerChart, str]:
    """One stacked bar of what must be free, against the capacity."""
    frame = memory_frame(memory, unit)
    frame["end"] = frame["number"].cumsum()
    frame["start"] = frame["end"] - frame["number"]
    assert memory.capacity is not None, "an Estimate is always on an accelerator"
    capacity = in_unit(memory.capacity, unit)
    most = max(capacity, in_unit(memory.needed, unit)) * 1.01
    scale = alt.Scale(domain=[0, most], nice=False)
    bar = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X("start:Q", title=None, scale=scale, axis=None),
            x2="end:Q",
            y=alt.value(22),
            y2=alt.value(58),
            color=_colour(),
            tooltip=[alt.Tooltip("what:N", title="What"), alt.Tooltip("text:N", title="Memory")],
        )
    )
    end = pd.DataFrame({"capacity": [capacity], "said": [f"capacity {size(memory.capacity, unit)}"]})
    at = alt.X("capacity:Q", scale=scale)
    rule = (
        alt.Chart(end)
        .mark_rule(strokeWidth=2, strokeDash=[5, 3], color="gray")
        .encode(x=at, y=alt.value(0), y2=alt.value(66))
    )
    name = (
        alt.Chart(end)
        .mark_text(align="right", baseline="top", dx=-6, color="gray", fontSize=12)
        .encode(x=at, y=alt.value(2), text="said:N")
    )
    said = ", ".join(f"{row.what} {row.text}" for row in frame.itertuples())
    text = f"Memory in a step's greatest moment: {said}; the capacity is {size(memory.capacity, unit)}."
    return alt.layer(bar, rule, name).properties(height=68).configure_view(stroke=None), text


def thinned(timeline: Timeline, points: int = POINTS) -> NDArray[np.intp]:
    """Indices of at most `points` events, and the peak: of each run of events the one at which most is alive."""
    events = len(timeline)
    if events <= points:
        return np.arange(events)
    edges = np.linspace(0, events, points - 2).astype(np.intp)
    most = [start + int(timeline.live[start:end].argmax()) for start, end in pairwise(edges)]
    return np.unique([0, *most, timeline.peak, events - 1])


def timeline_frame(timeline: Timeline, unit: str) -> pd.DataFrame:
    """The thinned timeline: one row a moment, one column a category that is ever alive, and where it is."""
    index = thinned(timeline)
    factor = BYTE_UNITS[unit]
    frame = pd.DataFrame({"event": index})
    for name, live in timeline.categories.items():
        if live.any():
            frame[NOUNS[name]] = live[index] / factor
    where = [timeline.where(int(i)) for i in index]
    frame["live"] = [size(timeline.live[i], unit) for i in index]
    frame["phase"] = [w.phase.value for w in where]
    frame["at"] = [f"{w.module or 'step'} · {w.op}" for w in where]
    return frame


def phases_of(timeline: Timeline) -> list[tuple[str, int, int]]:
    """(phase, first event, one past the last) of each stretch of the step."""
    edges = np.flatnonzero(timeline.phases[1:] != timeline.phases[:-1]) + 1
    starts, ends = [0, *edges], [*edges, len(timeline)]
    return [(str(timeline.phases[a]), int(a), int(b)) for a, b in zip(starts, ends, strict=True)]


def timeline_chart(estimate: Estimate, unit: str) -> tuple[alt.LayerChart, str]:
    """Live bytes over the events of one step, by category, with the phases banded and the peak marked and named."""
    timeline, memory = estimate.memory.timeline, estimate.memory
    frame = timeline_frame(timeline, unit)
    peak = in_unit(memory.peak, unit)
    present = [name for name in CATEGORIES if name in frame]
    seen = [name for name in present if frame[name].max() > VISIBLE * peak]
    capacity = in_unit(memory.capacity or 0, unit)
    crowded = memory.peak > BUSY * (memory.capacity or 0)
    top = max(peak, capacity if crowded else 0) * 1.12
    bands = pd.DataFrame(phases_of(timeline), columns=["phase", "start", "end"])
    bands["middle"] = (bands["start"] + bands["end"]) / 2
    bands["top"], bands["bottom"] = top, 0
    bands["odd"] = np.arange(len(bands)) % 2
    wide = bands[bands["end"] - bands["start"] > 0.04 * len(timeline)]
    x = alt.Scale(domain=[0, len(timeline)], nice=False)
    y = alt.Scale(domain=[0, top], nice=False)
    title = f"live memory, {unit}"
    band = (
        alt.Chart(bands[bands["odd"] == 1])
        .mark_rect(color="gray", opacity=0.10)
        .encode(x=alt.X("start:Q", scale=x), x2="end:Q", y=alt.Y("bottom:Q", scale=y), y2="top:Q")
    )
    names = (
        alt.Chart(wide)
        .mark_text(baseline="bottom", color="gray", fontSize=12)
        .encode(x=alt.X("middle:Q", scale=x), y=alt.value(-4), text="phase:N")
    )
    area = (
        alt.Chart(frame)
        .transform_fold(list[Any](present), as_=["what", "number"])
        .transform_calculate(order=f"indexof({present!r}, datum.what)")
        .mark_area(interpolate="step-after", opacity=0.92)
        .encode(
            x=alt.X("event:Q", scale=x, title="allocations and frees of one step, in order", axis=alt.Axis(grid=False)),
            y=alt.Y("number:Q", stack=True, scale=y, title=title, axis=alt.Axis(gridOpacity=0.4, tickCount=6)),
            color=_colour(seen),
            order=alt.Order("order:Q"),
        )
    )
    hover = alt.selection_point(nearest=True, on="pointerover", fields=["event"], empty=False)
    ruler = (
        alt.Chart(frame)
        .mark_rule(color="gray")
        .encode(
            x=alt.X("event:Q", scale=x),
            opacity=alt.condition(hover, alt.value(0.8), alt.value(0)),
            tooltip=[
                alt.Tooltip("live:N", title="Live"),
                alt.Tooltip("phase:N", title="Phase"),
                alt.Tooltip("at:N", title="At"),
            ],
        )
        .add_params(hover)
    )
    late = timeline.peak > len(timeline) / 2
    mark = pd.DataFrame({"event": [timeline.peak], "number": [peak], "said": [f"peak {size(memory.peak, unit)}"]})
    point = (
        alt.Chart(mark)
        .mark_point(filled=True, size=70, opacity=1, color="gray", stroke="white", strokeWidth=1.5)
        .encode(x=alt.X("event:Q", scale=x), y=alt.Y("number:Q", scale=y))
    )
    name = (
        alt.Chart(mark)
        .mark_text(
            align="right" if late else "left", dx=-9 if late else 9, dy=-7, fontSize=13, fontWeight=600, color="gray"
        )
        .encode(x=alt.X("event:Q", scale=x), y=alt.Y("number:Q", scale=y), text="said:N")
    )
    layers = [band, area, names, ruler, point, name]
    if crowded:
        limit = alt.Chart(pd.DataFrame({"number": [capacity]}))
        layers.insert(
            2, limit.mark_rule(strokeDash=[5, 3], strokeWidth=2, color="gray").encode(y=alt.Y("number:Q", scale=y))
        )
    text = (
        f"Live memory over the {len(timeline):,} allocations and frees of one step. It starts and ends at "
        f"{size(timeline.start, unit)} and is greatest, {size(memory.peak, unit)}, in {place(estimate)}."
    )
    return alt.layer(*layers).properties(height=330).configure_view(stroke=None), text


def flops_chart(estimate: Estimate) -> tuple[alt.Chart, str]:
    """FLOPs of one micro-batch by module and pass."""
    rows = []
    for name, form in estimate.values.modules.items():  # noqa: PD011 - an Estimate's values, not a frame's
        passes = {
            "forward": form.forward_flops,
            "backward": form.backward_flops - form.recompute_flops,
            "recomputed": form.recompute_flops,
        }
        rows += [(name, kind, flops, prefixed(flops, "FLOP")) for kind, flops in passes.items() if flops]
    frame = pd.DataFrame(rows, columns=["module", "pass", "flops", "text"]).astype({"flops": float})
    kinds = [kind for kind in ("forward", "backward", "recomputed") if kind in set(frame["pass"])]
    frame["order"] = [kinds.index(kind) for kind in frame["pass"]]
    totals = frame.groupby("module", sort=False)["flops"].sum().sort_values(ascending=False)
    ends = pd.DataFrame({"module": totals.index, "flops": totals.to_numpy()})
    ends["text"] = [f"{prefixed(x, 'FLOP')} · {x / totals.sum():.0%}" for x in ends["flops"]]
    x = alt.Scale(domain=[0, float(totals.iloc[0]) * 1.35], nice=False)
    y = alt.Y("module:N", sort=list(totals.index), title=None, axis=alt.Axis(ticks=False, domain=False))
    bars = (
        alt.Chart(frame)
        .mark_bar(height=20, cornerRadius=2)
        .encode(
            x=alt.X("flops:Q", scale=x, axis=None),
            y=y,
            color=alt.Color(
                "pass:N", sort=kinds, scale=alt.Scale(domain=kinds), legend=alt.Legend(title=None, orient="top")
            ),
            order=alt.Order("order:Q"),
            tooltip=[alt.Tooltip("module:N"), alt.Tooltip("pass:N"), alt.Tooltip("text:N", title="work")],
        )
    )
    labels = (
        alt.Chart(ends)
        .mark_text(align="left", dx=6, color="gray", fontSize=12)
        .encode(x=alt.X("flops:Q", scale=x, axis=None), y=y, text="text:N")
    )
    said = "; ".join(f"{row.module} {row.text}" for row in ends.itertuples())
    chart = (bars + labels).properties(height=38 * len(ends) + 40).configure_view(stroke=None)
    return chart, f"FLOPs of matrix products of one micro-batch: {said}."


def _colour(shown: Sequence[str] = ()) -> alt.Color:
    """Each category's colour, and a legend of those `shown`."""
    legend = alt.Legend(values=list(shown), orient="bottom", title=None, columns=3, symbolType="square", labelLimit=140)
    domain = [*CATEGORIES, RESERVE]
    return alt.Color("what:N", scale=alt.Scale(domain=domain), sort=domain, legend=legend if shown else None)
