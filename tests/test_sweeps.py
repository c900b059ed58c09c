"""A sweep is the estimate at every one of its points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import estimator as est
from estimator.report import Request
from estimator.sweeps import LETTERS, spaced, sweep

MODEL = est.preset("gpt2")
REQUEST = Request("gpt2", MODEL, est.Plan(batch_size=4), "a100-80gb-sxm", mfu=0.4, steps=100, global_batch_size=64)


def at(field, value):
    if field in ("batch_size", "seq_len"):
        return est.estimate(
            MODEL, REQUEST.plan.replace(**{field: value}), REQUEST.gpu, mfu=0.4, steps=100, global_batch_size=64
        )
    return est.estimate(
        MODEL.replace(**{field: value}), REQUEST.plan, REQUEST.gpu, mfu=0.4, steps=100, global_batch_size=64
    )


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("batch_size", [1, 2, 7, 64]),
        ("seq_len", [1, 2, 33, 1024]),
        ("num_layers", [1, 2, 3, 48]),
        ("d_ff", [1, 64, 3072]),
        ("vocab_size", [1, 999, 50257]),
    ],
)
def test_every_point_of_a_line_is_the_estimate(field, values):
    found = sweep(REQUEST, {field: values})
    for i, value in enumerate(values):
        r = at(field, value)
        assert found["peak"][i] == r.memory.peak
        assert found["seconds"][i] == pytest.approx(r.time.seconds_per_step)
        assert found["needed"][i] == pytest.approx(r.memory.needed, abs=2**21)


def test_a_plane_is_its_lines():
    batches, lengths = [1, 2, 5], [1, 128, 512, 1024]
    plane = sweep(REQUEST, {"batch_size": batches, "seq_len": lengths})
    assert plane["peak"].shape == (3, 4)
    for i, batch in enumerate(batches):
        for j, length in enumerate(lengths):
            plan = REQUEST.plan.replace(batch_size=batch, seq_len=length)
            assert plane["peak"][i, j] == est.estimate(MODEL, plan, REQUEST.gpu).memory.peak


@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(2, 200), st.booleans())
def test_spacing_covers_its_range(least, width, points, logarithmic):
    found = spaced(least, least + width, points, logarithmic=logarithmic)
    assert found[0] == least
    assert found[-1] == least + width
    assert len(found) <= points
    assert (np.diff(found) > 0).all()


def test_what_cannot_be_swept_is_refused():
    with pytest.raises(est.ConfigError, match="d_model"):
        sweep(REQUEST, {"d_model": [1]})
    with pytest.raises(est.ConfigError, match="one or two"):
        sweep(REQUEST, {name: [1] for name in LETTERS})
    with pytest.raises(est.ConfigError, match="1024 positions"):
        sweep(REQUEST, {"seq_len": [2048]})
    with pytest.raises(est.ConfigError, match="range"):
        spaced(5, 2, 10)
