"""The foot of every page: reports to keep, and the Python and the command that give the same figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from app_pages.compute import cost_of
from app_pages.model_input import REFUSED
from estimator.describe.checks import ConfigError
from estimator.show.report import to_csv, to_json, to_markdown

if TYPE_CHECKING:
    from app_pages.inputs import Setup


def show(s: Setup) -> None:
    """Draw it; nothing where there is no estimate."""
    if REFUSED in st.session_state:
        return
    q = s.request
    try:
        spent = cost_of(s)
    except ConfigError:  # said above
        return
    st.subheader("Take it with you")
    with st.container(horizontal=True):
        name = f"estimate-{q.name}-{q.gpu}"
        st.download_button("JSON", to_json(q, spent), f"{name}.json", "application/json", on_click="ignore")
        st.download_button("CSV by module", to_csv(q), f"{name}.csv", "text/csv", on_click="ignore")
        report = to_markdown(q, spent, s.unit)
        st.download_button("Report (Markdown)", report, f"{name}.md", "text/markdown", on_click="ignore")
    command, python = st.tabs(["Command", "Python"])
    command.code(q.command(), language="sh", wrap_lines=True)
    python.code(q.python(), language="python", wrap_lines=True)
    st.caption("The page's address holds everything that you set: send it as a link.")
