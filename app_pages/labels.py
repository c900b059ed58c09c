"""What inputs are called, and what each is, in the words of the library's declarations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import Setting, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

LABELS = {"gpu": "Accelerator"}  # what no declaration knows


def declared(name: str) -> Setting | None:
    """The declaration of a field of a model, a plan or a run."""
    for cls in (Plan, Run, ModelConfig):
        if name in settings(cls):
            return settings(cls)[name]
    return None


# The forms of an account, by the library's names, in words.
FORMS = {
    "parameters": "Parameters",
    "trained_parameters": "Trained parameters",
    "active_parameters": "Active parameters",
    "parameter_bytes": "Bytes of parameters",
    "gradient_bytes": "Gradients",
    "optimizer_bytes": "Optimizer state",
    "activation_bytes": "Activations",
    "forward_flops": "FLOPs forward",
    "backward_flops": "FLOPs backward",
    "recompute_flops": "FLOPs recomputed",
    "optimizer_flops": "FLOPs of the optimizer",
}


def label(name: str) -> str:
    """What the input of a field is called on the page."""
    said = declared(name)
    return LABELS.get(name) or (said.label if said else "") or name.replace("_", " ").capitalize()


def explained(name: str, otherwise: str = "") -> str:
    """What a field is, for the help beside its input; `otherwise` where nothing declares it."""
    said = declared(name)
    return said.markdown if said else otherwise


def accept_names(words: Mapping[str, Mapping[str, str]]) -> None:
    """Let a link name options by the library's names too, and start again with their words, which inputs have.

    Args:
        words: of each input, by the key that it has in links: its options' words by their names.
    """
    link = st.query_params
    given = {key: of[link[key]] for key, of in words.items() if link.get(key) in of and of[link[key]] != link[key]}
    if given:
        st.query_params.update(given)
        st.rerun()


def plain(text: str) -> str:
    """A text as Markdown that looks as it is written: what a user wrote in it becomes no link, image or formula."""
    escaped = "".join(f"\\{c}" if c in "\\`*[]<>$~!@^|" else c for c in text)
    return escaped.replace("://", "\\://").replace("www.", "www\\.")
