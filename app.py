"""The page: `streamlit run app.py`. Widgets and drawing only; every figure comes from the library."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from app_pages import (
    compare,
    course,
    estimate,
    formulas,
    inputs,
    keep,
    layouts,
    links,
    plan,
    scenarios,
    style,
    sweep,
    validate,
)

if TYPE_CHECKING:
    from collections.abc import Callable

st.set_page_config(page_title="Transformer estimator", page_icon="🧮", layout="wide", initial_sidebar_state=380)

style.apply()
links.remember()
inputs.drop_infinite()
scenarios.open_on_the_first()
setup = inputs.sidebar()
refused = st.empty()
links.say(refused, last=False)
views = {
    "Estimate": estimate.show,
    "Plan": plan.show,
    "Layouts": layouts.show,
    "Formulas": formulas.show,
    "Sweep": sweep.show,
    "Compare": compare.show,
    "Validate": validate.show,
    "Course": course.show,
}
ALONE = ("Plan", "Course")  # which the sidebar changes nothing on


def drawn(view: Callable[[inputs.Setup], keep.Own | None]) -> None:
    """A page, and its foot."""
    keep.show(setup, view(setup))


pages = [
    st.Page(partial(drawn, view), title=title, url_path=title.lower(), default=title == "Estimate")
    for title, view in views.items()
]
page = st.navigation(pages, position="top")
if page.title in ALONE:
    style.without_sidebar()
page.run()
links.say(refused, last=True)
