"""The account by part of the model: what each holds and computes."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import streamlit as st

from app_pages.labels import FORMS
from estimator.show.formatting import in_unit

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.answers.estimates import Estimate


def show(s: Setup, r: Estimate) -> None:
    """Draw the table, in words and in the units of the page."""
    frame = r.to_frame().astype(float)  # Arrow's integers end at 2^63
    columns: dict[str, Any] = {"_index": st.column_config.TextColumn("part of the model", pinned=True)}
    for name in map(str, frame):
        kind = name.rpartition("_")[2]
        unit = {"bytes": f", {s.unit}"}.get(kind, "")
        if kind == "bytes":
            frame[name] = frame[name].map(partial(in_unit, unit=s.unit))
        style = {"bytes": "%.3f", "flops": "compact"}.get(kind, "localized")
        title = f"{FORMS[name].lower()}{unit}".replace("flops", "FLOPs")
        columns[name] = st.column_config.NumberColumn(title, format=style)
    st.subheader("By part of the model")
    st.dataframe(frame, column_config=columns, height="content")
