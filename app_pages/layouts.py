"""How to lay a run out on so many accelerators: every layout that fits, and the schedule of the chosen one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from app_pages import scenarios, vega
from app_pages.compute import laid_out
from app_pages.gantt import gantt
from app_pages.keep import Own
from app_pages.labels import plain
from app_pages.plan import named_inputs
from estimator.answers.layouts import LAID_OUT, MEGATRON
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.describe.settings import settings
from estimator.hardware.accelerators import accelerator
from estimator.show.csv_file import csv_of
from estimator.show.formatting import dollars, duration, size
from estimator.show.layouts import BESIDE, command, layout
from estimator.timing.speed import Setup as RunSetup
from estimator.timing.stages import bars

if TYPE_CHECKING:
    from collections.abc import Mapping

    from app_pages.inputs import Setup
    from estimator.answers.found_layouts import Layouts, Option

CODES = {"PyTorch's own": LAID_OUT, "Megatron-LM's": MEGATRON}
SHOWN = 10
MOST = 16_384


def show(s: Setup) -> Own:
    """Draw the page; what there is to share of it."""
    st.header("Layouts: how to split a run over accelerators")
    st.markdown(
        "The model, the sequence and the accelerator are those of the sidebar. Tensor parallelism within a node, "
        "pipelines, data parallelism and its shardings, micro-batches and checkpointing are tried, in bf16 with fused "
        "attention; what fits is listed, the fastest first."
    )
    q = s.request
    with st.grid("auto", min_column_width=170, gap="small", vertical_alignment="bottom"):
        count = st.number_input(
            "Accelerators", 1, MOST, 16, key="layouts.count", bind="query-params", help="All of them work together."
        )
        sequences = st.number_input(
            "Global batch", 1, 10**6, 128, key="layouts.batch", bind="query-params", help="Sequences in a step."
        )
        code = st.selectbox(
            "Whose code", tuple(CODES), key="layouts.code", bind="query-params",
            help="PyTorch's own is exact in memory; Megatron-LM's is a model, in which all axes go together.",
        )  # fmt: skip
    plan = CODES[code].replace(seq_len=q.plan.seq_len)
    own = Own(command(q.name, q.model, plan, q.gpu, int(count), int(sequences), s.price))
    waiting = st.empty()
    with waiting, st.spinner("Every layout is tried; some seconds."):
        try:
            found = laid_out(q.model, plan, q.gpu, int(count), int(sequences), s.price)
        except ConfigError as error:
            st.error(plain(str(error)), icon=":material/error:")
            return own
    waiting.empty()
    if not found.options:
        least = f"The least number on which it does is {found.smallest:,}." if found.smallest else ""
        st.error(f"No layout fits on {count:,} x {q.gpu}. {least}", icon=":material/block:")
        _left_out(found)
        return own
    first = found.options[0]
    took = f"{duration(first.seconds)} a step, MFU {first.mfu:.0%}"
    least = f" The least number of accelerators on which it fits is {found.smallest:,}." if found.smallest else ""
    st.success(
        f"Fastest of {len(found.options):,} that fit: {said(first)}: {took}.{least}",
        icon=":material/check_circle:",
    )
    for o in found.options[:SHOWN]:
        _row(s, o, first, int(sequences))
    if found.options[SHOWN:]:
        with st.expander(f"{len(found.options) - SHOWN:,} more"):
            st.dataframe(found.to_frame(), hide_index=True)
    data = partial(csv_of, found.to_frame(), index=False)
    st.download_button("CSV of all", data, "layouts.csv", "text/csv", on_click="ignore")
    _schedule(s, found)
    star = ":orange[:material/star:]: no other layout is both faster and leaves more memory free."
    beside = f" {BESIDE}" if any(o.plan.sequence_parallel for o in found.options) else ""
    st.caption(f"{star} Network: {found.network}.{beside}")
    _left_out(found)
    return own


def said(o: Option) -> str:
    """A layout in words."""
    recomputed = "" if o.plan.checkpointing == "none" else f", checkpointing {o.plan.checkpointing}"
    return f"{layout(o)}, micro-batch {o.plan.batch_size} x {o.plan.grad_accumulation}{recomputed}"


def _row(s: Setup, o: Option, first: Option, sequences: int) -> None:
    star = ":orange[:material/star:] " if o.best else ""
    words = [f"{duration(o.seconds)} a step", f"MFU {o.mfu:.1%}"]
    words += [f"{size(o.needed, s.unit)}, {size(o.headroom, s.unit)} free"]
    if o.dollars is not None:
        words.append(f"{dollars(o.dollars)} for a billion tokens".replace("$", "\\$"))
    if behind := o.behind(first):
        words.append(f"behind by {behind}")
    left, right = st.columns([6, 1], vertical_alignment="center")
    left.markdown(f"{star}**{said(o)}**  \n{'; '.join(words)}")
    scenarios.link(right, inputs_of(s, o, sequences), said(o))


def inputs_of(s: Setup, o: Option, sequences: int) -> Mapping[str, Any]:
    """The sidebar's inputs that ask for a layout."""
    q = s.request
    found = named_inputs(q.name, q.model) | {"gpu": q.gpu, "count": o.plan.accelerators}
    found["global_batch_size"] = sequences
    for name, setting in settings(Plan).items():
        value = getattr(o.plan, name)
        if not setting.follows and value != setting.default:
            found[name] = value
    return found


def _schedule(s: Setup, found: Layouts) -> None:
    """The timeline of a pipeline among the layouts."""
    several = {said(o): o for o in found.options if o.plan.is_pipeline}
    if not several:
        return
    st.subheader("The pipeline's schedule")
    chosen = several[st.selectbox("Of", tuple(several), key="layouts.shown")]
    drawing = gantt(bars(s.request.model, chosen.plan, accelerator(s.request.gpu), RunSetup()))
    vega.draw(drawing)
    st.caption(drawing.text)


def _left_out(found: Layouts) -> None:
    if found.refused:
        with st.expander(f"{sum(found.refused.values()):,} are left out"):
            for why, many in sorted(found.refused.items(), key=lambda entry: -entry[1])[:20]:
                st.markdown(plain(f"- {many:,}: {why}"))
