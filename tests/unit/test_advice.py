"""Advice is computed, sorted, and true: the change that it names, made, gives the figures that it shows."""

from dataclasses import fields

import pytest

import estimator as est
from estimator.answers.advice import advice, choices, single_changes

PLANS = [est.Plan(), est.Plan(batch_size=8), est.Plan(batch_size=4, attention="sdpa", checkpointing="block")]


@pytest.mark.parametrize("plan", PLANS)
def test_each_change_gives_what_it_promises(plan):
    now = est.estimate("gpt2-medium", plan, "t4-16gb", mfu=0.4)
    found = advice(now)
    assert found
    for change in found:
        then = est.estimate("gpt2-medium", plan.replace(**change.fields), "t4-16gb")
        assert now.memory.needed - then.memory.needed == change.saves
        assert change.fits == then.fits
    fits = [change.fits for change in found]
    assert fits == sorted(fits, reverse=True)
    assert any(change.saves > 0 for change in found)


def test_every_named_choice_of_a_plan_is_tried():
    tried = [name for change in single_changes(est.Plan(batch_size=2)) for name in change]
    assert set(choices()) <= set(tried)
    assert "batch_size" in tried
    assert {f.name for f in fields(est.Plan)} >= set(tried)


def test_a_change_never_changes_the_tokens_of_a_step():
    plan = est.Plan(batch_size=6, grad_accumulation=3)
    for change in single_changes(plan):
        other = plan.replace(**{k: v for k, v in change.items() if k in ("batch_size", "grad_accumulation")})
        assert other.batch_size * other.grad_accumulation == 18


def test_a_kernel_that_has_two_names_is_advised_once():
    found = [change.fields["attention"] for change in advice(est.estimate("gpt2", est.Plan(), "t4-16gb"))
             if "attention" in change.fields]  # fmt: skip
    assert "sdpa" in found  # on CUDA in fp32 it is the memory-efficient kernel
    assert "sdpa-efficient" not in found


def test_checkpointing_of_every_second_block_can_be_undone_and_left_off():
    plan = est.Plan(checkpointing="block", checkpoint_every=2)
    tried = list(single_changes(plan))
    assert {"checkpoint_every": 1} in tried
    assert {"checkpointing": "none", "checkpoint_every": 1} in tried
