"""Padding: it takes memory and time as text does, and is none."""

import json

import pytest

import estimator as est
from estimator.show import commands


def test_padding_is_computed_and_is_no_text():
    m, p = est.preset("gpt2"), est.Plan(precision="bf16-mixed")
    full, padded = (est.estimate(m, p, "a100-80gb-sxm", padding=x) for x in (0.0, 0.25))
    assert padded.time.seconds_per_step == full.time.seconds_per_step
    assert padded.memory.needed == full.memory.needed
    assert padded.time.tokens_per_second == full.time.tokens_per_second == full.time.text_tokens_per_second
    assert padded.time.text_tokens_per_second == pytest.approx(0.75 * full.time.tokens_per_second)


def test_so_many_tokens_of_text_take_more_steps(capsys):
    def steps(*more):
        words = ["gpt2", "--precision", "bf16-mixed", "--tokens", "1e9", "--global-batch-size", "512", "--json", *more]
        assert commands.main(words) == 0
        return json.loads(capsys.readouterr().out)["time"]["steps"]

    assert steps() == -(-(10**9) // (512 * 1024))
    assert steps("--padding", "0.5") == -(-(10**9) // (512 * 512))
