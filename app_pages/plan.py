"""From money, a deadline, tokens or a size to the others: every accelerator and count that can do the run."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from app_pages import charts, scenarios, vega
from app_pages.compute import planned
from app_pages.keep import Own
from app_pages.labels import plain
from app_pages.model_input import OWN
from estimator.answers.plans import SORTS
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.describe.presets import preset, presets
from estimator.describe.settings import settings
from estimator.describe.units import SECONDS_PER_HOUR
from estimator.pricing.money import KINDS
from estimator.show.csv_file import csv_of
from estimator.show.formatting import STRATEGIES, count, dollars, duration, prefixed, size
from estimator.show.planning import TRADES, command, headline, python, sentence

if TYPE_CHECKING:
    from collections.abc import Mapping

    from app_pages.inputs import Setup
    from estimator.answers.plans import Option, Plans
    from estimator.describe.model import ModelConfig

LARGEST = "the largest"
BY_SIZE = "Llama-shaped"
MOST = 1e15
SHOWN = 10  # rows; the others are a click away


def show(s: Setup) -> Own | None:
    """Draw the page; what there is to share of it."""
    st.header("Plan: what to train, on what")
    st.markdown(
        "Give what you know: money, days, tokens, a model. The rest follows, on every accelerator and count that has a "
        "price on file and that the run fits on."
    )
    asked = _inputs()
    own = Own(command(asked), python(asked))
    if not set(asked) & {"dollars", "days", "tokens", "model", "parameters"}:
        st.info("Give at least one of money, days, tokens and a model.", icon=":material/info:")
        return None
    waiting = st.empty()
    with waiting, st.spinner("Every accelerator and count is tried; some seconds."):
        try:
            found = planned(tuple(sorted(asked.items())))
        except ConfigError as error:
            st.error(plain(str(error)), icon=":material/error:")
            return own
    waiting.empty()
    if not found.options:
        st.error(headline(found), icon=":material/block:")
        _left_out(found)
        return own
    st.success(headline(found).replace("$", "\\$"), icon=":material/check_circle:")
    _traded(found, asked)
    _rows(s, found)
    for text in found.assumptions:
        st.caption(f"Assumed: {text}.")
    _left_out(found)
    return own


def _traded(found: Plans, asked: Mapping[str, Any]) -> None:
    """The ways as points, of which the best are joined."""
    shown = [o for o in found.options if o.dollars is not None]
    if len(shown) < 2:
        return
    x, y = found.trade
    if y == "size":
        y = "tokens" if "model" in asked else "parameters"
    rows = [
        {x: getattr(o, x), y: getattr(o, y), "accelerator": o.accelerator, "what": sentence(o), "best": o.best}
        for o in shown
    ]
    drawing = charts.options(rows, x, y, TRADES[found.trade])
    vega.draw(drawing)
    st.caption(f":orange[:material/star:], and on the line: no other {TRADES[found.trade]}.")


def _inputs() -> dict[str, Any]:
    """The arguments of `estimator.plan` that were given."""

    def amount(name: str, title: str, holder: str, said: str) -> float | None:
        value: float | None = st.number_input(
            title, 0.0, MOST, None, format="%g", placeholder=holder, key=name, bind="query-params", help=said
        )
        return value or None

    with st.grid("auto", min_column_width=170, gap="small", vertical_alignment="bottom"):
        money = amount("plan.dollars", "Budget, $", "no limit", "US dollars at most.")
        days = amount("plan.days", "Days", "no limit", "Days at most, from the first step to the last.")
        tokens = amount("plan.tokens", "Tokens, billions", "follow", "Training tokens; empty lets them follow.")
        which = st.selectbox(
            "Model",
            (LARGEST, BY_SIZE, *presets()),
            key="plan.model",
            bind="query-params",
            help="What is trained: the largest model that money or time allows, one in Llama's shape of so many "
            "parameters, or a preset.",
        )
        size_ = amount("plan.parameters", "Parameters, billions", "follow", "Of a model in Llama's shape.")
        ratio = amount("plan.ratio", "Tokens a parameter", "20", "About 20 is compute-optimal (Hoffmann et al. 2022).")
        price = st.selectbox("Price", KINDS, key="plan.price", bind="query-params", help="Which kind of price is paid.")
        order = st.selectbox(
            "First comes", SORTS, None, key="plan.sort", bind="query-params", placeholder="what is asked for",
            help="The cheapest, the fastest, or the largest model and tokens.",
        )  # fmt: skip
    asked: dict[str, Any] = {"dollars": money, "days": days, "sort": order, "price": price}
    asked["tokens"] = tokens * 1e9 if tokens else None
    if which in presets():
        asked["model"] = which
    elif size_:
        asked["parameters"] = size_ * 1e9
    if ratio and not (tokens and set(asked) & {"model", "parameters"}):
        asked["tokens_per_parameter"] = ratio
    return {name: value for name, value in asked.items() if value is not None}


def _rows(s: Setup, found: Plans) -> None:
    st.subheader(f"{len(found.options):,} ways to do it")
    for o in found.options[:SHOWN]:
        _row(s, o)
    if found.options[SHOWN:]:
        with st.expander(f"{len(found.options) - SHOWN:,} more"):
            st.dataframe(found.to_frame(), hide_index=True)
    data = partial(csv_of, found.to_frame(), index=False)
    st.download_button("CSV of all", data, "plan.csv", "text/csv", on_click="ignore")


def _row(s: Setup, o: Option) -> None:
    money = "no price" if o.dollars is None else dollars(o.dollars).replace("$", "\\$")
    star = ":orange[:material/star:] " if o.best else ""
    how = f"{STRATEGIES[o.plan.sharding]}, " if o.count > 1 else ""
    recomputed = "" if o.plan.checkpointing == "none" else f", checkpointing {o.plan.checkpointing}"
    said = [f"{count(o.parameters)} parameters on {count(o.tokens)} tokens"]
    said.append(f"{duration(o.low * SECONDS_PER_HOUR)} to {duration(o.high * SECONDS_PER_HOUR)}")
    if o.price is not None:
        said.append(f"\\${o.price.usd_per_hour:.2f} an hour at {o.price.provider}, {o.price.date}")
    if o.kilowatt_hours is not None:
        said.append(f"{prefixed(o.kilowatt_hours * 1e3, 'Wh')}, {o.co2_kg or 0:,.0f} kg CO2")
    said.append(f"{how}micro-batch {o.plan.batch_size}{recomputed}, {size(o.needed, s.unit)}, MFU {o.mfu:.0%}")
    left, right = st.columns([6, 1], vertical_alignment="center")
    took = duration(o.hours * SECONDS_PER_HOUR)
    left.markdown(f"{star}**{o.count} x {o.accelerator}: {took}, {money}**  \n{'; '.join(said)}")
    scenarios.link(right, inputs_of(o), sentence(o))


def inputs_of(o: Option) -> Mapping[str, Any]:
    """The sidebar's inputs that ask for an option."""
    q = o.request
    found = named_inputs(q.name, q.model) | {"gpu": q.gpu, "count": q.count, "steps": q.steps}
    found["global_batch_size"] = q.global_batch_size
    for name, setting in settings(Plan).items():
        value = getattr(o.plan, name)
        if name != "data_parallel" and value != setting.default:
            found[name] = value
    if o.dollars is not None:
        found["price"] = round(o.dollars / o.hours / o.count, 4)
    return found


def named_inputs(name: str, model: ModelConfig) -> dict[str, Any]:
    """The sidebar's inputs that are a model."""
    if name in presets() and model == preset(name):
        return {"model": name}
    own = name if name in OWN else next((own for own, family in OWN.items() if family == model.family), name)
    sizes = model.to_dict()
    return {"model": own} | {f"{own}.{field}": x for field, x in sizes.items() if field != "family" and x is not None}


def _left_out(found: Plans) -> None:
    if found.refused:
        with st.expander(f"{sum(found.refused.values()):,} pairs of accelerator and count are left out"):
            for why, n in sorted(found.refused.items(), key=lambda entry: -entry[1]):
                st.markdown(f"- {n:,}: {why}")
