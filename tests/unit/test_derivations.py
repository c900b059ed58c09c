"""Formulas are worth showing only if they give the figure: each is evaluated here by sympy and as Python."""

import json
import math

import pytest
import sympy

import estimator as est
from estimator.answers import derivations

CASES = [
    ("gpt2-xl", est.Plan(), "a100-80gb-sxm"),
    ("gpt2", est.Plan(batch_size=8, attention="sdpa"), "h100-80gb-sxm"),
    ("llama-3-8b", est.Plan(batch_size=1, checkpointing="block"), "h200-141gb-sxm"),
    ("gpt2", est.Plan(batch_size=2, checkpointing="block", checkpoint_every=5), "a100-80gb-sxm"),
    ("qwen2.5-0.5b", est.Plan(batch_size=4, seq_len=4096), "l4-24gb"),
]


@pytest.mark.parametrize(("model", "plan", "gpu"), CASES)
def test_every_formula_gives_its_figure(model, plan, gpu):
    r = est.estimate(model, plan, gpu, mfu=0.4, steps=1000, global_batch_size=512, count=4)
    shown = derivations.headline(r, 4)
    assert {d.name for d in shown} >= {"peak", "needed", "hours", "parameters", "forward_flops"}
    for d in shown:
        assert d.formula.free_symbols == set(d.values)
        value = d.formula.subs({symbol: sympy.Rational(str(x)) for symbol, x in d.values.items()})
        if isinstance(d.result, int):
            assert int(value) == d.result  # the middle of the context is rounded down
        else:
            assert math.isclose(float(value), d.result, rel_tol=1e-12)
        assert r"\text" not in d.latex
        assert not any(symbol.name in d.substituted for symbol in d.values if len(symbol.name) > 1)


def test_the_peak_is_the_ruling_polynomial():
    r = est.estimate("gpt2-xl", est.Plan(batch_size=8))
    assert derivations.peak(r).result == r.memory.peak
    assert derivations.form(r, "parameters").result == 1_557_611_200


def test_a_formula_says_which_numbers_of_blocks_it_is_for():
    plan = est.Plan(checkpointing="selective", checkpoint_every=5)
    said = derivations.form(est.estimate("gpt2", plan), "activation_bytes").source
    assert "2 more than a multiple of 5" in said
    assert "a multiple of 3" in derivations.peak(est.estimate("gpt2", plan.replace(checkpoint_every=3))).source
    assert "multiple" not in derivations.peak(est.estimate("gpt2", plan.replace(checkpoint_every=1))).source


def test_numbers_in_latex():
    assert derivations.latex_number(1024) == "1{,}024"
    assert derivations.latex_number(1.95e13) == r"1.95 \cdot 10^{13}"
    assert derivations.latex_number(0.5) == "0.5"


def test_an_unknown_form_is_refused_with_the_nearest():
    with pytest.raises(est.ConfigError, match="parameters"):
        derivations.form(est.estimate("gpt2"), "parametres")


def test_changed_symbols_change_the_result():
    d = derivations.form(est.estimate("gpt2"), "parameters")
    assert derivations.at_sizes(d, {}).result == d.result
    assert (
        derivations.at_sizes(d, {"L": 24}).result
        == est.estimate(est.preset("gpt2").replace(num_layers=24)).values.parameters
    )
    with pytest.raises(est.ConfigError, match="symbol"):
        derivations.at_sizes(d, {"B": 2})


def test_json_holds_the_formula():
    d = derivations.form(est.estimate("gpt2", est.Plan(batch_size=2)), "forward_flops")
    plain = json.loads(derivations.to_json(d))
    assert eval(plain["python"], {}, plain["values"]) == d.result  # noqa: S307 - that it evaluates is what is tested


def test_the_regions_are_where_each_polynomial_rules():
    r = est.estimate("gpt2", est.Plan())
    batches, lengths = [2, 8, 64], [2, 64, 1024]
    found = derivations.regions(r, batches, lengths)
    for i, batch in enumerate(batches):
        for j, length in enumerate(lengths):
            there = est.estimate("gpt2", est.Plan(batch_size=batch, seq_len=length))
            assert found.account is there.account
            assert found.index[i, j] == derivations.ruling(there)
    with pytest.raises(est.ConfigError, match="batches = 1"):
        derivations.regions(r, [1], [2])
