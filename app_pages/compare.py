"""Up to four configurations side by side: the sidebar's, and others that differ from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from app_pages import charts
from app_pages.compute import largest_batch
from app_pages.estimate import answer
from app_pages.inputs import HIDDEN, supported
from app_pages.labels import explained, label
from app_pages.model_input import LIMIT, called
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.describe.presets import preset, presets
from estimator.describe.settings import choices
from estimator.pricing.money import cost
from estimator.show.formatting import dollars, duration, figures, hours, prefixed, size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from app_pages.inputs import Setup
    from estimator.answers.estimates import Estimate
    from estimator.answers.request import Request

OTHERS = ("B", "C", "D")
OTHER_GPU = "h100-80gb-sxm"  # what B is on until it is said otherwise: two equal columns compare nothing
SHOWN = ("precision", "attention", "checkpointing", "optimizer")  # the rest is under "More"
AS_IN_A = "as in A"


def show(s: Setup) -> None:
    """Draw the page."""
    if answer(s) is None:
        return
    st.header("Compare")
    number = st.segmented_control(
        "Configurations",
        (2, 3, 4),
        default=2,
        required=True,
        key="columns",
        bind="query-params",
        help="How many are side by side. A is what the sidebar says; the others are A with some changes.",
    )
    names = ("A", *OTHERS[: (number or 2) - 1])  # an empty parameter in the link clears the choice
    requests: dict[str, Request] = {}
    for name, column in zip(names, st.columns(len(names)), strict=True):
        with column:
            request = _own(s.request) if name == "A" else _other(name, s.request)
            if request is not None:
                requests[name] = request
    below = st.container()
    answers: dict[str, Estimate] = {}
    for name, request in requests.items():
        try:
            answers[name] = request.estimate()
        except ConfigError as error:
            below.error(f"{name}: {error}", icon=":material/error:")
    charts.draw(charts.memory_bars({name: r.memory for name, r in answers.items()}, s.unit))
    frame = pd.DataFrame({name: _figures(s, requests[name], r) for name, r in answers.items()}).fillna("—")
    st.table(frame.style.apply(_differences, axis=1))
    st.caption("Highlighted is what differs from A.")
    if len(requests) > 1:
        with st.expander("Commands"):
            for name, request in requests.items():
                st.code(f"{request.command()}  # {name}", language="sh", wrap_lines=True)


def _more() -> tuple[str, ...]:
    """The other fields of a plan that are one of a few names."""
    return tuple(field for field in choices(Plan) if field not in SHOWN + HIDDEN)


def _own(q: Request) -> Request:
    """A: the sidebar's, in boxes like the others', which cannot be changed here."""
    st.markdown("**A**, the sidebar's")

    def fixed(field: str, value: str) -> None:
        st.selectbox(label(field), (value,), disabled=True, key=f"A.{field}", help="Set in the sidebar.")

    fixed("model", called(q.name))
    fixed("gpu", q.gpu)
    fixed("batch_size", f"{q.plan.batch_size:,}")
    for field in SHOWN:
        fixed(field, str(getattr(q.plan, field)))
    with st.expander("More of the recipe"):
        for field in _more():
            fixed(field, str(getattr(q.plan, field)))
    return q


def _other(name: str, base: Request) -> Request | None:
    """The configuration `name`, as its inputs change `base`; None, with the reason drawn, if it cannot be."""

    def pick(field: str, options: tuple[str, ...], index: int | None = None) -> str | None:
        chosen: str | None = st.selectbox(
            label(field),
            options,
            index=index,
            key=f"{name}.{field}",
            bind="query-params",
            placeholder=AS_IN_A,
            help=explained(field, f"Empty is as in A. {label(field)} of this column."),
        )
        return chosen

    st.markdown(f"**{name}**, A but for")
    model = pick("model", presets())
    gpu = pick("gpu", supported(), supported().index(OTHER_GPU) if name == "B" else None)
    wanted: dict[str, Any] = {
        "batch_size": st.number_input(
            label("batch_size"),
            1,
            LIMIT,
            None,
            key=f"{name}.batch_size",
            bind="query-params",
            placeholder=AS_IN_A,
            help=explained("batch_size"),
        )
    }
    wanted |= {field: pick(field, choices(Plan)[field]) for field in SHOWN}
    with st.expander("More of the recipe"):
        wanted |= {field: pick(field, choices(Plan)[field]) for field in _more()}
    wanted = {field: value for field, value in wanted.items() if value is not None}
    if wanted.get("optimizer", base.plan.optimizer) != base.plan.optimizer:  # which may have other implementations
        wanted.setdefault("optimizer_impl", Plan().optimizer_impl)
    try:
        plan = base.plan.replace(**wanted)
    except ConfigError as error:
        st.error(str(error), icon=":material/error:")
        return None
    q = replace(base, plan=plan, gpu=gpu or base.gpu)
    return q if model is None else replace(q, name=model, model=preset(model))


def _figures(s: Setup, q: Request, r: Estimate) -> Mapping[str, str]:
    p, t = q.plan, r.time
    found = {
        "model": called(q.name),
        "accelerator": r.accelerator.name,
        "micro-batch": f"{p.batch_size:,} x {p.tokens(q.model):,} tokens",
        **{label(field).lower(): str(getattr(p, field)) for field in (*SHOWN, *_more())},
        "parameters": f"{r.values.parameters:,}",
        "trained": f"{r.values.trained_parameters:,}",
        "memory needed": size(r.memory.needed, s.unit),
        "capacity": size(r.memory.capacity or 0, s.unit),
        "fits": "yes" if r.fits else "no",
        "largest micro-batch": f"{largest_batch(r.model, r.plan, q.gpu, q.global_batch_size):,}",
        "FLOPs of a step": prefixed(r.flops.step, "FLOP"),
    }
    if t is not None:
        spent = cost(q.gpu, t.seconds, q.count, price=s.price)
        found |= {
            "time of a step": duration(t.seconds_per_step),
            "tokens a second": figures(t.tokens_per_second),
            "MFU": f"{t.mfu:.1%}",
            "training time": hours(t.seconds),
        }
        if spent.dollars is not None:
            found["cost"] = dollars(spent.dollars.median)
        if spent.kilowatt_hours is not None:
            found["energy"] = prefixed(spent.kilowatt_hours * 1e3, "Wh")
    return found


def _differences(row: pd.Series[str]) -> list[str]:
    return ["font-weight: 600; background-color: rgba(237, 161, 0, 0.2)" if x != row.iloc[0] else "" for x in row]
