"""The first page: does it fit, how long does it take, what does it cost, and where does each figure come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from app_pages import charts
from app_pages.compute import changes, cost_of, largest_batch
from app_pages.labels import label
from app_pages.model_input import called
from estimator import derivations
from estimator.config import ConfigError
from estimator.formatting import dollars, duration, figures, hours, in_unit, prefixed, short_dollars, size, verdict
from estimator.report import to_csv, to_json, to_markdown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from app_pages.inputs import Setup
    from estimator.advice import Change
    from estimator.derivations import Derivation
    from estimator.estimates import Estimate

SHOWN = 6  # changes of the recipe; the others are a click away


def show(s: Setup) -> None:
    """Draw the page."""
    r = answer(s)
    if r is None:
        return
    _verdict(s, r)
    _headline(s, r)
    first = st.container()
    left, right = st.columns([3, 2], gap="large")
    with left:
        _timeline(s, r)
    with right:
        _memory(s, r)
    _flops(r)
    second = st.container()
    _derivations(s, r)
    _keep(s)
    with second if r.fits else first:  # drawn last: it takes an account of every other recipe
        _advice(s, r)


def answer(s: Setup) -> Estimate | None:
    """The estimate of what the sidebar says; None, with the reason drawn, if there is none."""
    if s.problems:
        st.warning("Shown without the inputs that cannot be; the sidebar says why.", icon=":material/warning:")
    try:
        return s.request.estimate()
    except ConfigError as error:
        st.error(str(error), icon=":material/error:")
        return None


def heading(s: Setup, r: Estimate) -> str:
    """The model and the machine."""
    many = f"{s.request.count:,} x " if s.request.count > 1 else ""
    return f"{called(s.request.name)} on {many}{r.accelerator.name}"


def _verdict(s: Setup, r: Estimate) -> None:
    st.header(heading(s, r))
    box, icon = (st.success, ":material/check_circle:") if r.fits else (st.error, ":material/block:")
    box(verdict(r, s.unit), icon=icon)


def _headline(s: Setup, r: Estimate) -> None:
    q = s.request
    batch = largest_batch(q.model, q.plan, q.gpu)
    spread = (r.memory.context[1] - r.memory.context[0]) / 2
    with st.container(horizontal=True, gap="medium"):
        _metric(
            "Memory needed",
            size(r.memory.needed, s.unit),
            f"of {size(r.memory.capacity or 0, s.unit)}",
            "Live tensors at the peak, the allocator's rounding, the cuBLAS workspace and the CUDA context, "
            f"of which only the last is uncertain: by {size(spread, s.unit)} either way.",
        )
        _metric(
            "Largest micro-batch",
            f"{batch:,}",
            f"of {q.plan.tokens(q.model):,} tokens",
            "The largest micro-batch whose step fits, all else equal.",
        )
        if r.time is None:
            _metric("Training time", "—", "give an MFU", "Without an MFU there is no time.")
            return
        _metric(
            "Training time",
            hours(r.time.seconds),
            duration(r.time.seconds),
            f"{r.time.steps or 1:,} steps of {r.flops.sequences:,} sequences at {r.time.mfu:.4g} MFU.",
        )
        _metric(
            "Throughput",
            f"{figures(r.time.tokens_per_second)} tok/s",
            f"{duration(r.time.seconds_per_step)} a step",
            "Of the whole job.",
        )
        _costs(s)


def _costs(s: Setup) -> None:
    spent = cost_of(s)
    if spent is None:
        return
    if spent.dollars is not None:
        low, high = spent.dollars.low, spent.dollars.high
        _metric(
            "Cost",
            dollars(spent.dollars.median),
            f"{short_dollars(low)} to {short_dollars(high)}"
            if low < high
            else f"{figures(spent.accelerator_hours)} GPU hours",
            "The middle, and the cheapest and dearest, of the on-demand prices on file; or your own price.",
        )
    if spent.kilowatt_hours is not None:
        _metric(
            "Energy",
            prefixed(spent.kilowatt_hours * 1e3, "Wh"),
            f"{figures((spent.co2_kg or 0) / 1e3)} t CO2",
            "\n\n".join(spent.assumptions),
        )


def _metric(name: str, value: str, under: str, said: str) -> None:
    st.metric(name, value, under, delta_color="off", delta_arrow="off", help=said, width="content")


def _memory(s: Setup, r: Estimate) -> None:
    st.subheader("Memory at the peak")
    chart, text = charts.memory_bar(r.memory, s.unit)
    st.altair_chart(chart, width="stretch", alt=text)
    frame = charts.memory_frame(r.memory, s.unit)
    total = {"what": "needed", "number": in_unit(r.memory.needed, s.unit), "share": 1.0}
    st.dataframe(
        pd.concat([frame[["what", "number", "share"]], pd.DataFrame([total])], ignore_index=True),
        hide_index=True,
        column_config={
            "what": st.column_config.TextColumn(""),
            "number": st.column_config.NumberColumn(s.unit, format="%.3f"),
            "share": st.column_config.NumberColumn("share", format="percent"),
        },
    )


def _timeline(s: Setup, r: Estimate) -> None:
    st.subheader("One step, allocation by allocation")
    chart, text = charts.timeline_chart(r, s.unit)
    st.altair_chart(chart, width="stretch", alt=text)
    st.caption(text)


def _flops(r: Estimate) -> None:
    st.subheader("Work by module")
    chart, text = charts.flops_chart(r)
    st.altair_chart(chart, width="stretch", alt=text)
    with st.expander("The whole table by module"):
        st.dataframe(
            r.to_frame().astype(float), column_config={"_index": st.column_config.TextColumn("module")}
        )  # floats: Arrow's integers end at 2^63


def _derivations(s: Setup, r: Estimate) -> None:
    st.subheader("Where the figures come from")
    for d in derivations.headline(r, s.request.count):
        with st.expander(f"{d.title}: **{result(d, s.unit)}**"):
            derivation(d, s.unit)


def result(d: Derivation, unit: str) -> str:
    """The result of a derivation as text."""
    if d.unit == "bytes":
        return size(d.result, unit)
    if d.unit == "FLOPs":
        return prefixed(d.result, "FLOP")
    return f"{d.result:,.0f} {d.unit}".strip()


def derivation(d: Derivation, unit: str) -> None:
    """The formula, the formula with its numbers, the result and the source."""
    st.latex(d.aligned())
    exact = f"{d.result:,}" if isinstance(d.result, int) else f"{d.result:,.1f}"
    st.markdown(f"= **{exact}** {d.unit}" + (f" = {result(d, unit)}" if d.unit in ("bytes", "FLOPs") else ""))
    st.caption(d.source[0].upper() + d.source[1:] + ".")


def _advice(s: Setup, r: Estimate) -> None:
    st.subheader("What would take less" if r.fits else "What would make it fit")
    found = changes(s.request)
    if not found:
        st.caption("No single change of the recipe saves memory or work.")
        return
    for change in found[:SHOWN]:
        _change(s, change)
    if found[SHOWN:]:
        with st.expander(f"{len(found) - SHOWN} more"):
            for change in found[SHOWN:]:
                _change(s, change)


def _change(s: Setup, change: Change) -> None:
    name = ", ".join(f"{label(field).lower()} {_said(value)}" for field, value in change.fields.items())
    memory = change.estimate.memory
    what, needs, saves, costs, take = st.columns([4, 2, 2, 2, 1.5], vertical_alignment="center")
    mark = ":green[:material/check:]" if change.fits else ":red[:material/close:]"
    what.markdown(f"{mark} **{name}**")
    needs.markdown(f"needs {size(memory.needed, s.unit)}")
    saves.markdown(
        f"saves {size(change.saves, s.unit)}" if change.saves >= 0 else f"adds {size(-change.saves, s.unit)}"
    )
    costs.markdown(_price(change))
    take.button("Take it", key=f"take {name}", on_click=_take, args=(change.fields,), help=f"Change the recipe: {name}")


def _price(change: Change) -> str:
    """What a change costs: time, where time is predicted, and otherwise FLOPs."""
    more = change.work - 1
    if abs(more) < 0.0005:
        return "same work"
    return f"{abs(more):.1%} {'more' if more > 0 else 'less'} work"


def _said(value: object) -> str:
    return {True: "on", False: "off"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _take(fields: Mapping[str, Any]) -> None:
    for field, value in fields.items():
        st.session_state[field] = value


def _keep(s: Setup) -> None:
    st.subheader("Take it with you")
    q, spent = s.request, cost_of(s)
    with st.container(horizontal=True):
        name = f"estimate-{q.name}-{q.gpu}"
        st.download_button("JSON", to_json(q, spent), f"{name}.json", "application/json", on_click="ignore")
        st.download_button("CSV by module", to_csv(q), f"{name}.csv", "text/csv", on_click="ignore")
        report = to_markdown(q, spent, s.unit)
        st.download_button("Report (Markdown)", report, f"{name}.md", "text/markdown", on_click="ignore")
    st.code(q.command(), language="sh", wrap_lines=True)
    st.code(q.python(), language="python", wrap_lines=True)
