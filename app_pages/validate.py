"""Estimate against measurement: a real step of a small model of the same family and recipe, on this machine."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from estimator.config import ConfigError, ModelConfig, Plan

if TYPE_CHECKING:
    from app_pages.inputs import Setup

RESULTS = Path(__file__).parent.parent / "validation"
# A model of seconds: wide enough that no two of its sizes are equal, so that a swapped letter shows.
SMALL: dict[str, Any] = {
    "num_layers": 3,
    "d_model": 96,
    "num_heads": 6,
    "vocab_size": 1009,
    "context_length": 80,
    "d_ff": 320,
}
BATCH = 2


def show(s: Setup) -> None:
    """Draw the page."""
    st.header("Validate")
    if find_spec("torch") is None:
        st.info('A measurement needs PyTorch: pip install -e ".[trainer]"', icon=":material/download:")
    else:
        _measurement(s)
    _kept()


def small(s: Setup) -> tuple[ModelConfig, Plan]:
    """A small configuration of the family and the recipe that the sidebar has."""
    m = s.request.model
    grouped = {"num_kv_heads": 2} if m.kv_heads < m.num_heads else {}
    model = ModelConfig(family=m.family, tie_embeddings=m.tie_embeddings, qkv_bias=m.qkv_bias, **SMALL, **grouped)
    return model, s.request.plan.replace(batch_size=BATCH, seq_len=None)


def _measurement(s: Setup) -> None:
    model, plan = small(s)
    st.markdown(
        f"A model of the {model.family} family with {model.num_layers} layers of width {model.d_model}, in the "
        "sidebar's recipe, trained for a few steps by the bundled trainer on this machine's CPU, and counted."
    )
    if not st.button("Measure", type="primary"):
        return
    bar = st.progress(0.0, "loading PyTorch")
    from trainer.validate import compare  # noqa: PLC0415 - torch takes seconds, and only this needs it

    bar.progress(0.3, "running real steps")
    try:
        rows = compare(model, plan)
    except (ConfigError, RuntimeError, NotImplementedError) as error:  # PyTorch's CPU has no kernel for every recipe
        st.error(f"This recipe cannot be measured on this machine: {error}", icon=":material/error:")
        return
    finally:
        bar.empty()
    table = [(r.quantity.replace("_", " "), r.estimate, r.measurement, r.difference) for r in rows]
    st.dataframe(pd.DataFrame(table, columns=["quantity", "estimate", "measurement", "difference"]), hide_index=True)
    wrong = sum(1 for r in rows if r.difference)
    if wrong:
        st.error(f"{wrong} of {len(rows)} figures differ.", icon=":material/error:")
    else:
        st.success(
            "Every figure that can be measured is equal, to the byte and the FLOP.", icon=":material/check_circle:"
        )


def _kept() -> None:
    files = sorted(RESULTS.glob("*.json")) if RESULTS.is_dir() else []
    st.subheader("Results on file")
    if not files:
        st.caption("None yet: validate-estimates --json validation/NAME.json writes one.")
        return
    rows = []
    for file in files:
        found = json.loads(file.read_text())
        figures = [f for case in found["cases"] for f in case["figures"].values() if f["measurement"] is not None]
        exact = sum(1 for f in figures if f["estimate"] == f["measurement"])
        rows.append(
            (file.stem, found["date"], found["torch"], found["device"], len(found["cases"]), len(figures), exact)
        )
    columns = ["file", "date", "PyTorch", "device", "configurations", "figures", "exact"]
    st.dataframe(pd.DataFrame(rows, columns=columns), hide_index=True)
