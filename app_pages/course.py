"""The course's question, worked in three columns: a page to link to, for teacher and student."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from app_pages import scenarios
from app_pages.keep import Own
from app_pages.labels import plain
from estimator.show.course import COLUMNS, parts

if TYPE_CHECKING:
    from app_pages.inputs import Setup


def show(_: Setup) -> Own:
    """Draw the page; what there is to share of it."""
    st.header("The course's question: GPT-2 XL on an A100", anchor="course")
    st.markdown(
        "A course asks what the memory, the largest batch, the FLOPs and the hours of training GPT-2 XL are. Three "
        "answers side by side: circulating notes, the assignment's own convention, and what PyTorch does with the real "
        "model. GB is 10^9 bytes here, as in the question. Each part has its own link; `estimate course` prints the "
        "same."
    )
    for part in parts():
        st.subheader(part.question, anchor=part.key)
        columns = st.columns(3, gap="medium")
        for column, title, lines in zip(columns, COLUMNS, (part.notes, part.convention, part.pytorch), strict=True):
            column.markdown(f"**{title[0].upper()}{title[1:]}**")
            column.markdown("\n".join(f"{i}. {plain(line)}" for i, line in enumerate(lines, 1)))
    name = next(name for name in scenarios.SCENARIOS if "course" in name)
    scenarios.link(st, scenarios.SCENARIOS[name], name)
    return Own("estimate course")
