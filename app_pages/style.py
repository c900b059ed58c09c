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
[class*="st-key-unfit-"] [data-testid="stMetricValue"] { opacity: 0.6; }
[data-testid="stMetricDelta"], [data-testid="stMetricDelta"] * { white-space: normal; overflow: visible; }
[data-testid="stMainBlockContainer"] { padding-top: 4rem; padding-bottom: 3rem; }
[data-testid="stCaptionContainer"] { opacity: 1; color: inherit; }
[data-testid="stCaptionContainer"] p, [data-testid="stCaptionContainer"] li { opacity: 0.8; }
[data-testid="stCaptionContainer"] code, [data-testid="stCode"] .token { color: inherit; }
.katex-display { overflow: visible !important; }
@media (max-width: 640px) { .katex-display { overflow: auto hidden !important; } }
</style>
"""


# Inputs keep what they hold, and the link, for the pages that have them.
WITHOUT_SIDEBAR = """
<style>
[data-testid="stSidebarUserContent"] { display: none; }
@media (min-width: 769px) { [data-testid="stSidebar"], [data-testid="stExpandSidebarButton"] { display: none; } }
</style>
"""


def without_sidebar() -> None:
    """Hide the sidebar, of a page that it changes nothing on; on a phone the pages' names are in it, and stay."""
    st.html(WITHOUT_SIDEBAR)


def apply() -> None:
    """Put it on the page."""
    st.html(CSS)
