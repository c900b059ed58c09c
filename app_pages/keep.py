"""The foot of every page: a link, reports to keep, and the Python and the command that give the same figures."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode, urlsplit, urlunsplit

import streamlit as st

from app_pages.compute import cost_of
from app_pages.model_input import REFUSED, called
from estimator.describe.checks import ConfigError
from estimator.show.report import to_csv, to_json, to_markdown
from estimator.show.snapshot import to_html

if TYPE_CHECKING:
    from app_pages.inputs import Setup

HELD = "The page's address holds everything that you set; the link above is that address."


class Own(NamedTuple):
    """What a page answers itself, and not the sidebar's estimate."""

    command: str
    python: str = ""


def show_own(own: Own) -> None:
    """Draw the foot of a page with an answer of its own."""
    st.subheader("Share")
    tabs = st.tabs(["Link", "Command", *(["Python"] if own.python else [])])
    tabs[0].code(link(), language=None, wrap_lines=True)
    tabs[1].code(own.command, language="sh", wrap_lines=True)
    if own.python:
        tabs[2].code(own.python, language="python", wrap_lines=True)
    st.caption(HELD)


def show(s: Setup, own: Own | None = None) -> None:
    """Draw it; nothing where there is no estimate.

    Args:
        s: the sidebar.
        own: what the page answers in place of the sidebar's estimate.
    """
    if own is not None:
        show_own(own)
        return
    if REFUSED in st.session_state:
        return
    q = s.request
    try:
        spent = cost_of(s)
    except ConfigError:  # said above
        return
    here = link()
    st.subheader("Share")
    address, command, python = st.tabs(["Link", "Command", "Python"])
    address.code(here, language=None, wrap_lines=True)
    command.code(q.command(), language="sh", wrap_lines=True)
    python.code(q.python(), language="python", wrap_lines=True)
    with st.container(horizontal=True):
        name = f"estimate-{q.name}-{q.gpu}"
        address_of = here if here.startswith("http") else None
        # Made when they are asked for: most visits ask for none.
        page, report = partial(to_html, q, spent, s.unit, address_of), partial(to_markdown, q, spent, s.unit)
        st.download_button("Page (HTML)", page, f"{name}.html", "text/html", on_click="ignore")
        st.download_button("Report (Markdown)", report, f"{name}.md", "text/markdown", on_click="ignore")
        st.download_button("CSV by module", partial(to_csv, q), f"{name}.csv", "text/csv", on_click="ignore")
        st.download_button("JSON", partial(to_json, q, spent), f"{name}.json", "application/json", on_click="ignore")
    said = f"This is the estimate of {called(q.name)} on {q.gpu}."
    st.caption(f"{said} {HELD}")


def link() -> str:
    """The page's address with all that was set."""
    query = urlencode(st.query_params.to_dict())
    here = urlsplit(st.context.url or "")
    return urlunsplit((here.scheme, here.netloc, here.path or ("/" if here.netloc else ""), query, ""))
