"""The little that Streamlit's own theme has no words for."""

import streamlit as st

# What is being computed anew cannot be clicked or selected, and after a moment not be seen; inputs keep the focus.
# What does not fit is grey.
CSS = """
<style>
[data-stale="true"] { pointer-events: none; user-select: none; }
[data-testid="stMain"] [data-stale="true"]:not(:has(input, textarea)) {
  opacity: 0.25 !important; visibility: hidden; transition: visibility 0s linear 0.25s !important;
}
[class*="st-key-unfit-"] [data-testid="stMetricValue"] { opacity: 0.45; }
[data-testid="stMetricDelta"] > div { white-space: normal; }
[data-testid="stMainBlockContainer"] { padding-top: 4rem; padding-bottom: 3rem; }
</style>
"""


def apply() -> None:
    """Put it on the page."""
    st.html(CSS)
