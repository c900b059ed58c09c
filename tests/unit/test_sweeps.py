"""A sweep is the estimate at every one of its points."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.answers.request import Request
from estimator.answers.sweeps import AXES, axis_values, point, spaced, sweep

GPT2 = Request("gpt2", est.preset("gpt2"), est.Plan(batch_size=4), "a100-80gb-sxm", 8, 0.4, 100, 64)
QWEN = replace(GPT2, name="qwen2.5-0.5b", model=est.preset("qwen2.5-0.5b"), plan=est.Plan(batch_size=2, seq_len=512))
PREDICTED = replace(GPT2, mfu=None)
MISTRAL = Request(
    "mistral-7b", est.preset("mistral-7b"), est.Plan(precision="bf16", attention="sdpa"), "h200-141gb-sxm"
)
LINES = [
    (MISTRAL, "seq_len", [1, 512, 4096, 4097, 4104, 8192]),
    (PREDICTED, "batch_size", [1, 2, 8, 64]),
    (replace(PREDICTED, network=3e9, count=16, clock=1_000.0, overlap=False), "batch_size", [1, 4]),
    (replace(PREDICTED, plan=est.Plan(compile=True), wide=("norm",)), "batch_size", [4]),
    (PREDICTED, "seq_len", [1, 64, 1024]),
    (PREDICTED, "num_layers", [1, 2, 40]),
    (PREDICTED, "count", [1, 2, 16]),
    (PREDICTED, "global_batch_size", [1, 64, 4096]),
    (replace(QWEN, mfu=None), "d_model", [28, 896]),
    (GPT2, "batch_size", [1, 2, 7, 64]),
    (GPT2, "seq_len", [1, 2, 33, 1024]),
    (GPT2, "num_layers", [1, 2, 3, 48]),
    (GPT2, "d_model", [12, 768, 1200]),
    (GPT2, "num_heads", [1, 8, 12, 96]),
    (GPT2, "d_ff", [1, 64, 3072]),
    (GPT2, "vocab_size", [1, 999, 50257]),
    (GPT2, "count", [1, 2, 1000]),
    (GPT2, "global_batch_size", [1, 64, 4096]),
    (GPT2, "steps", [1, 400_000]),
    (QWEN, "d_model", [28, 896, 1792]),
    (QWEN, "num_heads", [2, 14, 28]),
    (QWEN, "d_ff", [7, 4864]),
]


def holds(found, at, request):
    r = request.estimate()
    spent = est.cost(request.gpu, r.time.seconds, request.count)
    assert found["peak"][at] == r.memory.peak
    assert found["needed"][at] == pytest.approx(r.memory.needed, abs=2**21)
    assert found["flops"][at] == pytest.approx(r.flops.model)
    assert found["seconds"][at] == pytest.approx(r.time.seconds_per_step)
    assert found["tokens_per_second"][at] == pytest.approx(r.time.tokens_per_second)
    assert found["hours"][at] == pytest.approx(r.time.hours)
    assert found["dollars"][at] == pytest.approx(spent.dollars.median)
    assert found["kilowatt_hours"][at] == pytest.approx(spent.kilowatt_hours)


@pytest.mark.parametrize(("request_", "axis", "values"), LINES)
def test_every_point_of_a_line_is_the_estimate(request_, axis, values):
    found = sweep(request_, {axis: values})
    for i, value in enumerate(values):
        holds(found, i, point(request_, {axis: value}))


def test_layers_of_a_model_with_two_groups_of_blocks():
    """DeepSeek-V3's dense layers and its sparse ones, of which a shallow model has one or two that do not repeat."""
    request = Request("deepseek-v3", est.preset("deepseek-v3"), est.Plan(precision="bf16", seq_len=64), "h100-80gb-sxm")
    layers = [3, 4, 5, 6, 61]
    found = sweep(request, {"num_layers": layers})
    for i, value in enumerate(layers):
        holds(found, i, point(request, {"num_layers": value}))


@pytest.mark.parametrize(
    "axes",
    [
        {"batch_size": [1, 2, 5], "seq_len": [1, 128, 512, 1024]},
        {"d_model": [96, 768], "num_heads": [2, 12, 24]},
        {"count": [1, 8], "num_layers": [2, 12, 13]},
    ],
)
@pytest.mark.parametrize("request_", [GPT2, PREDICTED])
def test_a_plane_is_its_points(request_, axes):
    found = sweep(request_, axes)
    (x, xs), (y, ys) = axes.items()
    assert found["peak"].shape == (len(xs), len(ys))
    for i, a in enumerate(xs):
        for j, b in enumerate(ys):
            holds(found, (i, j), point(request_, {x: a, y: b}))


def test_a_price_of_ones_own():
    assert sweep(GPT2, {"steps": [100]}, price=2.5)["dollars"] == pytest.approx(GPT2.estimate().time.hours * 8 * 2.5)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 1000), st.integers(0, 1000), st.integers(2, 200), st.booleans())
def test_spacing_covers_its_range(least, width, points, logarithmic):
    found = spaced(least, least + width, points, logarithmic=logarithmic)
    assert found[0] == least
    assert found[-1] == least + width
    assert len(found) <= points
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("request_", [GPT2, QWEN])
@pytest.mark.parametrize("axis", AXES)
def test_an_axis_has_only_values_that_can_be(request_, axis):
    found = axis_values(request_, axis, 1, 512, 20, logarithmic=True)
    assert 1 < len(found) <= 20
    assert found.min() >= 1
    assert found.max() <= 512
    for value in found:
        point(request_, {axis: int(value)})


def test_what_cannot_be_swept_is_refused():
    for axes, said in (
        ({"head_dim": [1]}, "axis = 'head_dim'"),
        ({"steps": [1], "count": [1], "d_ff": [1]}, "one or two"),
        ({}, "one or two"),
        ({"seq_len": [2048]}, "1024 positions"),
        ({"d_model": [7]}, "divisible by num_heads"),
        ({"d_ff": [10**9]}, "d_ff = 1000000000: must be at most"),
        ({"vocab_size": [10**9], "batch_size": [10**6]}, "beyond 2"),
    ):
        with pytest.raises(est.ConfigError, match=said):
            sweep(GPT2, axes)
    for given_, said in (
        (("batch_size", 5, 2, 10), "range"),
        (("batch_size", 0, 2, 10), "range"),
        (("batch_size", 1, 2, 1), "points"),
        (("seq_len", 1, 1025, 10), "1024 positions"),
        (("d_model", 13, 23, 10), "no value between them"),
        (("num_heads", 5, 5, 10), "no value between them"),
    ):
        with pytest.raises(est.ConfigError, match=said):
            axis_values(GPT2, *given_)
