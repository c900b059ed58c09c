"""Compute-optimal plans: the published optimum, the calculus behind the closed form, budgets in three currencies."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.catalogue import read_data
from estimator.describe.checks import ConfigError
from estimator.hardware.accelerators import accelerator
from estimator.pricing.planning import (
    budget,
    compute_optimal,
    fits,
    predicted_loss,
    tokens_for,
)

flops_st = st.floats(15, 28).map(lambda exponent: 10**exponent)
fit_st = st.sampled_from(fits())


def test_the_constants_are_those_of_the_papers():
    assert fits() == ("hoffmann-2022", "hoffmann-2022-unrounded", "besiroglu-2024")
    constants = read_data("planning")["fit"]
    h = constants["hoffmann-2022"]
    assert [h[name] for name in ("E", "A", "B", "alpha", "beta")] == [1.69, 406.4, 410.7, 0.34, 0.28]
    unrounded = constants["hoffmann-2022-unrounded"]  # published as logarithms
    for name, log in (("E", 0.5267228), ("A", 6.0073404), ("B", 6.0179186)):
        assert unrounded[name] == pytest.approx(math.exp(log), rel=1e-8)
    for table in (*constants.values(), *read_data("planning")["mfu"]):
        assert re.fullmatch(r"20\d\d-\d\d", table["date"])
        assert table["source"]


# C of Chinchilla 70B on 1.4 T tokens. Figures computed from the papers' constants; 20 tokens a parameter were trained.
@pytest.mark.parametrize(
    ("fit", "parameters", "tokens", "ratio"),
    [("hoffmann-2022", 3.22e10, 2.98e12, 93), ("besiroglu-2024", 7.24e10, 1.33e12, 18.3)],
)
def test_the_optimum_at_chinchillas_budget(fit, parameters, tokens, ratio):
    plan = compute_optimal(5.76e23, fit=fit)
    assert plan.parameters == pytest.approx(parameters, rel=2e-3)
    assert plan.tokens == pytest.approx(tokens, rel=3e-3)
    assert plan.best.tokens_per_parameter == pytest.approx(ratio, rel=5e-3)
    low, high = plan.parameters_range
    assert (low, high) == (pytest.approx(3.22e10, rel=2e-3), pytest.approx(7.24e10, rel=2e-3))


@given(flops_st, fit_st, st.floats(-2, 2).filter(lambda x: abs(x) > 1e-3))
def test_no_other_split_of_the_budget_has_a_lower_loss(flops, fit, log_ratio):
    plan = compute_optimal(flops, fit=fit)
    other = plan.parameters * math.exp(log_ratio)
    assert predicted_loss(other, flops / 6 / other, fit) >= plan.loss
    assert predicted_loss(plan.parameters, plan.tokens, fit) == plan.loss


@given(flops_st, fit_st)
def test_the_plan_spends_the_budget_and_its_parts_agree(flops, fit):
    plan = compute_optimal(flops, fit=fit)
    assert 6 * plan.parameters * plan.tokens == pytest.approx(flops)
    assert tokens_for(plan.parameters, fit) == pytest.approx(plan.tokens, rel=1e-6)
    assert plan.best in plan.by_fit
    assert tuple(optimum.fit for optimum in plan.by_fit) == fits()
    for optimum in plan.by_fit:
        assert plan.parameters_range[0] <= optimum.parameters <= plan.parameters_range[1]
        assert plan.tokens_range[0] <= optimum.tokens <= plan.tokens_range[1]


@given(flops_st, st.floats(1.01, 100), fit_st)
def test_more_compute_is_a_larger_model_more_tokens_and_less_loss(flops, factor, fit):
    less, more = compute_optimal(flops, fit=fit), compute_optimal(flops * factor, fit=fit)
    assert more.parameters > less.parameters
    assert more.tokens > less.tokens
    assert more.loss < less.loss
    # Power laws whose exponents add up to one, read here off two budgets.
    n = math.log(more.parameters / less.parameters) / math.log(factor)
    d = math.log(more.tokens / less.tokens) / math.log(factor)
    expected = {"hoffmann-2022": 0.4516, "hoffmann-2022-unrounded": 0.4565, "besiroglu-2024": 0.5126}
    assert n == pytest.approx(expected[fit], abs=2e-4)
    assert n + d == pytest.approx(1)


@given(st.floats(6, 13).map(lambda x: 10**x), st.floats(6, 14).map(lambda x: 10**x), st.floats(1.01, 10), fit_st)
def test_loss_falls_with_parameters_and_tokens_towards_its_floor(n, d, factor, fit):
    loss = predicted_loss(n, d, fit)
    assert predicted_loss(n * factor, d, fit) < loss
    assert predicted_loss(n, d * factor, fit) < loss
    assert predicted_loss(1e40, 1e40, fit) == pytest.approx(read_data("planning")["fit"][fit]["E"], abs=1e-3)


@given(st.floats(0.01, 1e5), st.integers(1, 10_000), st.floats(0.01, 1))
def test_hours_and_flops_are_two_names_of_one_budget(hours, count, mfu):
    by_hours = budget(hours=hours, accelerator="h100 sxm", count=count, mfu=mfu)
    assert by_hours.flops == pytest.approx(hours * 3600 * count * 989.4e12 * mfu)
    by_flops = budget(flops=by_hours.flops, accelerator="h100 sxm", count=count, mfu=mfu)
    assert by_flops.hours == pytest.approx(hours)
    assert by_flops.cost.accelerator_hours == pytest.approx(hours * count)


@given(st.floats(1, 1e9), st.integers(1, 1000), st.floats(0.1, 50))
def test_dollars_buy_hours_at_the_users_price(dollars, count, price):
    b = budget(dollars=dollars, accelerator="h100 sxm", count=count, mfu=0.4, price=price)
    assert b.cost.accelerator_hours == pytest.approx(dollars / price)
    assert b.hours * count == pytest.approx(dollars / price)
    assert b.cost.dollars.median == pytest.approx(dollars)
    alone = budget(dollars=dollars, accelerator="h100 sxm", mfu=0.4, price=price)
    assert alone.flops == pytest.approx(b.flops)  # the count changes how long it takes, not what it buys


def test_dollars_buy_hours_at_the_median_price_on_file():
    b = budget(dollars=1e6, accelerator="h100 sxm", count=64, mfu=0.4)
    assert b.cost.dollars.median == pytest.approx(1e6)
    assert b.cost.dollars.low < 1e6 < b.cost.dollars.high
    assert b.cost.prices


def test_an_mfu_that_is_not_given_is_the_published_runs_and_said():
    b = budget(hours=1, accelerator="h100 sxm")
    assert b.mfu == pytest.approx((0.43 + 0.33) / 2)  # the two in the middle of four
    assert b.assumptions[0].startswith("mfu = 0.38 (the median of published runs: LLaMA 65B, A100 0.48,")
    assert not any("mfu" in said for said in budget(hours=1, accelerator="h100 sxm", mfu=0.5).assumptions)


# 6 N D over the hours of the model card: what the stored MFU claims, from the other side.
@pytest.mark.parametrize(
    ("run", "parameters", "tokens", "hours", "id_"),
    [
        ("LLaMA 65B, A100", 65.2e9, 1.4e12, 1_022_362, "a100-80gb-sxm"),
        ("Llama 2 70B, A100", 70e9, 2e12, 1_720_320, "a100-80gb-sxm"),
        ("Llama 3 70B, H100", 70.6e9, 15e12, 6.4e6, "h100-80gb-sxm"),
        ("Llama 3.1 405B, H100", 405.9e9, 15e12, 30.84e6, "h100-80gb-sxm"),
    ],
)
def test_published_mfu_follows_from_the_published_hours(run, parameters, tokens, hours, id_):
    stored = {entry["run"]: entry["value"] for entry in read_data("planning")["mfu"]}
    peak = accelerator(id_).peak_flops("bf16")
    assert stored[run] == pytest.approx(6 * parameters * tokens / (hours * 3600 * peak), abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "budget = None: must be exactly one of flops, dollars and hours"),
        ({"flops": 1e20, "hours": 3}, "budget = flops, hours: must be exactly one of"),
        ({"flops": 0}, "flops = 0: must be a finite number above 0"),
        ({"flops": -1e20}, "flops = -1e+20"),
        ({"flops": float("nan")}, "flops = nan"),
        ({"flops": "1e20"}, "flops = '1e20'"),
        ({"flops": 1e99}, "flops = 1e+99: must be a finite number above 0 and at most 1e+40"),
        ({"flops": 1e20, "fit": "hofmann"}, "fit = 'hofmann': did you mean hoffmann-2022"),
        ({"hours": 3}, "accelerator = None: must be given to turn hours into FLOPs"),
        ({"dollars": 3}, "accelerator = None: must be given to turn dollars into FLOPs"),
        ({"hours": 3, "accelerator": "H100"}, "accelerator = 'H100': could be any of"),
        ({"hours": 3, "accelerator": "t4"}, "dtype = 'bf16': t4-16gb has a peak for fp32, fp16"),
        ({"hours": 3, "accelerator": "l4", "mfu": 1.5}, "mfu = 1.5: must be a finite number above 0 and at most 1"),
        ({"hours": 3, "accelerator": "l4", "mfu": 0}, "mfu = 0"),
        ({"hours": 3, "accelerator": "l4", "count": 0}, "count = 0"),
        ({"dollars": 3, "accelerator": "l4"}, "no on-demand price is on file for l4-24gb"),
        ({"dollars": 3, "accelerator": "l4", "price": 0}, "price = 0: must be above 0"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        compute_optimal(**arguments)
