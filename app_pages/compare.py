"""Up to four configurations: what differs between them and by how much, and what they are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from app_pages import charts, vega
from app_pages.compute import largest_batch
from app_pages.estimate import answer
from app_pages.inputs import HIDDEN, supported
from app_pages.labels import explained, label, plain
from app_pages.model_input import called
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.describe.presets import preset, presets
from estimator.describe.settings import choices, limits
from estimator.show.comparison import ENERGY, MONEY, TIME, Figure, change, headline, measures, paid, said

if TYPE_CHECKING:
    from collections.abc import Mapping

    from app_pages.inputs import Setup
    from estimator.answers.estimates import Estimate
    from estimator.answers.request import Request

OTHERS = ("B", "C", "D")
OTHER_GPU = "h100-80gb-sxm"  # what B is on until it is said otherwise: two equal columns compare nothing
NOUNS = ("model", "accelerator")  # whose values need no more words
SHOWN = ("precision", "attention", "checkpointing", "optimizer")  # the rest is under "More"


def show(s: Setup) -> None:
    """Draw the page: the result on top, what is compared below it."""
    if answer(s) is None:
        return
    st.header("Compare")
    results = st.container()
    st.subheader("What is compared")
    number = st.segmented_control(
        "Configurations",
        (2, 3, 4),
        default=2,
        required=True,
        key="columns",
        bind="query-params",
        help="How many. A is what the sidebar says; the others are A with some changes.",
    )
    requests = {"A": s.request}
    for name in OTHERS[: (number or 2) - 1]:  # an empty parameter in the link clears the choice
        request = _other(name, s.request)
        if request is not None:
            requests[name] = request
    answers: dict[str, Estimate] = {}
    for name, request in requests.items():
        try:
            answers[name] = request.estimate()
        except ConfigError as error:
            results.error(plain(f"{name}: {error}"), icon=":material/error:")
    with results:
        _results(s, requests, answers)
    if len(requests) > 1:
        with st.expander("Commands"):
            for name, request in requests.items():
                st.code(f"{request.command()}  # {name}", language="sh", wrap_lines=True)


def _results(s: Setup, requests: Mapping[str, Request], answers: Mapping[str, Estimate]) -> None:
    """The sentences, the bars and the table."""
    found: dict[str, dict[str, Figure]] = {}
    for name, r in answers.items():
        q = requests[name]
        # A price of one's own is that of the sidebar's accelerator.
        spent = paid(q, r, s.price if q.gpu == s.request.gpu else None)
        found[name] = measures(r, spent, largest_batch(r.model, r.plan, q.gpu, q.global_batch_size), s.unit)
    settings = {name: _settings(requests[name], r) for name, r in answers.items()}
    base = "A" if "A" in found else next(iter(found), None)
    if base is None:
        return
    for name, measured in found.items():
        if name != base:
            what = _difference(settings[name], settings[base])
            st.markdown(f"**{name}, {plain(what)}: {plain(headline(measured, found[base], s.unit))}**")
    vega.draw(charts.memory_bars({name: answers[name].memory for name in found}, s.unit))
    bars = [key for key in (TIME, MONEY, ENERGY) if all(key in of for of in found.values())]
    for column, key in zip(st.columns(max(1, len(bars)), gap="medium"), bars, strict=False):
        with column:
            rows = [(name, found[name][key].value or 0.0, found[name][key].text) for name in found]
            st.markdown(f"**{key.capitalize()}**")
            vega.draw(charts.bars(rows, key.capitalize()))
    _table({name: settings[name] | found[name] for name in found}, base)


def _table(rows: Mapping[str, Mapping[str, Figure]], base: str) -> None:
    """What differs, with by how much; and on demand what is the same."""
    keys = list(dict.fromkeys(key for of in rows.values() for key in of))
    none = Figure("—")
    first = rows[base]

    def cell(name: str, key: str) -> str:
        now, before = rows[name].get(key, none), first.get(key, none)
        by = change(now, before)
        return f"{now.text} ({by})" if by else now.text

    different = [key for key in keys if len({of.get(key, none).text for of in rows.values()}) > 1]
    st.subheader("What differs")
    if different:
        frame = pd.DataFrame({name: [cell(name, key) for key in different] for name in rows}, index=different)
        frame.index.name = "figure"
        st.table(frame)
    else:
        st.caption("Nothing.")
    same = [key for key in keys if key not in different]
    with st.expander(f"{len(same)} that are the same"):
        frame = pd.DataFrame({"in all": [first.get(key, none).text for key in same]}, index=same)
        frame.index.name = "figure"
        st.table(frame)


def _more() -> tuple[str, ...]:
    """The other fields of a plan that are one of a few names."""
    return tuple(field for field in choices(Plan) if field not in SHOWN + HIDDEN)


def _settings(q: Request, r: Estimate) -> dict[str, Figure]:
    """What a configuration is, in the order of its inputs."""
    p = q.plan
    found = {
        "model": called(q.name),
        "accelerator": r.accelerator.name,
        "micro-batch": f"{p.batch_size:,} x {p.tokens(q.model):,} tokens",
    }
    found |= {label(field).lower(): said(getattr(p, field)) for field in (*SHOWN, *_more())}
    return {name: Figure(text) for name, text in found.items()}


def _difference(now: Mapping[str, Figure], before: Mapping[str, Figure]) -> str:
    """In what settings a configuration differs, in words."""
    different = [(key, x.text) for key, x in now.items() if x.text != before[key].text]
    return ", ".join(text if key in NOUNS else f"{key} {text}" for key, text in different) or "as A"


def _other(name: str, base: Request) -> Request | None:
    """The configuration `name`, as its inputs change `base`; None, with the reason drawn, if it cannot be."""

    def pick(field: str, now: object, options: tuple[str, ...], index: int | None = None) -> str | None:
        chosen: str | None = st.selectbox(
            label(field),
            options,
            index=index,
            key=f"{name}.{field}",
            bind="query-params",
            placeholder=f"as in A: {said(now)}",
            help=explained(field, f"Empty is as in A. {label(field)} of {name}."),
        )
        return chosen

    def pick_of_plan(fields: tuple[str, ...]) -> dict[str, Any]:
        with st.grid("auto", min_column_width=170, gap="small"):
            return {field: pick(field, getattr(base.plan, field), choices(Plan)[field]) for field in fields}

    with st.container(border=True):
        st.markdown(f"**{name}** is A, but for")
        with st.grid("auto", min_column_width=170, gap="small"):
            model = pick("model", called(base.name), presets())
            gpu = pick("gpu", base.gpu, supported(), supported().index(OTHER_GPU) if name == "B" else None)
            batch = st.number_input(
                label("batch_size"),
                1,
                limits(Plan)["batch_size"],
                None,
                key=f"{name}.batch_size",
                bind="query-params",
                placeholder=f"as in A: {base.plan.batch_size:,}",
                help=explained("batch_size"),
            )
        given = {"batch_size": batch} | pick_of_plan(SHOWN)
        with st.expander("More of the recipe"):
            given |= pick_of_plan(_more())
        wanted = {field: value for field, value in given.items() if value is not None}
        if wanted.get("optimizer", base.plan.optimizer) != base.plan.optimizer:  # it may have other implementations
            wanted.setdefault("optimizer_impl", Plan().optimizer_impl)
        try:
            plan = base.plan.replace(**wanted)
        except ConfigError as error:
            st.error(plain(str(error)), icon=":material/error:")
            return None
    q = replace(base, plan=plan, gpu=gpu or base.gpu)
    return q if model is None else replace(q, name=model, model=preset(model))
