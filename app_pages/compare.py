"""Up to four configurations side by side: the sidebar's, and others that differ from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from app_pages.compute import largest_batch
from app_pages.estimate import answer
from app_pages.inputs import supported
from app_pages.labels import label
from estimator.advice import choices
from estimator.config import ConfigError, Plan
from estimator.costs import cost
from estimator.formatting import dollars, hours, prefixed, size
from estimator.presets import preset, presets
from estimator.report import Request

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.estimates import Estimate

OTHERS = ("B", "C", "D")
RECIPE = ("precision", "attention", "checkpointing", "optimizer")


def show(s: Setup) -> None:
    """Draw the page."""
    if answer(s) is None:
        return
    st.header("Compare")
    number = st.segmented_control(
        "Configurations", (2, 3, 4), default=2, required=True, key="columns", bind="query-params"
    )
    requests: dict[str, Request] = {"A": s.request}
    number = number or 2  # an empty parameter in the link clears the choice
    columns = st.columns(number)
    columns[0].markdown("**A** is the sidebar's.")
    for name, column in zip(OTHERS, columns[1:], strict=False):
        with column:
            st.markdown(f"**{name}** is A, but for:")
            other = _other(name, s.request)
            if other is not None:
                requests[name] = other
    table = {}
    for name, request in requests.items():
        try:
            table[name] = _figures(s, request, request.estimate())
        except ConfigError as error:
            st.error(f"{name}: {error}", icon=":material/error:")
    frame = pd.DataFrame(table)
    st.table(frame.style.apply(_differences, axis=1))
    st.caption("Highlighted is what differs from A.")


def _other(name: str, base: Request) -> Request | None:
    """The configuration `name`, as its inputs change `base`; None, with the reason drawn, if it cannot be."""

    def pick(field: str, options: tuple[str, ...]) -> str | None:
        chosen: str | None = st.selectbox(
            label(field),
            options,
            index=None,
            key=f"{name}.{field}",
            bind="query-params",
            placeholder="as in A",
        )
        return chosen

    model = pick("model", presets())
    gpu = pick("gpu", supported())
    batch = st.number_input(
        label("batch_size"), 1, 10_000_000, None, key=f"{name}.batch_size", bind="query-params", placeholder="as in A"
    )
    given: dict[str, Any] = {field: pick(field, choices()[field]) for field in RECIPE}
    given["batch_size"] = batch
    wanted = {field: value for field, value in given.items() if value is not None}
    if "optimizer" in wanted and wanted["optimizer"] != base.plan.optimizer:
        wanted["optimizer_impl"] = Plan().optimizer_impl  # another optimizer may not have the same implementations
    try:
        plan = base.plan.replace(**wanted)
    except ConfigError as error:
        st.error(str(error), icon=":material/error:")
        return None
    run = (base.count, base.mfu, base.steps, base.global_batch_size)
    return Request(model or base.name, preset(model) if model else base.model, plan, gpu or base.gpu, *run)


def _figures(s: Setup, q: Request, r: Estimate) -> dict[str, str]:
    found = {
        "model": q.name,
        "accelerator": r.accelerator.name,
        "micro-batch": f"{q.plan.batch_size:,}",
        **{label(field).lower(): str(getattr(q.plan, field)) for field in RECIPE},
        "parameters": f"{r.values.parameters:,}",  # noqa: PD011 - an Estimate's values, not a frame's
        "memory needed": size(r.memory.needed, s.unit),
        "capacity": size(r.memory.capacity or 0, s.unit),
        "fits": "yes" if r.fits else "no",
        "largest micro-batch": f"{largest_batch(q.model, q.plan, q.gpu):,}",
        "FLOPs of a step": prefixed(r.flops.step, "FLOP"),
    }
    if r.time is not None:
        spent = cost(q.gpu, r.time.seconds, q.count, price=s.price)
        found["training time"] = hours(r.time.seconds)
        found["cost"] = dollars(spent.dollars.median) if spent.dollars is not None else "no price on file"
    return found


def _differences(row: pd.Series[str]) -> list[str]:
    return ["font-weight: 600; background-color: rgba(237, 161, 0, 0.2)" if x != row.iloc[0] else "" for x in row]
