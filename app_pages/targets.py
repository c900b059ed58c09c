"""What people think in, beside what a run is made of: training tokens, tokens in a step, and a deadline in days."""

from __future__ import annotations

import streamlit as st

MOST = 1e18  # tokens: beyond anyone's


def draw(seq_len: int, steps: int, sequences: int) -> None:
    """Two inputs that say steps and global batch in tokens, and follow them; and a deadline.

    Args:
        seq_len: tokens in a sequence.
        steps: optimizer steps of the run.
        sequences: in one step.
    """
    left, right = st.columns(2)
    # They are not in the link: steps and global batch are, which are what they say in another unit.
    st.session_state["tokens"] = steps * sequences * seq_len / 1e9
    st.session_state["batch_tokens"] = sequences * seq_len
    left.number_input(
        "Tokens, billions",
        min_value=0.0,
        max_value=MOST,
        format="%g",
        step=1.0,
        key="tokens",
        on_change=_tokens,
        args=(sequences * seq_len,),
        help="Training tokens of the whole run: steps x global batch x sequence. Changing it changes the steps.",
    )
    right.number_input(
        "Tokens a step",
        min_value=1,
        max_value=10**15,
        key="batch_tokens",
        on_change=_batch,
        args=(seq_len, steps * sequences),
        help="Global batch x sequence. Changing it changes the global batch, and the steps so that the training tokens "
        "stay.",
    )
    st.number_input(
        "Deadline, days",
        min_value=0.0,
        max_value=1e5,
        value=None,
        format="%g",
        placeholder="none",
        key="deadline",
        bind="query-params",
        help="By when the run must be done; the page says whether it is.",
    )


def _tokens(of_a_step: int) -> None:
    wanted = st.session_state["tokens"] * 1e9
    st.session_state["steps"] = max(1, min(10**9, round(wanted / of_a_step)))


def _batch(seq_len: int, sequences_of_the_run: int) -> None:
    sequences = max(1, min(10**9, round(st.session_state["batch_tokens"] / seq_len)))
    st.session_state["global_batch_size"] = sequences
    st.session_state["steps"] = max(1, min(10**9, round(sequences_of_the_run / sequences)))
