"""One or two inputs over a range: where it fits, how long it takes, what it costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st

from app_pages import charts, vega
from app_pages.compute import cost_of, reachable, swept
from app_pages.estimate import answer, heading
from app_pages.labels import accept_names, label, plain
from estimator.answers.sweeps import AXES, RUN_AXES, python
from estimator.describe.checks import ConfigError
from estimator.describe.units import SECONDS_PER_HOUR
from estimator.show.csv_file import csv_of
from estimator.show.formatting import BYTE_UNITS, dollars, duration, figures, hours, in_unit, prefixed, size

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from app_pages.inputs import Setup
    from estimator.answers.estimates import Estimate

# What can be shown, and what each is called; a figure that a sweep does not have is not offered.
METRICS = {
    "needed": "Memory needed",
    "hours": "Hours of the run",
    "dollars": "Dollars of the run",
    "kilowatt_hours": "Energy of the run, kWh",
    "seconds": "Seconds a step",
    "tokens_per_second": "Tokens a second",
    "flops": "FLOPs a step",
}
NAMES = {name: label(name) for name in AXES}
LINE, PLANE = 200, 64  # points on a line and on each side of a plane: what a chart can show
MOST = 10_000_000


def show(s: Setup) -> None:
    """Draw the page."""
    r = answer(s)
    if r is None:
        return
    accept_names({"x": NAMES, "y": NAMES, "show": METRICS})
    st.header(f"Sweep: {heading(s, r)}")
    with st.grid("auto", min_column_width=150, gap="small", vertical_alignment="bottom"):
        x = st.selectbox("Along", AXES, format_func=label, key="x", bind="query-params", help="The input that varies.")
        y = st.selectbox(
            "and",
            AXES,
            index=None,
            format_func=label,
            key="y",
            bind="query-params",
            placeholder="nothing else",
            help="A second input that varies; the chart is then a map.",
        )
        metric = st.selectbox(
            "Show",
            tuple(METRICS),
            format_func=METRICS.__getitem__,
            key="show",
            bind="query-params",
            help="The figure of each point.",
        )
        logarithmic = st.toggle(
            "Logarithmic", key="log", bind="query-params", help="As many points in each octave of the range."
        )
    chosen = [x] if y in (None, x) else [x, y]
    points = LINE if len(chosen) == 1 else PLANE
    try:
        ranges = {name: (*_range(s, name), points, logarithmic) for name in chosen}
        axes, found = swept(s.request, tuple((name, *given) for name, given in ranges.items()), s.price)
    except ConfigError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    if metric not in found:
        spent = cost_of(s)
        why = " ".join(r.notes) if spent is None else "; ".join(spent.missing)
        st.info(f"{METRICS[metric]} cannot be had: {why}", icon=":material/info:")
        return
    fits = found["needed"] <= (r.memory.capacity or 0)
    text = (
        f"{METRICS[metric]} over {' and '.join(label(name).lower() for name in chosen)}: {fits.size:,} configurations, "
        f"of which {int(fits.sum()):,} fit."
    )
    draw = _line if len(chosen) == 1 else _plane
    vega.draw(vega.Drawing(draw(s, r, axes, found[metric], fits, metric, logarithmic=logarithmic), text))
    hatched = "" if fits.all() else " What does not fit is hatched."
    st.caption(f"{text}{hatched} The allocator's rounding is taken at the sidebar's sizes; it hardly varies.")
    grid = np.meshgrid(*axes.values(), indexing="ij")
    frame = pd.DataFrame({name: values.ravel() for name, values in zip(axes, grid, strict=True)})
    for name, values in found.items():
        frame[name] = values.ravel()
    frame["fits"] = fits.ravel()
    data = partial(csv_of, frame.assign(command=s.request.command()), index=False)
    st.download_button("CSV of the sweep", data, f"sweep-{'-'.join(chosen)}.csv", "text/csv", on_click="ignore")
    with st.expander("Python of the sweep"):
        st.code(python(s.request, ranges, s.price), language="python", wrap_lines=True)


def _range(s: Setup, name: str) -> tuple[int, int]:
    """Two inputs for the ends of an axis."""
    end = reachable(s.request, name)
    called = label(name)
    said = {"from": "Empty is 1.", "to": f"Empty is {end:,}: half as much again as the largest that fits."}
    if name in RUN_AXES:
        said["to"] = f"Empty is {end:,}: four times as many as in the sidebar."
    with st.container(horizontal=True):
        least, most = (
            st.number_input(
                f"{called} {word}",
                1,
                MOST,
                None,
                placeholder=f"{default:,}",
                key=f"{name}.{word}",
                bind="query-params",
                help=said[word],
                width=190,
            )
            for word, default in (("from", 1), ("to", end))
        )
    return least or 1, most or end


def _said(metric: str, unit: str) -> tuple[str, float, Callable[[float], str]]:
    """(the axis's title, what a figure is divided by, a figure as text)."""
    if metric == "needed":
        return f"memory needed, {unit}", BYTE_UNITS[unit], lambda x: size(x, unit)
    say: dict[str, Callable[[float], str]] = {
        "hours": lambda x: hours(x * SECONDS_PER_HOUR),
        "seconds": duration,
        "dollars": dollars,
        "flops": lambda x: prefixed(x, "FLOP"),
    }
    return METRICS[metric].lower(), 1, say.get(metric, figures)


def _line(
    s: Setup, r: Estimate, axes: dict[str, Any], shown: Any, fits: Any, metric: str, *, logarithmic: bool
) -> vega.Spec:
    title, by, say = _said(metric, s.unit)
    (name, values), *_ = axes.items()
    rows = [
        {"at": int(at), "shown": float(x) / by, "text": say(float(x)), "fits": bool(ok)}
        for at, x, ok in zip(values, shown, fits, strict=True)
    ]
    limit = None
    if metric == "needed":
        capacity = r.memory.capacity or 0
        limit = (in_unit(capacity, s.unit), f"capacity {size(capacity, s.unit)}")
    return charts.line(label(name).lower(), title, rows, logarithmic=logarithmic, limit=limit)


def _plane(
    s: Setup, _: Estimate, axes: dict[str, Any], shown: Any, fits: NDArray[np.bool_], metric: str, *, logarithmic: bool
) -> vega.Spec:
    title, by, say = _said(metric, s.unit)
    x, y = (charts.Axis(label(name), [int(v) for v in values], logarithmic) for name, values in axes.items())
    text = np.vectorize(say, otypes=[object])(shown)
    legend = {"title": title, "orient": "top", "gradientLength": 240, "format": "~s"}
    colour = {"type": "quantitative", "scale": {"type": "log", "nice": False}, "legend": legend}
    tips = {METRICS[metric]: text, "Fits": np.where(fits, "yes", "no")}
    return charts.cells(x, y, shown / by, colour, tips, hatched=~fits)
