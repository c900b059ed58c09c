"""The sidebar's model: a preset with every size open to change, or one's own from a config.json."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import streamlit as st

from app_pages.labels import explained, label, plain
from estimator.describe.checks import ConfigError
from estimator.describe.hf import from_hf
from estimator.describe.model import ModelConfig
from estimator.describe.presets import preset, presets, starting_points
from estimator.describe.settings import limits

if TYPE_CHECKING:
    from collections.abc import Callable

# What the widgets take at most: beyond any model, and few enough events to draw the step.
LIMIT = 10_000_000
# May be left empty: as published, or following d_model and the heads.
FOLLOWING = ("num_kv_heads", "head_dim", "d_ff", "sliding_window")
BASES = {preset(name).family: name for name in starting_points()}  # what a model of one's own starts from, by family
OWN = {f"own-{family}": family for family in BASES}
REFUSED = "config_problem"  # in the session's state: why the last configuration was not taken
FAMILIES = {"gpt2": "GPT-2 family", "llama": "Llama family"}


def model_input(problem: Callable[[ConfigError], None]) -> tuple[str, ModelConfig]:
    """Draw the inputs; (name, model), the model as published where the sizes given do not make one."""
    names = (*presets(), *OWN)
    name = st.selectbox(
        "Preset, or your own",
        names,
        index=names.index("gpt2-xl"),
        key="model",
        bind="query-params",
        on_change=forget,
        help="A published model, in the shape of its config.json on the Hugging Face hub; or one of your own: pick its "
        "family and give the sizes, or read them from a config.json below.",
    )
    published = preset(BASES[OWN[name]] if name in OWN else name)
    with st.expander("Sizes"):
        changes = _sizes(name, published)
    with st.expander("From a config.json"):
        st.file_uploader("Upload", type="json", key="upload", max_upload_size=5, on_change=_take, args=("upload",))
        st.text_area(
            "or paste",
            key="paste",
            height=90,
            on_change=_take,
            args=("paste",),
            placeholder='{"model_type": "llama", ...}',
            help="A decoder's Hugging Face configuration. It is read as data, not stored.",
        )
        if REFUSED in st.session_state:
            st.error(plain(st.session_state[REFUSED]), icon=":material/error:")
    try:
        return name, published.replace(**changes)
    except ConfigError as error:
        problem(error)
        return name, published


def called(name: str) -> str:
    """What a model goes by on the page."""
    return f"your own, {FAMILIES[OWN[name]]}" if name in OWN else name


def forget() -> None:
    """Forget that a configuration was refused: the page goes on with the model that it had."""
    st.session_state.pop(REFUSED, None)


def _take(source: str) -> None:
    """Make the model of an uploaded or pasted file the one of the page; the link then carries its sizes."""
    forget()
    given = st.session_state[source]
    if not given:
        return
    try:
        m = from_hf(given.getvalue() if source == "upload" else given.encode())
    except ConfigError as error:
        st.session_state[REFUSED] = str(error)
        return
    if m.family not in BASES or not set(m.to_dict()) <= set(preset(BASES[m.family]).to_dict()):
        st.session_state[REFUSED] = f"config: read as {m.family}, whose parts have no inputs on this page yet"
        return
    name = f"own-{m.family}"
    drawn = st.session_state["model"] == name
    st.session_state["model"] = name
    for field, value in m.to_dict().items():
        if field != "family":
            st.session_state[f"{name}.{field}"] = value
            if not drawn and value is not None:  # Streamlit's link follows what is set only where there was an input
                st.query_params[f"{name}.{field}"] = str(value).lower()


def _sizes(name: str, published: ModelConfig) -> dict[str, Any]:
    """Inputs for each size; those that differ from the preset's."""
    columns = st.columns(2)
    gpt2 = published.family == "gpt2"
    changes: dict[str, Any] = {}
    following = published
    sizes = ["num_layers", "d_model", "num_heads", "vocab_size", "context_length", "d_ff"]
    sizes += [] if gpt2 else ["num_kv_heads", "head_dim"]
    sizes.append("sliding_window")
    for i, field in enumerate(sizes):
        own, shown = getattr(published, field), getattr(following, field)
        value = columns[i % 2].number_input(
            label(field),
            min_value=1,
            max_value=min(limits(ModelConfig)[field], LIMIT),
            value=None if field in FOLLOWING else own,
            placeholder="none" if shown is None else f"{shown:,}",
            key=f"{name}.{field}",
            bind="query-params",
            help=explained(field),
        )
        if value is not None and value != own:
            changes[field] = value
            with suppress(ConfigError):  # said once all sizes are known
                following = published.replace(**changes)
    for field in ["tie_embeddings"] + ([] if gpt2 else ["qkv_bias"]):
        own = getattr(published, field)
        value = st.toggle(label(field), own, key=f"{name}.{field}", bind="query-params", help=explained(field))
        if value != own:
            changes[field] = value
    return changes
