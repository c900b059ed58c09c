"""Text of figures: the right number to its last digit, in the unit that it says."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import estimator as est
from estimator.show import cli
from estimator.show.formatting import duration, figures, hours, in_unit, prefixed, short_dollars, size, verdict

FACTORS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
FACTORS |= {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@given(st.integers(0, 10**18), st.sampled_from(["GiB", "GB"]))
def test_a_size_reads_back_to_three_digits(nbytes, unit):
    number, written = size(nbytes, unit).split()
    assert float(number.replace(",", "")) * FACTORS[written] == pytest.approx(nbytes, rel=0.0051)
    assert size(-nbytes, unit) == ("-" if nbytes else "") + size(nbytes, unit)


@given(st.floats(1e-3, 1e12))
def test_a_duration_reads_back(seconds):
    number, unit = duration(seconds).split()
    factor = {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "days": 86400, "years": 365.25 * 86400}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(seconds, rel=0.0051)


@given(st.floats(1e-6, 1e30))
def test_figures_keep_three_digits_and_no_exponent(x):
    assert float(figures(x).replace(",", "")) == pytest.approx(x, rel=0.0051)
    assert "e" not in figures(x)


def test_examples():
    assert size(31_641_193_984) == "29.5 GiB"
    assert size(31_641_193_984, "GB") == "31.6 GB"
    assert hours(122_764.6 * 3600) == "122,765 h"
    assert prefixed(1.95e13, "FLOP/s") == "19.5 TFLOP/s"
    assert short_dollars(342_513) == "$343k"
    assert in_unit(2**30) == 1
    with pytest.raises(est.ConfigError, match="GiB"):
        in_unit(1, "GIB")


def test_the_verdict_says_whether_by_how_much_when_and_what():
    fits = verdict(est.estimate("gpt2-xl", est.Plan(), "a100-80gb-sxm"))
    assert re.match(r"Fits: a step needs 29.5 GiB of 79.2 GiB, which leaves 49.8 GiB\. .*optimizer step", fits)
    not_so = verdict(est.estimate("gpt2-xl", est.Plan(batch_size=8), "a100-80gb-sxm"))
    assert not_so.startswith("Does not fit: a step needs ")
    assert "the backward pass, at the loss" in not_so
    assert "is activations" in not_so


@pytest.mark.parametrize(
    ("model", "plan", "wide"),
    [
        ("gpt2", est.Plan(batch_size=16), 4 + 4),  # the logits in fp32 and their gradient
        (
            "gpt2",
            est.Plan(batch_size=16, precision="bf16-mixed", attention="sdpa"),
            2 + 2 + 4,
        ),  # the loss works in fp32
        ("llama-3-8b", est.Plan(precision="bf16", attention="sdpa"), 2 + 2 + 4),
    ],
)
def test_the_verdict_says_what_the_logits_are_of_the_peak_and_what_chunking_saves(model, plan, wide):
    r = est.estimate(model, plan, "h100-80gb-sxm")
    chunked = est.estimate(model, plan.replace(loss="chunked"), "h100-80gb-sxm")
    T, V = plan.tokens(r.model), r.model.vocab_size
    assert r.memory.where.module == "loss"
    assert r.memory.logits == wide * plan.batch_size * T * V
    share, less = f"{r.memory.logits / r.memory.peak:.0%}", size(r.memory.needed - chunked.memory.needed)
    said = f"({plan.batch_size} x {T:,} x {V:,}) are {share} of the peak; a chunked loss would need {less} less."
    assert said in verdict(r)
    assert said in cli.verdict(r, 1)
    assert chunked.memory.logits == 0
    assert "logits" not in verdict(chunked)
