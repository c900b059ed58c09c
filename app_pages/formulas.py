"""Every closed form of the chosen recipe, with its numbers; the textbook's account and the seed notes beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import streamlit as st

from app_pages import charts, vega
from app_pages.estimate import answer, derivation, heading, result
from app_pages.labels import FORMS as WORDS
from app_pages.labels import accept_names, plain
from estimator.accounting.accounts import FORMS
from estimator.answers import derivations
from estimator.answers.sweeps import spaced
from estimator.describe.checks import ConfigError
from estimator.eager.letters import legend
from estimator.show.formatting import duration, prefixed, size
from estimator.studies.assignment import seed_notes, textbook

if TYPE_CHECKING:
    from app_pages.inputs import Setup
    from estimator.answers.derivations import Derivation
    from estimator.answers.estimates import Estimate
    from estimator.studies.assignment import Note

# The figures that have a formula, by the library's names, in words.
FIGURES = {"peak": "Peak", "needed": "Memory needed", "hours": "Training time"} | {name: WORDS[name] for name in FORMS}
CELLS = 48  # a side of the map


def show(s: Setup) -> None:
    """Draw the page."""
    r = answer(s)
    if r is None:
        return
    accept_names({"figure": FIGURES})
    st.header(f"Formulas: {heading(s, r)}")
    name = st.pills(
        "Figure",
        tuple(FIGURES),
        format_func=FIGURES.__getitem__,
        default="peak",
        required=True,
        key="figure",
        bind="query-params",
        help="What the formula is of. The library has each as a sympy expression: `est.account(...)`.",
    )
    d = _derivation(s, r, name or "peak")  # an empty parameter in the link clears the choice
    if d is None:
        st.info("Without an MFU there is no time.")
    else:
        st.subheader(d.title)
        derivation(d, s.unit)
        meanings = legend(str(symbol.name) for symbol in d.values)
        if meanings:
            st.caption("; ".join(f"**{letter}** {meaning}" for letter, meaning in meanings.items()) + ".")
        _other_numbers(s, d)
        _copies(d)
        if d.name == "peak":
            _pieces(s, r)
        elif d.name in FORMS:
            _by_module(r, d.name)
    _textbook(s, r)
    _notes()


def _derivation(s: Setup, r: Estimate, name: str) -> Derivation | None:
    if name in FORMS:
        return derivations.form(r, name)
    if name == "hours":
        return derivations.hours(r, s.request.count)
    return derivations.peak(r) if name == "peak" else derivations.needed(r)


def _other_numbers(s: Setup, d: Derivation) -> None:
    """A box for each symbol: the formula with another number in its place."""
    changed: dict[str, float] = {}
    meanings = legend(str(symbol.name) for symbol in d.values)
    with st.expander("With other numbers", icon=":material/calculate:"):
        with st.grid("auto", min_column_width=110, gap="small"):
            for symbol, value in d.values.items():
                letter = str(symbol.name)
                given = st.number_input(
                    letter if letter in meanings else f"${letter}$",
                    min_value=0.0,
                    max_value=1e30,
                    value=None,
                    placeholder=f"{value:g}",
                    format="%g",
                    key=f"{d.name}.{letter}",
                    bind="query-params",
                    help=meanings.get(letter, "See the formula."),
                )
                if given is not None:
                    changed[letter] = given
        try:
            other = derivations.at_sizes(d, changed)
        except ConfigError as error:
            st.error(plain(str(error)), icon=":material/error:")
            return
        said = f"{other.result:,}" if isinstance(other.result, int) else f"{other.result:,.6g}"
        st.markdown(f"= **{said}** {other.unit}" + (f" = {result(other, s.unit)}" if other.unit == "bytes" else ""))
        if d.name == "peak":
            st.caption("It is the peak only where this polynomial is the greatest; the map below shows where.")


def _copies(d: Derivation) -> None:
    latex, python, json = st.tabs(["LaTeX", "Python", "JSON"])
    latex.code(d.latex, language="latex", wrap_lines=True)
    python.code(d.python, language="python", wrap_lines=True)
    json.code(derivations.to_json(d), language="json", wrap_lines=True)


def _pieces(s: Setup, r: Estimate) -> None:
    account = r.account
    st.subheader(f"The peak is the greatest of {len(account.pieces)} polynomials")
    point = account.compiled.at(r.memory.sizes)
    rows: list[tuple[Any, ...]] = []
    for i, piece in enumerate(account.pieces):
        where = account.traced.named(piece.where, account.turns(r.memory.sizes))
        live = float(account.compiled.value(("live", i), point))
        rows.append((live, size(live, s.unit), where.phase.value, f"{where.module} · {where.op}", i))
    rows.sort(reverse=True)
    table = [(said, phase, at, str(derivations.piece(account, i))) for _, said, phase, at, i in rows]
    frame = pd.DataFrame(table, columns=["here", "phase", "at", "polynomial, bytes"])
    st.dataframe(frame, hide_index=True, column_config={"polynomial, bytes": st.column_config.TextColumn(width=900)})
    _map(r)


def _map(r: Estimate) -> None:
    st.subheader("Which one rules where")
    length = r.plan.tokens(r.model)
    if length < 3:
        st.caption("A sequence this short has no map.")
        return
    lengths = [int(x) for x in spaced(2, length, CELLS)]
    batches = [int(x) for x in spaced(2, max(64, 2 * r.plan.batch_size), CELLS)]
    found = derivations.regions(r, batches, lengths)
    lengths = list(found.lengths)
    if len(lengths) < 2:
        st.caption("Too few lengths on this side of the sliding window for a map.")
        return
    names = np.array([f"{p.where.phase.value}: {p.where.module} · {p.where.op}" for p in found.account.pieces])
    moments = names[found.index]
    seen = list(dict.fromkeys(moments.ravel()))
    legend = {"title": None, "orient": "bottom", "columns": 1, "labelLimit": 250, "symbolType": "square"}
    colour = {"type": "nominal", "scale": {"domain": seen}, "sort": seen, "legend": legend}
    x, y = charts.Axis("Micro-batch", batches), charts.Axis("Sequence", lengths)
    here = (r.plan.batch_size, length) if r.plan.batch_size > 1 else None
    spec = charts.cells(x, y, moments, colour, {"Peak in": moments}, here=here)
    text = f"Moments that are the peak at some micro-batch up to {batches[-1]:,} and sequence up to {length:,}: "
    vega.draw(vega.Drawing(spec, text + "; ".join(seen)))
    st.caption("All other sizes as in the sidebar." + (" The white dot is the sidebar's own." if here else ""))


def _by_module(r: Estimate, name: str) -> None:
    st.subheader("By module")
    rows = [
        (module, f"{getattr(r.values.modules[module], name):,}", str(formula))
        for module, formula in r.account.by_module(name).items()
    ]
    rows.append(("total", f"{getattr(r.values, name):,}", str(getattr(r.account, name))))
    st.dataframe(pd.DataFrame(rows, columns=["module", "value", "formula"]), hide_index=True, height="content")


def _textbook(s: Setup, r: Estimate) -> None:
    st.subheader("The textbook's account beside the exact one")
    t = textbook(s.request.model)
    v, batch = r.values, r.plan.batch_size
    static = v.parameter_bytes + v.gradient_bytes + v.optimizer_bytes
    of = f"of {batch:,} sequence{'s' * (batch > 1)}"
    rows = [
        ("parameters", f"{t.parameters:,}", f"{v.parameters:,}"),
        ("parameters, gradients, optimizer state", size(t.static_bytes, s.unit), size(static, s.unit)),
        (f"activations {of}", size(batch * t.activation_bytes, s.unit), size(v.activation_bytes, s.unit)),
        (f"memory {of}", size(t.memory_bytes(batch), s.unit), size(r.memory.peak, s.unit)),
        (f"FLOPs forward {of}", prefixed(batch * t.forward_flops, "FLOP"), prefixed(v.forward_flops, "FLOP")),
        (f"FLOPs backward {of}", prefixed(batch * t.backward_flops, "FLOP"), prefixed(v.backward_flops, "FLOP")),
    ]
    st.table(pd.DataFrame(rows, columns=["what", "textbook", "exact, this recipe"]), hide_index=True)
    st.caption(
        "The textbook counts RMSNorm blocks with a feed-forward of two matrices and width 4 d, no biases, no table of "
        "positions, at the model's whole context in fp32, and each listed component's output once as an activation. "
        "The exact account is what PyTorch holds for this model and recipe."
    )


def _notes() -> None:
    st.subheader("What the seed notes say of GPT-2 XL")
    rows = [(n.question, n.said, _answered(n), n.wrong) for n in seed_notes()]
    st.table(pd.DataFrame(rows, columns=["what", "the notes say", "textbook", "what went wrong"]), hide_index=True)


def _answered(n: Note) -> str:
    """The right answer as text; bytes in GB, as in the question."""
    if n.unit == "bytes":
        return size(n.right, "GB")
    return duration(n.right) if n.unit == "s" else f"{n.right:,} {n.unit}"
