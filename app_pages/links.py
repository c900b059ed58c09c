"""What a link said that no input took: it is named, with what was probably meant, and never passed over."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

import streamlit as st

from app_pages.inputs import HIDDEN
from app_pages.labels import plain
from estimator.describe.checks import shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamlit.delta_generator import DeltaGenerator

GIVEN, SAID = "link given", "link said"  # in the session's state
STREAMLITS = ("embed", "embed_options")
MOST = 5  # that are named one by one
# Inputs that one page has and that are drawn after the sidebar: "plan.dollars", "B.gpu", "batch_size.to".
OF_A_PAGE = re.compile(r"goal|figure|x|y|show|log|columns|(plan|layouts|[BCD]|[a-z_]+)\..+")


def remember() -> None:
    """Keep what the link says when a visitor comes, before any input takes it."""
    if GIVEN not in st.session_state:
        st.session_state[GIVEN] = st.query_params.to_dict()


def say(at: DeltaGenerator, *, last: bool) -> None:
    """Name what no input took, until it is dismissed.

    Args:
        at: where.
        last: whether every input of the page is drawn, and not only the sidebar's.
    """
    given = st.session_state[GIVEN]
    now = {name: raw for name, raw in given.items() if last or not OF_A_PAGE.fullmatch(name)}
    if now:
        inputs = {str(key): value for key, value in st.session_state.items() if key not in (GIVEN, SAID)}
        st.session_state.setdefault(SAID, []).extend(refused(now, inputs, st.query_params.to_dict()))
        st.session_state[GIVEN] = {name: raw for name, raw in given.items() if name not in now}
    sentences = st.session_state.get(SAID, [])
    if not sentences:
        return
    more = f" And {len(sentences) - MOST} more." if len(sentences) > MOST else ""
    with at.container():
        st.warning(
            "Not all of the link could be taken. " + " ".join(plain(x) for x in sentences[:MOST]) + more,
            icon=":material/link_off:",
        )
        if last:
            st.button("Dismiss", key="link dismissed", on_click=_dismiss)


def _dismiss() -> None:
    st.session_state[SAID] = []


def refused(given: Mapping[str, str], inputs: Mapping[str, object], left: Mapping[str, str]) -> list[str]:
    """A sentence for each part of a link that was not taken.

    Args:
        given: the link's names and values.
        inputs: the page's inputs and the value that each has.
        left: what the page's own link has now; a value that an input took stands there, unless it is the default.
    """
    sentences = []
    for name, raw in given.items():
        if name in STREAMLITS or (name in inputs and left.get(name) == raw):
            continue
        if name in HIDDEN:
            sentences.append(f"{name} follows from the count and the global batch.")
        elif name not in inputs:
            close = get_close_matches(name, inputs, n=1, cutoff=0.75)
            meant = f" Was {close[0]} meant?" if close else ""
            sentences.append(f"{shown(name)}: this page has no such input.{meant}")
        elif not _is(raw, inputs[name]):
            now = "empty" if inputs[name] is None else inputs[name]
            sentences.append(f"{name} = {shown(raw)}: cannot be, and is {now} here.")
    return sentences


def _is(raw: str, value: object) -> bool:
    """Whether a link's text says the value of an input."""
    if value is None:
        return not raw
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(raw) == value
        except ValueError:
            return False
    return raw.lower() == str(value).lower()
