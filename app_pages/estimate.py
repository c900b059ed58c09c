"""The first page: does it fit, how long does it take, what does it cost, and what would take less."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from app_pages import charts, modules, scenarios, sure, vega
from app_pages.compute import changes, cost_of, costs_between, largest_batch
from app_pages.inputs import HIDDEN
from app_pages.labels import label, plain
from app_pages.model_input import REFUSED, called, forget
from estimator.answers import derivations
from estimator.answers.advice import GOALS, NOTICEABLE
from estimator.describe.checks import ConfigError
from estimator.show.formatting import (
    STRATEGIES,
    between,
    count,
    dollars,
    duration,
    figures,
    hours,
    in_unit,
    prefixed,
    short_dollars,
    size,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamlit.delta_generator import DeltaGenerator

    from app_pages.compute import Advice
    from app_pages.inputs import Setup
    from estimator.answers.derivations import Derivation
    from estimator.answers.estimates import Estimate
    from estimator.timing.speed import Time

SHOWN = 6  # changes of the recipe; the others are a click away
BATCH = "batch_size"


def show(s: Setup) -> None:
    """Draw the page."""
    r = answer(s)
    if r is None:
        return
    scenarios.buttons()
    st.header(heading(s, r))
    said = st.empty()
    _verdict(said, s, r)
    _headline(s, r)
    _deadline(r)
    first = st.container()
    left, right = st.columns([3, 2], gap="medium")
    with left:
        _timeline(s, r)
    with right:
        _memory(s, r)
    _work(r)
    modules.show(s, r)
    last = st.container()
    sure.show(s, r)
    with last if r.fits else first:  # drawn last: it takes an account of every other recipe
        found = _advice(s, r)
    if not r.fits:
        _verdict(said, s, r, found)


def answer(s: Setup) -> Estimate | None:
    """The estimate of what the sidebar says; None, with the reason drawn, if there is none."""
    if REFUSED in st.session_state:
        name = called(s.request.name)
        st.error(
            plain(f"The configuration was refused: {st.session_state[REFUSED]} No figures are shown for it."),
            icon=":material/error:",
        )
        st.button(f"Go on with {name}", on_click=forget, key="go on")
        return None
    if s.problems:
        st.warning(
            plain(f"Shown without the inputs that cannot be: {' '.join(f'{x}.' for x in s.problems)}"),
            icon=":material/warning:",
        )
    try:
        return s.request.estimate()
    except ConfigError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return None


def heading(s: Setup, r: Estimate) -> str:
    """The model and the machine."""
    many = f"{s.request.count:,} x " if s.request.count > 1 else ""
    return f"{called(s.request.name)} on {many}{r.accelerator.name}"


def _verdict(at: DeltaGenerator, s: Setup, r: Estimate, found: Sequence[Advice] = ()) -> None:
    """Whether it fits, where the peak is, and what would fit."""
    largest = _largest(s, r)
    same = [c for c in found if c.fits and not c.alters and not c.machine and BATCH not in c.fields]
    other = f"{_named(same[0])}" if same else ""
    if r.fits:
        remedy = f"A micro-batch of up to {largest:,} fits."
    elif largest:
        remedy = f"A micro-batch of {largest:,} fits" + (f"; so does this one with {other}." if other else ".")
    else:
        remedy = "Not even a micro-batch of 1 fits" + (f"; {other} would." if other else ".")
    draw, icon = (at.success, ":material/check_circle:") if r.fits else (at.error, ":material/block:")
    draw(f"{verdict(r, s.unit)} {remedy}", icon=icon)


def _headline(s: Setup, r: Estimate) -> None:
    q = s.request
    batch = _largest(s, r)
    outside = r.memory.context, r.memory.nccl
    spread = sum(most - least for least, most in outside) / 2
    with st.grid(5, min_column_width=140, gap="small"):
        _metric(
            "Memory needed",
            size(r.memory.needed, s.unit),
            f"of {size(r.memory.capacity or 0, s.unit)}",
            "Live tensors at the peak, the allocator's rounding, the cuBLAS workspace, the CUDA context and NCCL's "
            f"buffers, of which only the last two are uncertain: by {size(spread, s.unit)} either way.",
        )
        _metric(
            "Max micro-batch",
            f"{batch:,}",
            f"of {q.plan.tokens(q.model):,} tokens",
            "The largest micro-batch whose step fits, all else equal.",
        )
        if r.time is None:
            _metric("Training time", "—", "cannot be predicted", " ".join(r.notes))
        else:
            # Of a step that cannot run nobody pays: what it would be is there, in grey.
            _time(r.time, fits=r.fits)
            _costs(s, fits=r.fits)
    if r.time is None:
        st.caption(" ".join(r.notes))
        return
    t = r.time
    each = f" ({figures(t.tokens_per_second_per_accelerator)} each)" if t.count > 1 else ""
    text = f", of text {figures(t.text_tokens_per_second)}" if t.padding else ""
    turns = r.plan.grad_accumulation
    of = f"{turns:,} micro-batches of {r.plan.batch_size:,}" if turns > 1 else f"1 micro-batch of {r.plan.batch_size:,}"
    tokens = (t.steps or 1) * r.flops.sequences * r.plan.tokens(r.model)
    st.caption(
        f"{count(tokens)} tokens in {t.steps or 1:,} steps of {r.flops.sequences:,} sequences "
        f"({of} on each accelerator). {duration(t.seconds_per_step)} a step, {figures(t.tokens_per_second)} tokens/s"
        f"{each}{text}, {prefixed(r.flops.step, 'FLOP')} a step; MFU {'predicted' if t.predicted else 'given'} as "
        f"{t.mfu:.1%} of {prefixed(t.peak_flops, 'FLOP/s')}. {sure.thin(r)}{' '.join(r.notes)}"
    )


def _largest(s: Setup, r: Estimate) -> int:
    return largest_batch(r.model, r.plan, s.request.gpu, s.request.global_batch_size)


def _deadline(r: Estimate) -> None:
    """Whether the run is done in time, and if not, how many accelerators at the same speed each would be."""
    days = st.session_state.get("deadline")
    if not days or r.time is None:
        return
    over = r.time.days / days
    if over <= 1:
        st.caption(f":material/event_available: Done in {duration(r.time.seconds)}, within the {days:g} days.")
        return
    more = -(-r.time.count * over // 1)
    st.warning(
        f"It takes {duration(r.time.seconds)}, {over:.1f} times the {days:g} days that there are: about {more:,.0f} "
        "accelerators would make it, if each stays as fast. The page Plan has all that do.",
        icon=":material/event_busy:",
    )


def _time(t: Time, *, fits: bool) -> None:
    """The run's time, between its likely ends."""
    steps = f"{t.steps or 1:,} steps"
    if t.interval is None:
        said = f"{steps} at the MFU that was given."
        _metric("Training time", hours(t.seconds), duration(t.seconds), said, fits=fits)
        return
    low, high = t.interval.low, t.interval.high
    said = f"{steps}, predicted from the kernels. {t.origin} Nine published runs of ten lie in the interval. {t.rows}"
    _metric("Training time", hours(t.seconds), between(duration(low), duration(high)), said, fits=fits)


def _costs(s: Setup, *, fits: bool) -> None:
    spent, ends = cost_of(s), costs_between(s)
    if spent is None or ends is None:
        return
    low, high = ends
    if spent.dollars is None or low.dollars is None or high.dollars is None:
        _metric("Cost", "—", "give a price", spent.missing[0], fits=fits)
    else:
        _metric(
            "Cost",
            dollars(spent.dollars.median),
            between(short_dollars(low.dollars.low), short_dollars(high.dollars.high)),
            "The median of the on-demand prices on file, or your own price, of "
            f"{figures(spent.accelerator_hours)} accelerator-hours; between the cheapest price of the shortest likely "
            "run and the dearest of the longest.",
            fits=fits,
        )
    if spent.kilowatt_hours is None or low.kilowatt_hours is None or high.kilowatt_hours is None:
        _metric("Energy", "—", "no power on file", spent.missing[-1], fits=fits)
    else:
        ends_ = (prefixed(x * 1e3, "Wh") for x in (low.kilowatt_hours, high.kilowatt_hours))
        emitted = f"{figures((spent.co2_kg or 0) / 1e3)} t CO2. "
        said = emitted + "\n\n".join(spent.assumptions)
        _metric("Energy", prefixed(spent.kilowatt_hours * 1e3, "Wh"), between(*ends_), said, fits=fits)


def _metric(name: str, value: str, under: str, said: str, *, fits: bool = True) -> None:
    """A figure; in grey, with the reason, where it is of a step that does not fit."""
    if not fits:
        under, said = "if it fitted", f"The step does not fit, so that it cannot run: {said}"
    with st.container(key=f"{'' if fits else 'unfit-'}metric-{name.lower().replace(' ', '-')}"):
        st.metric(name, value, under, delta_color="off", delta_arrow="off", help=said)


def _memory(s: Setup, r: Estimate) -> None:
    st.subheader("Memory at the peak")
    vega.draw(charts.memory_bars({"": r.memory}, s.unit))
    parts = charts.memory_parts(r.memory) | {"needed": r.memory.needed}
    rows = [(what, in_unit(held, s.unit), held / r.memory.needed) for what, held in parts.items()]
    frame = pd.DataFrame(rows, columns=["what", "number", "share"])
    st.dataframe(
        frame,
        hide_index=True,
        height="content",
        column_config={
            "what": st.column_config.TextColumn("what"),
            "number": st.column_config.NumberColumn(s.unit, format="%.3f"),
            "share": st.column_config.NumberColumn("share", format="percent"),
        },
    )
    if r.account.device == "cuda":
        least, most = (size(x, s.unit) for x in r.memory.nvidia_smi)
        st.caption(
            f"PyTorch's allocator reserves {size(r.memory.reserved, s.unit)} of the device after two steps; nvidia-smi "
            f"shows {between(least, most)}. It gives back what it does not use before it gives up. "
            + " ".join(r.memory_notes)
        )


def _timeline(s: Setup, r: Estimate) -> None:
    st.subheader("One step, allocation by allocation")
    drawing = charts.timeline_chart(r, s.unit)
    vega.draw(drawing)
    st.caption(drawing.text)
    with st.expander("The peak's formula"):
        derivation(derivations.peak(r), s.unit)


def _work(r: Estimate) -> None:
    passes = {}
    for name, form in r.values.modules.items():
        again = form.recompute_flops
        passes[name] = {"forward": form.forward_flops, "backward": form.backward_flops - again, "recomputed": again}
    parts = r.time.parts if r.time is not None else {}
    left, right = st.columns([3, 2], gap="medium") if parts else (st.container(), None)
    with left:
        st.subheader("Work by module")
        title = "FLOPs of the matrix products of one micro-batch, by module"
        vega.draw(charts.icicle("one micro-batch", passes, lambda x: prefixed(x, "FLOP"), title))
    if right is not None and r.time is not None:
        with right:
            st.subheader("Time of a step")
            spent = sorted(parts.items(), key=lambda part: -part[1])
            total = sum(parts.values())
            rows = [
                (name, seconds, f"{duration(seconds)}, {seconds / total:.0%}") for name, seconds in spent if seconds
            ]
            vega.draw(charts.bars(rows, "Time of a step, by part"))


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


def _advice(s: Setup, r: Estimate) -> tuple[Advice, ...]:
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("What would be better" if r.fits else "What would make it fit", width="stretch")
        goal = st.segmented_control(
            "Optimise for",
            tuple(GOALS),
            default="memory",
            required=True,
            key="goal",
            bind="query-params",
            help="What comes first: the least memory, the shortest time, the largest micro-batch or the least money.",
        )
    waiting = st.empty()
    tell = partial(_progress, waiting)
    tell(0.0)
    found = changes(s.request, goal or "memory", tell)  # drawing stops here where an input has changed
    waiting.empty()
    if not found:
        st.caption(f"Nothing of up to four changes is better for {goal}.")
        return found
    now = cost_of(s)
    paid = None if now is None or now.dollars is None else now.dollars.median
    for change in found[:SHOWN]:
        _change(s, r, change, paid)
    if found[SHOWN:]:
        with st.expander(f"{len(found) - SHOWN} more"):
            for change in found[SHOWN:]:
                _change(s, r, change, paid)
    if any(change.alters for change in found):
        st.caption(":material/science: also changes what is learned; all others compute the same step another way.")
    return found


def _progress(at: DeltaGenerator, done: float) -> None:
    at.progress(min(1.0, done), "computing the changes")


def _change(s: Setup, r: Estimate, change: Advice, paid: float | None) -> None:
    name = _named(change)
    mark = ":green[:material/check:]" if change.fits else ":red[:material/close:]"
    less = "as now"
    if abs(change.saves) > NOTICEABLE * change.needed:
        less = f"{size(abs(change.saves), s.unit)} {'less' if change.saves > 0 else 'more'}"
    parts = [f"{size(change.needed, s.unit)} ({less})", _price(change)]
    if paid is not None and change.dollars is not None:
        parts.append(f"{short_dollars(paid)} → {short_dollars(paid * change.dollars)}".replace("$", "\\$"))
    parts.append(f"largest micro-batch {_largest(s, r):,} → {change.largest:,}")
    alters = " :material/science:" if change.alters else ""
    left, right = st.columns([7, 1], vertical_alignment="center")
    left.markdown(f"{mark} **{name}**{alters} — needs {', '.join(parts)}")
    right.button(
        "Apply", key=f"take {name}", on_click=_take, args=(change.machine, change.fields), help=f"Change: {name}"
    )


def _named(change: Advice) -> str:
    words = [f"{label(field).lower()} {_said(value)}" for field, value in change.fields.items() if field not in HIDDEN]
    machine = change.machine
    if "count" in machine:
        words.insert(0, f"{machine['count']:,} accelerators")
    if "gpu" in machine:
        words.insert(0, machine["gpu"])
    return ", ".join(words)


def _price(change: Advice) -> str:
    """What a change costs or saves: time, where time is predicted, and otherwise FLOPs."""
    what, ratio = ("work", change.work) if change.seconds is None else ("time", change.seconds)
    if abs(ratio - 1) < NOTICEABLE / 2:
        return f"same {what}"
    return f"{abs(ratio - 1):.1%} {'more' if ratio > 1 else 'less'} {what}"


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value) if value == "none" else STRATEGIES.get(str(value), str(value))


def _take(machine: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    for field, value in {**machine, **fields}.items():
        if field not in HIDDEN:
            st.session_state[field] = value
