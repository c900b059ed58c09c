"""The schedule of a pipeline as a chart: every move of every stage in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app_pages.vega import Drawing, chart, layer, tooltip
from estimator.show.formatting import duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from app_pages.vega import Spec
    from estimator.timing.pipeline import Bar

SHOWN = 1200  # moves: more are thinner than a pixel
KINDS = {"F": ("forward", "#2468b8"), "B": ("backward", "#8f5f00"), "u": ("update", "#12745a")}


def gantt(bars: Sequence[Bar]) -> Drawing:
    """Stages from the top down, time to the right; of long steps the beginning."""
    first = sorted(bars, key=lambda bar: bar.start)[:SHOWN]
    rows = [
        {
            "stage": bar.stage + 1, "start": 1e3 * bar.start, "end": 1e3 * bar.end, "kind": KINDS[bar.move[0]][0],
            "what": f"{KINDS[bar.move[0]][0]} {bar.move[1:] if bar.move[0] in 'FB' else ''}",
            "text": duration(bar.end - bar.start),
        }
        for bar in first
    ]  # fmt: skip
    stages = max(bar.stage for bar in bars) + 1
    x: Spec = {"field": "start", "type": "quantitative", "title": "milliseconds", "axis": {"grid": False}}
    y: Spec = {"field": "stage", "type": "ordinal", "title": "stage"}
    colour = {
        "field": "kind",
        "type": "nominal",
        "scale": {"domain": [name for name, _ in KINDS.values()], "range": [colour for _, colour in KINDS.values()]},
        "legend": {"orient": "bottom", "title": None},
    }
    tips = tooltip(stage="Stage", what="Move", text="Takes")
    mark = layer("bar", rows, x=x, x2={"field": "end"}, y=y, color=colour, tooltip=tips)
    mark["mark"] |= {"height": {"band": 0.8}, "stroke": "white", "strokeWidth": 0.3}
    end = max(bar.end for bar in bars)
    busy = sum(bar.end - bar.start for bar in bars) / (stages * end)
    part = "" if len(first) == len(bars) else f" The first {len(first):,} of {len(bars):,} moves are drawn."
    text = f"A step of {stages} stages takes {duration(end)}, of which a stage works {busy:.0%} on average.{part}"
    return Drawing(chart([mark], height={"step": max(14, min(34, 400 // stages))}), text)
