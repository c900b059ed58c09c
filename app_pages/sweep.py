"""One or two sizes over a range: where it fits, how long it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from app_pages.estimate import answer, heading
from app_pages.labels import label
from estimator.config import ConfigError
from estimator.formatting import BYTE_UNITS, size
from estimator.sweeps import LETTERS, spaced, sweep

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.estimates import Estimate

METRICS = {"needed": "Memory needed", "seconds": "Seconds a step", "flops": "FLOPs a micro-batch"}
RANGES = {"batch_size": 64, "seq_len": 0, "num_layers": 96, "d_ff": 20_000, "vocab_size": 300_000}  # 0: the context
LINE, PLANE = 200, 50  # points on a line and on each side of a plane: what a chart can show
MOST = 1_000_000


def show(s: Setup) -> None:
    """Draw the page."""
    r = answer(s)
    if r is None:
        return
    st.header(f"Sweep: {heading(s, r)}")
    with st.container(horizontal=True):
        names = tuple(LETTERS)
        x = st.selectbox("Along", names, key="x", bind="query-params", width=180)
        y = st.selectbox(
            "and",
            names,
            index=None,
            key="y",
            bind="query-params",
            width=180,
            placeholder="nothing else",
        )
        metric = st.selectbox("Show", tuple(METRICS), key="show", bind="query-params", width=200)
        logarithmic = st.toggle("Logarithmic", key="log", bind="query-params")
    chosen = [x] if y in (None, x) else [x, y]
    points = LINE if len(chosen) == 1 else PLANE
    try:
        axes = {name: _range(s, name, points, logarithmic=logarithmic) for name in chosen}
        found = sweep(s.request, axes)
    except ConfigError as error:
        st.error(str(error), icon=":material/error:")
        return
    if metric not in found:
        st.info("Without an MFU there is no time.")
        return
    frame = _frame(axes, found, r)
    shown, title = _unit(metric, frame, s.unit)
    frame["shown"] = shown
    draw = _line if len(chosen) == 1 else _plane
    text = f"{METRICS[metric]} over {' and '.join(label(name) for name in chosen)}: {len(frame):,} configurations, of "
    text += f"which {int(frame['fits'].sum()):,} fit."
    st.altair_chart(draw(frame, chosen, metric, title, r, s.unit), width="stretch", alt=text)
    st.caption(f"{text} The allocator's rounding is taken at the sidebar's sizes; it hardly varies.")
    data = frame.drop(columns="shown").to_csv(index=False)
    st.download_button("CSV", data, f"sweep-{'-'.join(chosen)}.csv", "text/csv", on_click="ignore")


def _range(s: Setup, name: str, points: int, *, logarithmic: bool) -> np.ndarray[Any, np.dtype[np.int64]]:
    top = RANGES[name] or s.request.model.context_length
    with st.container(horizontal=True):
        least = st.number_input(f"{label(name)} from", 1, MOST, 1, key=f"{name}.from", bind="query-params", width=180)
        most = st.number_input("to", 1, MOST, top, key=f"{name}.to", bind="query-params", width=180)
    return spaced(least, most, points, logarithmic=logarithmic)


def _frame(axes: dict[str, Any], found: dict[str, Any], r: Estimate) -> pd.DataFrame:
    grid = np.meshgrid(*axes.values(), indexing="ij")
    frame = pd.DataFrame({name: values.ravel() for name, values in zip(axes, grid, strict=True)})
    for name, values in found.items():
        frame[name] = values.ravel()
    frame["fits"] = frame["needed"] <= (r.memory.capacity or 0)
    return frame


def _unit(metric: str, frame: pd.DataFrame, unit: str) -> tuple[Any, str]:
    if metric == "needed":
        return frame["needed"] / BYTE_UNITS[unit], f"memory needed, {unit}"
    return frame[metric], METRICS[metric].lower()


def _line(frame: pd.DataFrame, chosen: list[str], metric: str, title: str, r: Estimate, unit: str) -> Any:
    x = alt.X(f"{chosen[0]}:Q", title=label(chosen[0]).lower(), axis=alt.Axis(grid=False))
    line = (
        alt.Chart(frame)
        .mark_line(strokeWidth=2.5)
        .encode(x=x, y=alt.Y("shown:Q", title=title), tooltip=[f"{chosen[0]}:Q", alt.Tooltip("shown:Q", title=title)])
    )
    layers: list[Any] = [line]
    too_much = frame[~frame["fits"]]
    if len(too_much):
        layers.append(line.transform_filter("!datum.fits").mark_line(strokeWidth=4, color="#e34948"))
    if metric == "needed":
        capacity = (r.memory.capacity or 0) / BYTE_UNITS[unit]
        rule = alt.Chart(pd.DataFrame({"y": [capacity], "said": [f"capacity {size(r.memory.capacity or 0, unit)}"]}))
        layers.append(rule.mark_rule(strokeDash=[5, 3], color="gray").encode(y="y:Q"))
        name = rule.mark_text(align="left", dx=4, dy=-7, color="gray").encode(y="y:Q", x=alt.value(0), text="said:N")
        layers.append(name)
    return alt.layer(*layers).properties(height=420)


def _plane(frame: pd.DataFrame, chosen: list[str], metric: str, title: str, r: Estimate, unit: str) -> Any:
    del metric, r, unit  # a plane shows the capacity by its crosses
    axis = alt.Axis(labelOverlap=True, ticks=False)
    x = alt.X(f"{chosen[0]}:O", title=label(chosen[0]).lower(), axis=axis)
    y = alt.Y(f"{chosen[1]}:O", title=label(chosen[1]).lower(), sort="descending", axis=axis)
    heat = (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=x,
            y=y,
            color=alt.Color("shown:Q", title=title, scale=alt.Scale(type="log"), legend=alt.Legend(orient="top")),
            tooltip=[*chosen, alt.Tooltip("shown:Q", title=title), "fits:N"],
        )
    )
    hatch = (
        alt.Chart(frame)
        .transform_filter("!datum.fits")
        .mark_text(text="/", color="black", opacity=0.55, fontSize=11)
        .encode(x=x, y=y, tooltip=alt.value(None))
    )
    return alt.layer(heat, hatch).properties(height=480)
