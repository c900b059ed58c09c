"""Every closed form of the chosen recipe, with its numbers; the textbook's account and the seed notes beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import pandas as pd
import streamlit as st

from app_pages.estimate import answer, derivation, heading, result
from estimator import derivations
from estimator.accounts import FORMS
from estimator.assignment import textbook
from estimator.formatting import duration, prefixed, size
from estimator.sweeps import spaced
from estimator.symbols import LEGEND

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.derivations import Derivation
    from estimator.estimates import Estimate

FIGURES = ("peak", "needed", "hours", *FORMS)
# What the seed notes say to the assignment's questions, and what is wrong with it.
SEED_NOTES = (
    (
        "static memory",
        "18.72 GB",
        "Three copies of the parameters; AdamW needs four: parameters, gradients, two moments.",
    ),
    (
        "activations of a sequence",
        "0.321 GB",
        "Only the blocks' outputs and one row of logits; nothing inside a block.",
    ),
    ("largest batch in 80 GB", "191", "Follows from the two above."),
    ("FLOPs forward, a sequence", "133 TFLOP", "Within 0.4 % of what a context of 16,384 gives; GPT-2 XL has 1,024."),
    ("FLOPs of AdamW a parameter", "17", "Without a derivation; it is negligible either way."),
    ("time on one A100", "455 hours", "400 x 100 sequences in place of 400,000 steps of 1,024."),
)


def show(s: Setup) -> None:
    """Draw the page."""
    r = answer(s)
    if r is None:
        return
    st.header(f"Formulas: {heading(s, r)}")
    name = st.selectbox("Figure", FIGURES, key="figure", bind="query-params")
    d = _derivation(s, r, name)
    if d is None:
        st.info("Without an MFU there is no time.")
        return
    st.subheader(d.title)
    derivation(d, s.unit)
    with st.expander("With other numbers"):
        _other_numbers(s, d)
    _copies(d)
    if name == "peak":
        _pieces(s, r)
    if name in FORMS:
        _by_module(r, name)
    with st.expander("What the letters stand for"):
        st.table(pd.DataFrame({"letter": LEGEND.keys(), "stands for": LEGEND.values()}), hide_index=True)
    _textbook(s, r)


def _derivation(s: Setup, r: Estimate, name: str) -> Derivation | None:
    if name in FORMS:
        return derivations.form(r, name)
    if name == "hours":
        return derivations.hours(r, s.request.count)
    return derivations.peak(r) if name == "peak" else derivations.needed(r)


def _other_numbers(s: Setup, d: Derivation) -> None:
    changed: dict[str, float] = {}
    with st.container(horizontal=True):
        for symbol, value in d.values.items():  # noqa: PD011 - an Estimate's values, not a frame's
            letter = str(symbol.name)
            given = st.number_input(
                letter if letter in LEGEND else f"${letter}$",
                min_value=0.0,
                value=None,
                placeholder=f"{value:g}",
                format="%g",
                key=f"{d.name}.{letter}",
                help=LEGEND.get(letter),
                width=140,
            )
            if given:
                changed[letter] = given
    if changed:
        other = derivations.at_sizes(d, changed)
        st.latex(rf"= {other.substituted}")
        st.markdown(f"= **{other.result:,}** {other.unit} = {result(other, s.unit)}")


def _copies(d: Derivation) -> None:
    latex, python, json = st.tabs(["LaTeX", "Python", "JSON"])
    latex.code(d.latex, language="latex", wrap_lines=True)
    python.code(d.python, language="python", wrap_lines=True)
    json.code(derivations.to_json(d), language="json", wrap_lines=True)


def _pieces(s: Setup, r: Estimate) -> None:
    account = r.account
    st.subheader(f"The peak is the greatest of {len(account.pieces)} polynomials")
    point = account.compiled.at(r.memory.sizes)
    rows = []
    for i, piece in enumerate(account.pieces):
        where = account.traced.named(piece.where, r.model.num_layers)
        live = account.compiled.value(("live", i), point)
        at = f"{where.module} · {where.op}"
        rows.append((where.phase.value, at, size(live, s.unit), live, str(derivations.piece(account, i))))
    frame = pd.DataFrame(rows, columns=["phase", "at", "here", "bytes", "polynomial"]).astype({"bytes": float})
    st.dataframe(frame.sort_values("bytes", ascending=False), hide_index=True)
    st.subheader("Which one rules where")
    length = r.plan.tokens(r.model)
    if length < 2:
        st.caption("A sequence of one token has no map.")
        return
    lengths = [int(x) for x in spaced(2, length, 40)]
    batches = [int(x) for x in spaced(2, max(64, 2 * r.plan.batch_size), 40)]
    found = derivations.regions(r, batches, lengths)
    names = [f"{p.where.phase.value}: {p.where.module} · {p.where.op}" for p in found.account.pieces]
    cells = [(b, t, names[found.index[i, j]]) for i, b in enumerate(batches) for j, t in enumerate(lengths)]
    chart = (
        alt.Chart(pd.DataFrame(cells, columns=["micro-batch", "sequence", "moment"]))
        .mark_rect()
        .encode(
            x=alt.X("micro-batch:O", axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("sequence:O", sort="descending", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("moment:N", legend=alt.Legend(title=None, orient="bottom", columns=1, labelLimit=500)),
            tooltip=["micro-batch", "sequence", "moment"],
        )
        .properties(height=380)
    )
    seen = dict.fromkeys(moment for *_, moment in cells)
    st.altair_chart(
        chart, width="stretch", alt="Moments that are the peak at some batch and sequence: " + "; ".join(seen)
    )


def _by_module(r: Estimate, name: str) -> None:
    st.subheader("By module")
    rows = [
        (module, str(formula), f"{getattr(r.values.modules[module], name):,}")  # noqa: PD011 - an Estimate's values, not a frame's
        for module, formula in r.account.by_module(name).items()
    ]
    total = ("total", str(getattr(r.account, name)), f"{getattr(r.values, name):,}")
    st.dataframe(pd.DataFrame([*rows, total], columns=["module", "formula", "value"]), hide_index=True)


def _textbook(s: Setup, r: Estimate) -> None:
    st.subheader("The textbook's account beside the exact one")
    t = textbook(s.request.model)
    batch = r.plan.batch_size
    most = t.max_batch_size()
    static = r.values.parameter_bytes + r.values.gradient_bytes + r.values.optimizer_bytes  # noqa: PD011 - an Estimate's values, not a frame's
    rows = [
        ("parameters", f"{t.parameters:,}", f"{r.values.parameters:,}"),  # noqa: PD011 - an Estimate's values, not a frame's
        ("parameters, gradients, optimizer state", size(t.static_bytes, s.unit), size(static, s.unit)),
        (
            f"activations of {batch:,} sequence{'s' * (batch > 1)}",
            size(batch * t.activation_bytes, s.unit),
            size(r.values.activation_bytes, s.unit),  # noqa: PD011 - an Estimate's values, not a frame's
        ),
        ("FLOPs forward", prefixed(batch * t.forward_flops, "FLOP"), prefixed(r.flops.forward, "FLOP")),
        ("largest batch in 80 GB", f"{most:,}", ""),
        ("400,000 steps of 1,024 at 50 % of 19.5 TFLOP/s", duration(t.days() * 86_400), ""),
    ]
    st.table(pd.DataFrame(rows, columns=["", "textbook", "exact, this recipe"]), hide_index=True)
    st.caption(
        "The textbook counts RMSNorm blocks with a feed-forward of two matrices and width 4 d, no biases, no table of "
        "positions, at the model's whole context in fp32, and each listed component's output once as an activation. "
        "The exact account is what PyTorch holds for this model and recipe."
    )
    st.subheader("What the seed notes say of GPT-2 XL")
    xl = textbook("gpt2-xl")
    right = (
        size(xl.static_bytes, "GB"),
        size(xl.activation_bytes, "GB"),
        f"{xl.max_batch_size()}",
        prefixed(xl.forward_flops, "FLOP"),
        f"{xl.optimizer_flops // xl.parameters}",
        f"{xl.days():,.0f} days",
    )
    notes = [(what, said, answer, why) for (what, said, why), answer in zip(SEED_NOTES, right, strict=True)]
    st.table(pd.DataFrame(notes, columns=["", "notes", "textbook", "what went wrong"]), hide_index=True)
