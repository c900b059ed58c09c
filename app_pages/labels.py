"""What inputs are called, and what each is, in the words of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import streamlit as st

if TYPE_CHECKING:
    from collections.abc import Mapping

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

LABELS = {
    "num_layers": "Layers",
    "d_model": "Width",
    "num_heads": "Heads",
    "num_kv_heads": "Key/value heads",
    "head_dim": "Head width",
    "d_ff": "Feed-forward width",
    "vocab_size": "Vocabulary",
    "tie_embeddings": "Head shares the embedding",
    "qkv_bias": "Biases on q, k, v",
    "sliding_window": "Sliding window",
    "gpu": "Accelerator",
    "batch_size": "Micro-batch",
    "seq_len": "Sequence",
    "grad_accumulation": "Accumulation",
    "max_grad_norm": "Clip to norm",
    "optimizer_impl": "Implementation",
}

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
    return LABELS.get(name, name.replace("_", " ").capitalize())


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


def explained(cls: type[ModelConfig | Plan]) -> dict[str, str]:
    """What each field of a dataclass is."""
    return cls.HELP
