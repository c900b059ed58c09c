"""Runs that people make, one click each: what the page opens on, and the course's question by name."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import streamlit as st

from app_pages.inputs import HIDDEN
from app_pages.model_input import FOLLOWING, published
from estimator.describe.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType

    from streamlit.delta_generator import DeltaGenerator

# What people run: autocast to bf16, fused attention and optimizer, PyTorch's own loss, clipped gradients.
USUAL: dict[str, Any] = {
    "precision": "bf16-mixed",
    "attention": "sdpa",
    "loss": "torch",
    "optimizer_impl": "fused",
    "max_grad_norm": 1.0,
}
# By the button's words: the inputs that are not at their defaults.
SCENARIOS: dict[str, dict[str, Any]] = {
    # github.com/karpathy/nanoGPT, config/train_gpt2.py: 12 x 1,024 tokens, 5 x 8 micro-batches, 600,000 steps.
    "GPT-2 on 8 A100": USUAL
    | {"model": "gpt2", "gpu": "a100-40gb-sxm", "count": 8, "batch_size": 12, "global_batch_size": 480}
    | {"steps": 600_000, "compile": True},
    # The assignment's question: the largest batch, and how long 400,000 steps of 1,024 sequences take.
    "GPT-2 XL on an A100 (the course)": {"model": "gpt2-xl", "gpu": "a100-80gb-sxm"},
    "Llama 3.1 8B on 8 H100, FSDP": USUAL
    | {"model": "llama-3.1-8b", "gpu": "h100-80gb-sxm", "count": 8, "sharding": "zero3", "seq_len": 8192}
    | {"precision": "bf16-master", "checkpointing": "block", "global_batch_size": 64, "steps": 20_000},
    # Touvron et al. 2023, arXiv:2307.09288: 2T tokens in steps of 4M.
    "Llama 2 7B, all 2T tokens on 512 A100": USUAL
    | {"model": "llama-2-7b", "gpu": "a100-80gb-sxm", "count": 512, "sharding": "zero3", "batch_size": 2}
    | {"checkpointing": "block", "global_batch_size": 1024, "steps": 476_837, "compile": True},
    "Fine-tune Qwen 2.5 0.5B on an RTX 4090": USUAL
    | {"model": "qwen2.5-0.5b", "gpu": "rtx-4090-24gb", "seq_len": 2048, "checkpointing": "block"}
    | {"global_batch_size": 64, "steps": 2_000},
    "Llama 3.1 70B on 64 H100": USUAL
    | {"model": "llama-3.1-70b", "gpu": "h100-80gb-sxm", "count": 64, "sharding": "zero3", "seq_len": 8192}
    | {"precision": "bf16-master", "checkpointing": "block", "global_batch_size": 512, "steps": 5_000},
}
FIRST = next(iter(SCENARIOS))
# Where the sidebar stands without a link.
DEFAULTS: dict[str, Any] = {
    **{name: value for name, value in Plan().to_dict().items() if name not in HIDDEN},
    "gpu": "a100-80gb-sxm",
    "count": 1,
    "steps": 400_000,
    "global_batch_size": 1024,
    **dict.fromkeys(("mfu", "price", "deadline")),
}


def open_on_the_first() -> None:
    """A visitor without a link sees the first scenario; a link, even of one input, means what it says."""
    if "visited" not in st.session_state:
        st.session_state["visited"] = True
        if not st.query_params:
            choose(FIRST)


def choose(name: str) -> None:
    """Set every input as the scenario has it."""
    put(SCENARIOS[name])


def put(inputs: Mapping[str, Any]) -> None:
    """Set these inputs of the sidebar; what is not named goes back to its default, but for the unit."""
    name = inputs["model"]
    model = published(name)
    for key in [str(key) for key in st.session_state]:
        if key.startswith(f"{name}."):  # a size of the same model, changed
            size = key.removeprefix(f"{name}.")
            st.session_state[key] = None if size in FOLLOWING else getattr(model, size)
    for field, value in {**DEFAULTS, **inputs}.items():
        # Streamlit's link follows what is set only where there was an input.
        if field not in st.session_state and field in inputs:
            st.query_params[field] = str(value).lower() if isinstance(value, bool) else str(value)
        st.session_state[field] = value


def buttons() -> None:
    """A button for each scenario."""
    with st.container(horizontal=True, gap="small", key="scenarios"):
        for name in SCENARIOS:
            st.button(name, key=f"scenario {name}", on_click=choose, args=(name,))


def link(at: DeltaGenerator | ModuleType, inputs: Mapping[str, Any], said: str) -> None:
    """A link to the Estimate page with these inputs, in the same tab; `said` is read out.

    No button with `st.switch_page`: it refuses to leave a page whose inputs are in the link.
    """
    query = urlencode({name: str(x).lower() if isinstance(x, bool) else x for name, x in inputs.items()})
    at.html(f'<a href="./?{escape(query)}" target="_self" aria-label="Estimate it: {escape(said)}">Estimate it</a>')
