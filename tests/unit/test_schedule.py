import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError
from trainer.optim.schedule import lr_cosine_schedule
from trainer.run.lr_experiment import LEARNING_RATES, STEPS, main, plot, run, verdict

schedules = st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(0, 50), st.integers(0, 50)).map(
    lambda x: {"lr_max": max(x[:2]), "lr_min": min(x[:2]), "t_w": min(x[2:]), "t_c": max(x[2:])}
)


@given(schedules, st.integers(0, 120))
def test_rises_to_the_maximum_then_falls_to_the_minimum(s, t):
    now, then = lr_cosine_schedule(t, **s), lr_cosine_schedule(t + 1, **s)
    assert 0 <= now <= s["lr_max"] * (1 + 1e-12)
    if t + 1 < s["t_w"]:
        assert now <= then
    if t >= s["t_w"]:
        assert now >= s["lr_min"] * (1 - 1e-12)
        assert now >= then * (1 - 1e-12)
    if t >= s["t_c"]:
        assert now == s["lr_min"]
    if t == s["t_w"] < s["t_c"]:
        assert now == pytest.approx(s["lr_max"])


@given(schedules.filter(lambda s: s["t_c"] > s["t_w"]))
def test_is_symmetric_about_the_middle_of_the_cosine(s):
    for k in range((s["t_c"] - s["t_w"]) // 2 + 1):
        both = lr_cosine_schedule(s["t_w"] + k, **s) + lr_cosine_schedule(s["t_c"] - k, **s)
        assert both == pytest.approx(s["lr_max"] + s["lr_min"])


def test_worked_by_hand():
    # Warm-up of 4 steps to 8, cosine of 6 steps to 2: cos(60 degrees) = 1/2 and cos(120 degrees) = -1/2 are exact.
    expected = {0: 0, 1: 2, 3: 6, 4: 8, 6: 6.5, 7: 5, 8: 3.5, 10: 2, 11: 2, 1000: 2}
    assert {t: lr_cosine_schedule(t, 8, 2, 4, 10) for t in expected} == pytest.approx(expected)


def test_lengths_of_zero():
    assert lr_cosine_schedule(0, 1.0, 0.1, 0, 10) == 1.0  # no warm-up
    assert [lr_cosine_schedule(t, 1.0, 0.1, 2, 2) for t in range(4)] == [0.0, 0.5, 0.1, 0.1]  # no cosine
    assert lr_cosine_schedule(0, 1.0, 0.1, 0, 0) == 0.1  # neither


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": -1}, "t = -1"),
        ({"lr_min": -0.1}, "lr_min = -0.1"),
        ({"lr_max": 0.01}, r"lr_max = 0.01: must be at least lr_min \(0.1\)"),
        ({"lr_max": math.nan}, "lr_max = nan"),
        ({"lr_max": math.inf}, "lr_max = inf"),
        ({"t_w": -1}, "t_w = -1"),
        ({"t_c": 1}, r"t_c = 1: must be at least t_w \(2\)"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ConfigError, match=message):
        lr_cosine_schedule(**{"t": 0, "lr_max": 1.0, "lr_min": 0.1, "t_w": 2, "t_c": 5, **change})


def test_the_answer_to_the_learning_rate_question():
    losses = {lr: run(lr) for lr in LEARNING_RATES}
    assert [verdict(losses[lr]) for lr in LEARNING_RATES] == ["decays slowly", "decays", "decays fast", "diverges"]
    assert losses[1e2][-1] < losses[1e1][-1] < losses[1.0][-1] < losses[1.0][0] < losses[1e3][-1]
    assert losses[1e2][1] == pytest.approx(losses[1e2][0])  # the first step at 1e2 turns every sign: as in the notes


@pytest.mark.parametrize("seed", range(3))
def test_the_answer_does_not_depend_on_the_seed(seed):
    # Step t multiplies every weight by 1 - 2 lr / (100 sqrt(t + 1)): the ratio of two losses is free of the weights.
    for lr in (1.0, 1e1, 1e3):
        losses = run(lr, seed=seed)
        for t in range(STEPS):
            factor = (1 - 2 * lr / 100 / math.sqrt(t + 1)) ** 2
            assert losses[t + 1] / losses[t] == pytest.approx(factor, rel=1e-4)


def test_the_experiment_prints_a_table_and_a_plot(capsys):
    main()
    out = capsys.readouterr().out
    for text in ("decays slowly", "decays fast", "diverges", "step   0     1"):
        assert text in out


def test_the_plot_puts_the_greatest_loss_on_top_and_the_least_below():
    rows = plot({"a": [1.0, 1e-9], "b": [1.0, 1e6]}).splitlines()
    assert rows[0].startswith("1e+06 |")
    assert rows[0].endswith("b")
    assert rows[-3].startswith("1e-09 |")
    assert rows[-3].endswith("a")
    assert sum("*" in row for row in rows) == 1
