"""Estimate against measurement: a real step of a small model of the same family and recipe, on this machine."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

from app_pages.labels import plain
from estimator.describe.model import ModelConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app_pages.inputs import Setup
    from estimator.describe.plan import Plan

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "validation"
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
PLOT = "Predicted against measured tokens per second of one accelerator"
COMMAND = (sys.executable, "-m", "trainer.referee.one_case")
ONE_AT_A_TIME = Lock()  # a measurement takes a core and half a gigabyte


def show(s: Setup) -> None:
    """Draw the page."""
    st.header("Validate")
    st.markdown(
        "The estimate is only worth what a measurement says of it. This runs a few real training steps with the "
        "bundled trainer on this machine's CPU, counts what PyTorch allocates and computes, and holds the estimate "
        "against it, term by term."
    )
    if find_spec("torch") is None:
        st.info('A measurement needs PyTorch: `pip install -e ".[trainer]"`', icon=":material/download:")
    else:
        _measurement(s)
    _kept()
    _published()


def small(s: Setup) -> tuple[ModelConfig, Plan]:
    """A small configuration of the family and the recipe that the sidebar has."""
    m = s.request.model
    grouped: dict[str, Any] = {"num_kv_heads": 2} if m.kv_heads < m.num_heads else {}
    model = ModelConfig(family=m.family, tie_embeddings=m.tie_embeddings, qkv_bias=m.qkv_bias, **SMALL, **grouped)
    if m.sliding_window is not None and s.request.plan.tokens(m) > m.sliding_window:
        model = model.replace(sliding_window=model.context_length // 2)
    return model, s.request.plan.replace(batch_size=BATCH, seq_len=None, sharding="none")


def _measurement(s: Setup) -> None:
    model, plan = small(s)
    of = f"{model.num_layers} layers of width {model.d_model}, {BATCH} sequences of {model.context_length} tokens"
    recipe = ", ".join(f"{value}" for value in (plan.precision, plan.attention, plan.checkpointing, plan.optimizer))
    st.markdown(f"**{model.family} family**, {of}, in the sidebar's recipe ({recipe}, ...).")
    if not st.button("Measure", icon=":material/speed:"):
        return
    bar = st.progress(0.0, "waiting for the machine")
    rows = None
    with ONE_AT_A_TIME:
        for line in _lines(model, plan):
            if "error" in line:
                st.error(
                    plain(f"This recipe cannot be measured on this machine: {line['error']}"), icon=":material/error:"
                )
            elif "rows" in line:
                rows = line["rows"]
            else:
                bar.progress(line["done"], line["doing"])
    bar.empty()
    if rows is None:
        return
    table = [(r["quantity"].replace("_", " "), r["estimate"], r["measurement"], r["difference"]) for r in rows]
    frame = pd.DataFrame(table, columns=["quantity", "estimate", "measurement", "difference"])
    number = st.column_config.NumberColumn(format="localized")
    st.dataframe(
        frame,
        hide_index=True,
        height="content",
        column_config=dict.fromkeys(("estimate", "measurement", "difference"), number),
    )
    measured = [r for r in rows if r["measurement"] is not None]
    wrong = sum(1 for r in measured if r["difference"])
    if wrong:
        st.error(f"{wrong} of {len(measured)} figures differ.", icon=":material/error:")
    else:
        st.success(
            f"All {len(measured)} figures that can be measured are equal, to the byte and the FLOP.",
            icon=":material/check_circle:",
        )
    if len(measured) < len(rows):
        st.caption("FlopCounterMode counts nothing for the CPU's fused attention: those figures have no measurement.")


def _lines(model: ModelConfig, plan: Plan) -> Iterator[dict[str, Any]]:
    """What `trainer.referee.one_case` says: it runs in a process of its own, so that the server stays small."""
    pipe = subprocess.PIPE
    with subprocess.Popen(COMMAND, cwd=ROOT, text=True, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as child:  # noqa: S603 - our own module, with data on its stdin
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it has ended before it could read: its exit status says so, below
                child.stdin.write(json.dumps({"model": model.to_dict(), "plan": plan.to_dict()}, allow_nan=False))
                child.stdin.close()
            last: dict[str, Any] = {}
            for text in child.stdout:
                last = json.loads(text)
                yield last
            if "rows" not in last and "error" not in last:
                yield {"error": f"the measurement ended with exit status {child.wait()}"}
        finally:  # the page was left, or another input was changed
            child.kill()


def _kept() -> None:
    st.subheader("Results on file")
    files = sorted(RESULTS.glob("*.json")) if RESULTS.is_dir() else []
    rows, times = [], []
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        if "measured" in found["cases"][0]:  # of seconds, by `validate-estimates --time`
            errors = sorted(abs(case["predicted"] / case["measured"] - 1) for case in found["cases"])
            middle, worst = (f"{error:.1%}" for error in (statistics.median(errors), errors[-1]))
            times.append((found["date"], found["origin"], len(errors), middle, worst))
            continue
        figures = [f for case in found["cases"] for f in case["figures"].values() if f["measurement"] is not None]
        exact = sum(1 for f in figures if f["estimate"] == f["measurement"])
        rows.append((found["date"], found["device"], found["torch"], len(found["cases"]), len(figures), exact))
    if not rows:
        st.caption("None yet: `validate-estimates --json validation/NAME.json` writes one.")
        return
    columns = ["date", "device", "PyTorch", "configurations", "figures", "equal"]
    st.dataframe(pd.DataFrame(rows, columns=columns), hide_index=True, height="content")
    st.caption("Each is what `validate-estimates` found on one machine, over random shapes and recipes.")
    if times:
        columns = ["date", "calibration", "configurations", "median error of the time", "greatest"]
        st.dataframe(pd.DataFrame(times, columns=columns), hide_index=True, height="content")
        st.caption("Seconds of training steps on a calibrated machine: `validate-estimates --time`.")


def _published() -> None:
    st.subheader("Time against published training runs")
    plot, text = RESULTS / "published.svg", RESULTS / "published.md"
    if not (plot.exists() and text.exists()):
        st.caption("None on file: `validate-estimates --published` writes them.")
        return
    found = text.read_text(encoding="utf-8")
    first, _, tables = found.partition("\n")
    st.markdown(first)
    st.image(str(plot), caption=PLOT, alt=f"{PLOT}: a cloud of points about the diagonal", width="stretch")
    with st.expander("By source, accelerator and model size, and the worst rows"):
        st.markdown(tables)
