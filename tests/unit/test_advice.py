"""Advice is computed, sorted, and true: the change that it names, made, gives the figures that it shows."""

from dataclasses import fields

import pytest

import estimator as est
from estimator.accounting import accounts
from estimator.answers.advice import GOALS, MOST, Advisor, advice, chunking_saves, single_changes
from estimator.describe.settings import choices
from estimator.show import commands
from estimator.show.formatting import logits

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
    assert set(choices(est.Plan)) - {"implementation"} <= set(tried)  # whose code runs is not a change
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


SMALL = est.ModelConfig("gpt2", 6, 256, 8, 5000, 512)
LARGE = "t4-16gb"


def asked(change, model, gpu, plan, batch):
    """The change, asked for anew: of the plan with its fields, on the machine that it names."""
    machine = {"gpu": gpu, "count": plan.data_parallel, **change.machine}
    fresh = plan.replace(data_parallel=machine["count"], **{k: v for k, v in change.fields.items()
                                                            if k != "grad_accumulation"})  # fmt: skip
    return est.estimate(model, fresh, machine["gpu"], global_batch_size=batch), fresh, machine["gpu"]


@pytest.mark.parametrize("goal", GOALS)
def test_what_does_not_fit_ends_in_something_that_does_with_the_figures_that_it_says(goal):
    plan, batch = est.Plan(batch_size=256), 512
    now = est.estimate(SMALL, plan, LARGE, global_batch_size=batch)
    assert not now.fits
    found = Advisor(now, batch).improvements(goal)
    assert found
    assert all(change.fits for change in found)
    assert [change.size for change in found] == sorted(change.size for change in found)
    for change in found[:4]:
        then, fresh, gpu = asked(change, SMALL, LARGE, plan, batch)
        assert now.memory.needed - then.memory.needed == change.saves
        assert then.time.seconds_per_step / now.time.seconds_per_step == pytest.approx(change.seconds)
        assert change.largest == est.max_batch_size(SMALL, fresh, gpu, global_batch_size=batch)


def test_where_one_change_is_not_enough_there_are_sets_of_them():
    """14B parameters' worth of states in fp32 on one H100: neither half the bytes nor checkpointing alone do."""
    now = est.estimate("llama-3.1-8b", est.Plan(seq_len=4096), "h100-80gb-sxm")
    assert not any(change.fits for change in advice(now))
    found = Advisor(now).improvements()
    sets = [change for change in found if not change.machine]
    assert sets
    assert all(2 <= len(change.fields) <= MOST for change in sets)
    assert all(change.fits for change in found)


def test_where_no_set_fits_the_rows_end_with_more_accelerators_and_a_larger_one():
    plan = est.Plan(seq_len=2048, attention="sdpa", precision="bf16", checkpointing="block")
    now = est.estimate("qwen2.5-32b", plan, "l40s-48gb")
    found = Advisor(now).improvements()
    by = {name: change for change in found for name in change.machine}
    assert by["count"].fits
    assert by["count"].fields["sharding"] == "zero3"
    count = by["count"].machine["count"]
    fewer = now.plan.replace(**by["count"].fields, data_parallel=count // 2)
    assert not est.estimate("qwen2.5-32b", fewer, "l40s-48gb").fits
    assert by["gpu"].fits
    assert by["gpu"].estimate.memory.capacity > now.memory.capacity


@pytest.mark.parametrize("goal", GOALS)
def test_what_fits_is_bettered_with_each_further_change(goal):
    now = est.estimate("gpt2", est.Plan(batch_size=4), LARGE, global_batch_size=64)
    found = Advisor(now, 64).improvements(goal)
    assert found
    value = GOALS[goal]
    best = {}
    for change in found:
        assert change.fits
        best[change.size] = min(value(change), best.get(change.size, value(change)))
    assert max(best) <= MOST
    assert list(best.values()) == sorted(best.values(), reverse=True)
    assert len(best) > 1


def test_the_command_says_it_as_options_that_work(capsys):
    argv = ["gpt2", "--batch-size", "64", "--gpu", LARGE, "--global-batch-size", "128"]
    assert commands.main(argv) == 0
    printed = capsys.readouterr().out
    rows = printed.partition("What would make it fit\n")[2].splitlines()
    options, effect = rows[0].removesuffix(" *").split(), rows[1]
    assert effect.startswith("    fits: ")
    assert commands.main([*argv, *options]) == 0
    assert "Fits: needs" in capsys.readouterr().out
    assert commands.main(["gpt2", "--gpu", LARGE, "--optimise-for", "speed"]) == 0
    assert "What is better for speed" in capsys.readouterr().out


def test_what_no_accelerator_holds_is_said_so_after_a_step_or_two(monkeypatch):
    steps, run_step = [], accounts.run_step
    monkeypatch.setattr(accounts, "run_step", lambda *args: steps.append(args) or run_step(*args))
    now = est.estimate("deepseek-v3", est.Plan(seq_len=4096), "h100-80gb-sxm")
    assert Advisor(now).improvements() == ()
    assert len(steps) <= 3  # as it is, and of its thriftiest shares


def test_what_only_many_accelerators_hold_is_shared_among_the_fewest():
    now = est.estimate("llama-3.1-405b", est.Plan(seq_len=4096), "h100-80gb-sxm")
    (change, *_) = Advisor(now).improvements()
    assert change.fits
    fewer = now.plan.replace(**change.fields, data_parallel=change.machine["count"] // 2)
    assert not est.estimate("llama-3.1-405b", fewer, "h100-80gb-sxm").fits


def test_what_a_chunked_loss_would_save_is_not_said_of_a_model_that_cannot_have_it():
    """Gemma 2 caps its logits, which a loss with the head in it does not."""
    plan = est.Plan(attention="naive", precision="bf16-mixed", loss="torch")
    r = est.estimate("gemma-2-9b", plan, "h100-80gb-sxm")
    assert chunking_saves(r) is None
    assert "a chunked loss" not in logits(r)
    r = est.estimate("gpt2", est.Plan(batch_size=16), "h100-80gb-sxm")
    assert "a chunked loss" in logits(r)
