"""The little that Streamlit's own theme has no words for."""

import streamlit as st

# What is being computed anew cannot be clicked, selected or taken for the answer; what does not fit is grey.
CSS = """
<style>
[data-stale="true"] { pointer-events: none; user-select: none; opacity: 0.25 !important; }
[class*="st-key-unfit-"] [data-testid="stMetricValue"] { opacity: 0.45; }
</style>
"""


def apply() -> None:
    """Put it on the page."""
    st.html(CSS)
