"""The page: `streamlit run app.py`. Widgets and drawing only; every figure comes from the library."""

from functools import partial

import streamlit as st

from app_pages import compare, estimate, formulas, inputs, keep, sweep, validate

st.set_page_config(page_title="Transformer estimator", page_icon="🧮", layout="wide", initial_sidebar_state=380)

inputs.drop_infinite()
setup = inputs.sidebar()
views = {
    "Estimate": estimate.show,
    "Formulas": formulas.show,
    "Sweep": sweep.show,
    "Compare": compare.show,
    "Validate": validate.show,
}
pages = [
    st.Page(partial(view, setup), title=title, url_path=title.lower(), default=title == "Estimate")
    for title, view in views.items()
]
st.navigation(pages, position="top").run()
keep.show(setup)
