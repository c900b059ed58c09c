"""The sidebar's model: a preset with every size open to change, or one's own from a config.json."""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import streamlit as st

from app_pages.labels import explained, label, plain
from estimator.describe.checks import ConfigError
from estimator.describe.hf import TakenForAnother, essential, from_hf
from estimator.describe.model import ModelConfig
from estimator.describe.presets import preset, preset_groups, presets, starting_points
from estimator.describe.settings import limits
from estimator.describe.words import in_words

if TYPE_CHECKING:
    from collections.abc import Callable

# May be left empty: as published, or following d_model and the heads.
FOLLOWING = ("num_kv_heads", "head_dim", "d_ff", "sliding_window")
BASES = {preset(name).family: name for name in starting_points()}  # what a model of one's own starts from, by family
OWN = {f"own-{family}": family for family in BASES}
REFUSED = "config_problem"  # in the session's state: why the last configuration was not taken
NOTE = "config_note"  # likewise: as what it was taken
CONFIG = "config"  # in the session's state and in the link: the fields of a file whose parts no preset's sizes say
FROM_CONFIG = "own-config"
ALL = "all"
# Sizes that a model may have; each has an input where it has it.
OF_EXPERTS = ("num_experts", "experts_per_token", "d_expert", "d_shared")


def model_input(problem: Callable[[ConfigError], None]) -> tuple[str, ModelConfig]:
    """Draw the inputs; (name, model), the model as published where the sizes given do not make one."""
    names = _listed()
    name = st.selectbox(
        "Preset, or your own",
        names,
        index=names.index("gpt2-xl") if "gpt2-xl" in names else 0,
        key="model",
        bind="query-params",
        on_change=forget,
        help="A published model, in the shape of its config.json on the Hugging Face hub; type to search. Or one of "
        "your own: pick its family and give the sizes, or read them from a config.json below.",
    )
    as_published = published(name)
    with st.expander("Sizes"):
        changes = _sizes(name, as_published)
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
        if NOTE in st.session_state:
            st.info(plain(st.session_state[NOTE]))
    model = as_published
    try:
        model = as_published.replace(**changes)
    except ConfigError as error:
        problem(error)
    st.caption(plain(f"{in_words(model)}."))
    return name, model


def _listed() -> tuple[str, ...]:
    """The names of a group of models, or of all; that of the model that is chosen is always among them."""
    groups = {ALL: presets(), **preset_groups()}
    group = st.selectbox("Models of", tuple(groups), key="group", help="Whose models the next box lists.")
    listed = (*groups[group], *OWN)
    given = st.session_state.setdefault(CONFIG, st.query_params.get(CONFIG, ""))
    if given:
        try:
            from_hf(given.encode())
            listed += (FROM_CONFIG,)
        except ConfigError as error:
            st.session_state[REFUSED], st.session_state[CONFIG] = str(error), ""  # said once: one may go on without it
    now = st.session_state.get("model", st.query_params.get("model", "gpt2-xl"))
    return listed if now in listed or now not in presets() else (now, *listed)


def published(name: str) -> ModelConfig:
    """The model that a name stands for, before its sizes are changed."""
    if name == FROM_CONFIG:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TakenForAnother)
            return from_hf(st.session_state[CONFIG].encode())
    return preset(BASES[OWN[name]] if name in OWN else name)


def called(name: str) -> str:
    """What a model goes by on the page."""
    if name == FROM_CONFIG:
        return "your own config.json"
    return f"your own, like {BASES[OWN[name]]}" if name in OWN else name


def forget() -> None:
    """Forget that a configuration was refused: the page goes on with the model that it had."""
    st.session_state.pop(REFUSED, None)
    st.session_state.pop(NOTE, None)


def _take(source: str) -> None:
    """Make the model of an uploaded or pasted file the one of the page; the link then carries its sizes."""
    forget()
    given = st.session_state[source]
    if not given:
        return
    content = given.getvalue() if source == "upload" else given.encode()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", TakenForAnother)
            m = from_hf(content)
    except ConfigError as error:
        st.session_state[REFUSED] = str(error)
        return
    if said:
        st.session_state[NOTE] = str(said[0].message)
    if m.family not in BASES or not set(m.to_dict()) <= set(preset(BASES[m.family]).to_dict()):
        _keep(content)
        return
    name = f"own-{m.family}"
    drawn = st.session_state["model"] == name
    st.session_state["model"] = name
    for field, value in m.to_dict().items():
        if field != "family":
            st.session_state[f"{name}.{field}"] = value
            if not drawn and value is not None:  # Streamlit's link follows what is set only where there was an input
                st.query_params[f"{name}.{field}"] = str(value).lower()


def _keep(content: bytes) -> None:
    """Make a file whose parts no sizes say the page's model; the link carries the fields that it depends on."""
    st.session_state[CONFIG] = st.query_params[CONFIG] = json.dumps(essential(content), separators=(",", ":"))
    for key in [str(key) for key in st.session_state if str(key).startswith(f"{FROM_CONFIG}.")]:
        del st.session_state[key]  # sizes of the file before
    st.session_state["model"] = FROM_CONFIG


def _can_be(m: ModelConfig, **changes: Any) -> bool:
    """Whether the model could be like that."""
    try:
        m.replace(**changes)
    except ConfigError:
        return False
    return True


def _sizes(name: str, published: ModelConfig) -> dict[str, Any]:
    """Inputs for each size; those that differ from the preset's."""
    columns = st.columns(2)
    changes: dict[str, Any] = {}
    following = published
    sizes = ["num_layers", "d_model", "num_heads", "vocab_size", "context_length"]
    sizes += ["d_ff"] if published.d_ff is not None else []
    sizes += ["num_kv_heads"] if _can_be(published, num_kv_heads=1) else []
    sizes += ["head_dim"] if _can_be(published, head_dim=2 * published.e) else []
    sizes += [field for field in OF_EXPERTS if getattr(published, field) is not None]
    sizes += ["sliding_window"] if _can_be(published, sliding_window=1) else []
    for i, field in enumerate(sizes):
        own, shown = getattr(published, field), getattr(following, field)
        value = columns[i % 2].number_input(
            label(field),
            min_value=1,
            max_value=limits(ModelConfig)[field],
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
    for field in ("tie_embeddings", "qkv_bias"):
        own = getattr(published, field)
        if not _can_be(published, **{field: not own}):
            continue
        value = st.toggle(label(field), own, key=f"{name}.{field}", bind="query-params", help=explained(field))
        if value != own:
            changes[field] = value
    return changes
