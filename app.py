"""The page: `streamlit run app.py`. Widgets and drawing only; every figure comes from the library."""

from functools import partial

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
pages = [
    st.Page(partial(view, setup), title=title, url_path=title.lower(), default=title == "Estimate")
    for title, view in views.items()
]
st.navigation(pages, position="top").run()
keep.show(setup)
links.say(refused, last=True)
