"""The page: `streamlit run app.py`. Widgets and drawing only; every figure comes from the library."""

import streamlit as st

from app_pages import estimate, inputs

st.set_page_config(page_title="Transformer estimator", page_icon="🧮", layout="wide", initial_sidebar_state=380)

setup = inputs.sidebar()
pages = [st.Page(lambda: estimate.show(setup), title="Estimate", url_path="estimate", default=True)]
st.navigation(pages, position="top").run()
