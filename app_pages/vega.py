"""What all charts share: plain Vega-Lite specifications, and a sentence for those who do not see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import streamlit as st

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Spec = dict[str, Any]


class Drawing(NamedTuple):
    """A chart, and a sentence that says the same for those who do not see it."""

    spec: Spec
    text: str


def draw(drawing: Drawing) -> None:
    """Put a chart on the page."""
    st.vega_lite_chart(drawing.spec, width="stretch", alt=drawing.text)


def layer(mark: str, rows: Sequence[Mapping[str, Any]] | None, **given: Any) -> Spec:
    """One layer: the channels of its encoding, and all else the properties of its mark."""
    channels = {"x", "x2", "y", "y2", "text", "tooltip", "order"}
    by_data = {name: v for name, v in given.items() if name in channels or isinstance(v, dict)}
    spec: Spec = {"mark": {"type": mark, **{name: v for name, v in given.items() if name not in by_data}}}
    spec["encoding"] = by_data
    if rows is not None:
        spec["data"] = {"values": list(rows)}
    return spec


def chart(layers: list[Spec], **properties: Any) -> Spec:
    """Layers as one chart."""
    return {"layer": layers, "config": {"view": {"stroke": None}}, **properties}


def tooltip(**titles: str) -> list[Spec]:
    """What the pointer shows: fields and their titles."""
    return [{"field": field, "type": "nominal", "title": title} for field, title in titles.items()]
