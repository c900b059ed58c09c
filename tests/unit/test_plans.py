"""Plans: within what was asked, and each option is the estimate of a whole configuration with a price on file."""

from __future__ import annotations

import json
import shlex
from functools import cache

import pytest

import estimator as est
from estimator.answers.plans import COUNTS, count_parameters, plan, shaped
from estimator.pricing.money import prices
from estimator.show import commands, planning

CARDS = ("a100-80gb-sxm", "h100-80gb-sxm", "l40s-48gb")
SOME = {"accelerators": CARDS, "counts": (1, 4, 8, 16)}
QUESTIONS = {
    "money": {"dollars": 500},
    "money and time": {"dollars": 3000, "days": 2},
    "tokens and time": {"tokens": 26e9, "days": 3},
    "tokens and size": {"parameters": 3e8, "tokens": 6e9},
    "a model's tokens from money": {"model": "gpt2-xl", "dollars": 300},
    "a model and hours": {"model": "gpt2-medium", "hours": 12},
    "a model": {"model": "gpt2"},
    "a ratio of one's own": {"tokens": 10e9, "tokens_per_parameter": 50},
}


@cache
def found(name):
    return plan(**QUESTIONS[name], **SOME)


@pytest.mark.parametrize("name", QUESTIONS)
def test_each_option_is_within_the_limits_and_the_estimate_of_its_configuration(name):
    asked, answer = QUESTIONS[name], found(name)
    assert answer.options
    for o in answer.options:
        assert o.dollars <= asked.get("dollars", float("inf"))
        assert o.days <= asked.get("days", asked.get("hours", float("inf")) / (24 if "hours" in asked else 1)) + 1e-9
    for o in answer.options[:3]:
        r = o.request.estimate()
        assert r.fits
        assert r.memory.needed == o.needed
        assert r.values.parameters == o.parameters
        assert r.time.hours == pytest.approx(o.hours)
        assert (r.time.interval.low / 3600, r.time.interval.high / 3600) == pytest.approx((o.low, o.high))
        assert o.tokens == o.steps * o.global_batch_size * r.plan.tokens(r.model)
        assert o.dollars == pytest.approx(o.hours * o.paid * o.price.usd_per_hour)
        spent = est.cost(o.accelerator, r.time.seconds, o.paid)
        assert (o.kilowatt_hours, o.co2_kg) == pytest.approx((spent.kilowatt_hours, spent.co2_kg))
        assert o.price in prices(o.accelerator, "on-demand")
        assert o.price.verified
        assert o.paid >= o.count
        assert o.paid % o.price.count == 0


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_pair_is_an_option_or_left_out_with_a_reason(name):
    answer = found(name)
    assert len(answer.options) + sum(answer.refused.values()) == len(CARDS) * len(SOME["counts"])


def test_what_is_sought_uses_what_there_is():
    """The largest model for the money spends most of it, and so does the most tokens."""
    for name, least in (("money", 0.8), ("a model's tokens from money", 0.95)):
        first = found(name).options[0]
        assert first.dollars > least * QUESTIONS[name]["dollars"]
    assert found("tokens and time").options[0].parameters == pytest.approx(26e9 / 20, rel=0.03)
    assert found("a ratio of one's own").options[0].parameters == pytest.approx(10e9 / 50, rel=0.03)
    more = plan(dollars=2000, **SOME)
    assert more.options[0].parameters == pytest.approx(2 * found("money").options[0].parameters, rel=0.2)


def test_the_order_and_the_front():
    answer = plan(parameters=3e8, tokens=6e9, sort="time", **SOME)
    hours = [o.hours for o in answer.options]
    assert hours == sorted(hours)
    for o in answer.options:
        beaten = any(x.hours < o.hours and x.dollars < o.dollars for x in answer.options)
        assert o.best != beaten
    front = answer.front
    assert [o.hours for o in front] == sorted((o.hours for o in front), reverse=True)
    assert list(answer.to_frame()["hours"]) == hours
    json.dumps(answer.to_dict(), allow_nan=False)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_best_are_those_that_no_other_beats_in_what_is_traded(name):
    """Where a limit is spent by all, what is left to be better in is what is bought with it."""
    asked, answer = QUESTIONS[name], found(name)
    buys = {"money": ("hours", "size"), "a model and hours": ("dollars", "size")}
    assert answer.trade == buys.get(name, answer.trade)
    assert (answer.trade == ("hours", "dollars")) == (answer.sort == "cost")

    def better(x, y):
        """By more than sizes are solved for, which is some percent."""
        if answer.trade[1] == "dollars":
            return x.hours < y.hours and x.dollars < y.dollars
        spent = answer.trade[0]
        return getattr(x, spent) < getattr(y, spent) and x.parameters * x.tokens > 1.07 * y.parameters * y.tokens

    assert answer.front
    for o in answer.front:
        assert not any(better(x, o) for x in answer.options)
    if "dollars" in asked:
        assert min(answer.options, key=lambda o: o.hours) in answer.front


def test_what_a_page_asks_is_a_command_and_python(monkeypatch):
    asked = {"dollars": 300.0, "days": 2.5, "tokens": 26.123456789e9, "model": "gpt2", "sort": "time", "price": "spot"}
    said = {}
    monkeypatch.setattr("estimator.answers.plans.plan", lambda model, **given: said.update(given, model=model))
    monkeypatch.setattr(planning, "said", lambda *_: "")
    assert commands.main(shlex.split(planning.command(asked))[1:]) == 0
    assert {name: said[name] for name in asked} == asked
    words = planning.python(asked).partition("est.plan(")[2].partition(")\n")[0]
    assert eval(f"dict({words})") == asked  # noqa: S307 - our own words
    assert planning.command({"dollars": 5000.0}) == "estimate plan --budget 5000"


@pytest.mark.parametrize("size", [2e7, 1.3e8, 1.3e9, 7e9, 7e10])
def test_a_shape_has_about_the_parameters_that_were_asked_for(size):
    m = shaped(size)
    assert count_parameters(m) == est.account(m, est.Plan()).evaluate(m, est.Plan()).parameters
    assert count_parameters(m) == pytest.approx(size, rel=0.06)
    assert m.d_model % 128 == 0


def test_the_default_considers_every_priced_accelerator():
    names = {o.accelerator for o in plan(model="gpt2", tokens=1e8, counts=(1,)).options}
    assert {"a100-80gb-sxm", "h100-80gb-sxm", "b200-180gb-sxm", "rtx-4090-24gb"} <= names
    assert COUNTS[0] == 1
    assert est.budget is est.plan


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "nothing is given"),
        ({"dollars": 0}, "dollars = 0"),
        ({"dollars": float("inf")}, "dollars = inf"),
        ({"days": 1, "hours": 1}, "allowed is one of them"),
        ({"model": "gpt2", "parameters": 1e9}, "a model is given too"),
        ({"model": "gpt2", "tokens": 1e9, "tokens_per_parameter": 3}, "two of the three"),
        ({"dollars": 5, "accelerators": ["A100"]}, "could be any of"),
        ({"dollars": 5, "price": "cheap"}, "kind of price"),
        ({"dollars": 5, "sort": "best"}, "sort = 'best'"),
        ({"model": "gpt2", "counts": [0]}, "count = 0"),
    ],
)
def test_what_cannot_be_asked_is_one_error(asked, said):
    with pytest.raises(est.ConfigError, match=said):
        plan(**asked)


def test_the_command_answers_in_a_sentence_and_a_table(capsys):
    argv = ["plan", "--tokens", "26e9", "--max-days", "3", "--gpu", "a100-80gb-sxm", "--gpu", "h100-80gb-sxm"]
    assert commands.main([*argv, "--count", "8"]) == 0
    out = capsys.readouterr().out
    cheapest = plan(tokens=26e9, days=3, accelerators=CARDS[:2], counts=(8,)).options[0]
    assert out.startswith("Cheapest: 1.29B parameters on 26.0B tokens, on 8 x ")
    assert cheapest.price.provider in out
    assert cheapest.price.date in out
    assert commands.main(["budget", "--budget", "1e-6", "--gpu", "t4-16gb"]) == 0
    assert "Nothing fits within this" in capsys.readouterr().out
