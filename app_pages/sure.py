"""How sure each figure is, and what it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from app_pages.compute import cost_of
from app_pages.labels import plain
from estimator.show.formatting import between, duration, size
from estimator.studies.runs import evidence

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.answers.estimates import Estimate

EXACT = (
    "**Parameters, gradients, optimizer state, activations, FLOPs** are read off a symbolic execution of the step, not "
    "estimated. On a CPU they are equal to PyTorch's, to the byte and the FLOP, in every configuration on file: the "
    "page Validate has them, and measures more."
)
ENOUGH = 20  # published runs of an architecture; with fewer the page says so beside the figure


def thin(r: Estimate) -> str:
    """A sentence for beside the time, where few published runs stand behind it; "" where many do, or none is needed."""
    if r.time is None or not r.time.predicted:
        return ""
    runs, sentence = evidence(r.accelerator)
    return "" if runs >= ENOUGH else f"**Thin evidence for the time:** {sentence[0].lower()}{sentence[1:]} "


def show(s: Setup, r: Estimate) -> None:
    """Draw the section."""
    st.subheader("How sure is this?")
    m = r.memory
    least, most = m.context[0] + m.nccl[0], m.context[1] + m.nccl[1]
    said = [EXACT]
    model = f"{between(size(least, s.unit), size(most, s.unit))} of what is needed"
    said.append(f"**Memory outside the tensors**, the CUDA context and NCCL's buffers, is a model: {model}.")
    if r.time is None:
        said.append("**Time** cannot be predicted here.")
    elif not r.time.predicted:
        said.append("**Time** follows from the MFU that was given.")
    else:
        t = r.time
        low, high = (t.interval.low, t.interval.high) if t.interval else (t.seconds, t.seconds)
        ends = between(duration(low), duration(high))
        said.append(f"**Time** is predicted from the step's kernels: nine runs of ten take {ends}.")
        said[-1] += f" {plain(evidence(r.accelerator)[1])} {plain(t.rows)}"
        said.append(f"**What kernels reach** on this accelerator: {plain(t.origin)}")
    spent = cost_of(s)
    if spent is not None:
        said.append(f"**Cost and energy** rest on {plain('; '.join((*spent.assumptions, *spent.missing)))}.")
    st.markdown("\n".join(f"- {line}" for line in said))
    if r.time is not None and r.time.predicted:
        with st.expander("What the time would be with other assumptions"):
            rests = [(x.name, x.value, x.origin, "; ".join(x.changes())) for x in r.assumptions]
            names = ("It rests on", "taken here", "from", "another choice, and what a step's time would be")
            st.dataframe(pd.DataFrame(rests, columns=list(names)), hide_index=True, width="stretch")
            st.caption(
                "All but the slowest accelerator are inputs: see “What the time rests on” and the recipe, at the side."
            )
