"""The first page: does it fit, how long does it take, what does it cost, and where does each figure come from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from app_pages import charts
from app_pages.compute import cost_of, estimate_of, largest_batch
from estimator import derivations
from estimator.config import ConfigError
from estimator.formatting import dollars, duration, figures, hours, in_unit, prefixed, size, verdict

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.derivations import Derivation
    from estimator.estimates import Estimate


def show(s: Setup) -> None:
    """Draw the page."""
    for problem in s.problems:
        st.warning(f"Shown without that input: {problem}", icon=":material/error:")
    try:
        r = estimate_of(s)
    except ConfigError as error:
        st.error(str(error), icon=":material/error:")
        return
    _verdict(s, r)
    _headline(s, r)
    left, right = st.columns([3, 2], gap="large")
    with left:
        _timeline(s, r)
    with right:
        _memory(s, r)
    _flops(r)
    _derivations(s, r)


def _verdict(s: Setup, r: Estimate) -> None:
    many = f"{s.count:,} x " if s.count > 1 else ""
    st.header(f"{s.name} on {many}{r.accelerator.name}")
    text = verdict(r, s.unit)
    (st.success if r.fits else st.error)(text, icon=":material/check_circle:" if r.fits else ":material/block:")


def _headline(s: Setup, r: Estimate) -> None:
    batch = largest_batch(s.model, s.plan, s.gpu)
    assert r.memory.capacity is not None
    with st.container(horizontal=True, gap="large"):
        st.metric(
            "Memory needed",
            size(r.memory.needed, s.unit),
            f"of {size(r.memory.capacity, s.unit)}",
            delta_color="off",
            delta_arrow="off",
            help="Live tensors at the peak, the allocator's rounding, the cuBLAS workspace and the CUDA context.",
        )
        st.metric(
            "Largest micro-batch",
            f"{batch:,}",
            f"of {s.plan.tokens(s.model):,} tokens",
            delta_color="off",
            delta_arrow="off",
            help="The largest micro-batch whose step fits, all else equal.",
        )
        if r.time is None:
            st.metric("Training time", "—", "give an MFU", delta_color="off", delta_arrow="off")
        else:
            spent = cost_of(s, r.time.seconds)
            st.metric(
                "Training time",
                hours(r.time.seconds),
                f"{duration(r.time.seconds)} for {s.steps:,} steps",
                delta_color="off",
                delta_arrow="off",
                help=f"{s.steps:,} steps of {s.global_batch_size:,} sequences at {r.time.mfu:.4g} MFU.",
            )
            st.metric(
                "Throughput",
                f"{figures(r.time.tokens_per_second)} tok/s",
                f"{duration(r.time.seconds_per_step)} a step",
                delta_color="off",
                delta_arrow="off",
            )
            if spent.dollars is not None:
                spread = f"{dollars(spent.dollars.low)} to {dollars(spent.dollars.high)}"
                st.metric(
                    "Cost",
                    dollars(spent.dollars.median),
                    spread if len(spent.prices) > 1 else f"{figures(spent.accelerator_hours)} GPU hours",
                    delta_color="off",
                    delta_arrow="off",
                    help="The middle, and the cheapest and dearest, of the on-demand prices on file, or your own price.",
                )
            if spent.kilowatt_hours is not None:
                st.metric(
                    "Energy",
                    prefixed(spent.kilowatt_hours * 1e3, "Wh"),
                    f"{figures((spent.co2_kg or 0) / 1e3)} t CO2",
                    delta_color="off",
                    delta_arrow="off",
                    help="\n\n".join(spent.assumptions),
                )


def _memory(s: Setup, r: Estimate) -> None:
    st.subheader("Memory at the peak")
    chart, text = charts.memory_bar(r.memory, s.unit)
    st.altair_chart(chart, width="stretch", alt=text)
    frame = charts.memory_frame(r.memory, s.unit)
    total = {"what": "needed", "number": in_unit(r.memory.needed, s.unit), "share": 1.0}
    table = pd.concat([frame[["what", "number", "share"]], pd.DataFrame([total])], ignore_index=True)
    st.dataframe(
        table,
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


def _derivations(s: Setup, r: Estimate) -> None:
    st.subheader("Where the figures come from")
    for d in derivations.headline(r, s.count):
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
    st.latex(d.latex)
    st.latex(rf"= {d.substituted}")
    exact = f"{d.result:,}" if isinstance(d.result, int) else f"{d.result:,.1f}"
    st.markdown(f"= **{exact}** {d.unit}" + (f" = {result(d, unit)}" if d.unit in ("bytes", "FLOPs") else ""))
    st.caption(d.source[0].upper() + d.source[1:] + ".")
