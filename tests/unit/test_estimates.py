"""estimate, max_batch_size, time by a stated MFU, memory lines."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.accounting.accounts import component
from estimator.answers.notes import notes_of_device
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["gpt2", "llama"]),
    st.sampled_from(["naive", "sdpa"]),
    st.sampled_from(["none", "block"]),
    st.integers(1, 40),
)
def test_the_largest_batch_fits_and_one_more_does_not(family, attention, checkpointing, megabytes):
    m = ModelConfig(family, 3, 64, 4, 997, 64, d_ff=200)
    p = Plan(attention=attention, checkpointing=checkpointing)
    capacity = megabytes * 1_000_000
    n = est.max_batch_size(m, p, capacity)
    a = est.account(m, p)
    assert a.evaluate(m, p.replace(batch_size=n + 1)).peak_bytes > capacity
    if n:
        assert a.evaluate(m, p.replace(batch_size=n)).peak_bytes <= capacity


@pytest.mark.parametrize("name", ["gpt2-xl", "llama-3.2-1b"])
@pytest.mark.parametrize("gpu", ["a100-80gb-sxm", "rtx-4090-24gb"])
def test_the_largest_batch_on_an_accelerator(name, gpu):
    p = Plan(seq_len=1024, attention="sdpa", checkpointing="block")
    n = est.max_batch_size(name, p, gpu)
    assert not est.estimate(name, p.replace(batch_size=n + 1), gpu).fits
    if n:
        assert est.estimate(name, p.replace(batch_size=n), gpu).fits


def test_needed_is_the_sum_of_its_lines():
    r = est.estimate("gpt2", Plan(batch_size=8), "h100-80gb-sxm")
    m = r.memory
    assert sum(m.parts.values()) == m.peak
    assert m.allocated - m.workspace >= m.peak
    assert m.needed == m.allocated + sum(m.context) // 2
    assert m.workspace == 32 * 2**20
    assert est.estimate("gpt2", Plan(), "a100-80gb-sxm").memory.workspace == 8_519_680
    assert (m.allocated - m.workspace) % 512 == 0


def test_the_assignments_question_answered_for_the_real_model():
    """400K steps of 1024 sequences at half of 19.5 TFLOP/s: 3 x 3,506,703,564,800 FLOPs a sequence."""
    r = est.estimate("gpt2-xl", Plan(), "a100-80gb-sxm", mfu=0.5, steps=400_000, global_batch_size=1024)
    seconds = 400_000 * 1024 * 3 * 3_506_703_564_800 / (0.5 * 19.5e12)
    assert r.time.seconds == pytest.approx(seconds, rel=1e-12)
    assert r.time.hours == pytest.approx(seconds / 3600)
    assert r.time.tokens_per_second == pytest.approx(1024 * 1024 * 400_000 / seconds)
    assert r.plan.grad_accumulation == 1024  # so that memory is of the step whose time this is


def test_the_accumulation_follows_from_the_global_batch():
    """Memory, FLOPs and time of one step: the same as with the accumulation spelled out."""
    plan = Plan(batch_size=4, attention="sdpa", data_parallel=8, sharding="zero3")
    r = est.estimate("gpt2", plan, global_batch_size=96)
    spelled = est.estimate("gpt2", plan.replace(grad_accumulation=3))
    assert r.plan.grad_accumulation == 3
    assert r.to_dict() == spelled.to_dict()
    assert r.memory.peak > est.estimate("gpt2", plan, global_batch_size=32).memory.peak
    uneven = est.estimate("gpt2", plan, global_batch_size=65)
    assert uneven.plan.grad_accumulation == 3
    assert uneven.flops.sequences == 65
    assert uneven.time.seconds_per_step == r.time.seconds_per_step
    assert "of the last ones only those that 65 leave" in " ".join(uneven.notes)


@pytest.mark.parametrize("batch", [1, 2, 25, 51, 1024])
def test_the_largest_batch_is_of_the_step_that_has_the_global_batch(batch):
    m, gpu = ModelConfig("gpt2", 12, 256, 8, 5000, 512), "t4-16gb"
    plan = Plan(attention="sdpa", optimizer="sgd")

    def fits(size):
        return est.estimate(m, plan.replace(batch_size=size), gpu, global_batch_size=batch).fits

    found = est.max_batch_size(m, plan, gpu, global_batch_size=batch)
    assert found <= batch
    assert fits(found)
    assert found == batch or not fits(found + 1)


@pytest.mark.parametrize("sharding", ["none", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_module_has_its_own_parameters_gradients_and_states(sharding, precision):
    """By module, the bytes of the real model's parameters: of each matrix the first accelerator's rows."""
    nn = pytest.importorskip("torch", reason="the real model's shapes").nn
    from trainer.model.decoder import Transformer

    m = ModelConfig("llama", 3, 48, 4, 101, 32, d_ff=80, num_kv_heads=2)
    plan = Plan(precision=precision, data_parallel=3, sharding=sharding, grad_accumulation=2)
    width = 4 if precision == "fp32" else 2
    shared = {"gradient_bytes": ("zero2", "zero3"), "parameter_bytes": ("zero2", "zero3")}
    expected = {}
    for name, p in Transformer(m, plan).named_parameters():
        assert isinstance(p, nn.Parameter)
        rows = -(-p.shape[0] // 3)
        own = expected.setdefault(component(name.rpartition(".")[0]), dict.fromkeys(("parameters", *shared), 0))
        own["parameters"] += p.numel()
        for form, when in shared.items():
            own[form] += width * (rows * p[0].numel() if sharding in when else p.numel())
    found = est.estimate(m, plan, "a100-80gb-sxm").to_dict()["modules"]
    for module, form in found.items():
        own = expected.get(module, {})
        assert {name: form[name] for name in ("parameters", *shared)} == {
            name: own.get(name, 0) for name in ("parameters", *shared)
        }
    assert sum(form["gradient_bytes"] for form in found.values()) > 0


def test_time_scales_as_it_must():
    def at(**changes):
        return est.estimate("gpt2", Plan(batch_size=4), "a100-80gb-sxm", **{"mfu": 0.4, "steps": 10, **changes}).time

    assert at(steps=20).seconds == pytest.approx(2 * at().seconds)
    assert at(mfu=0.2).seconds == pytest.approx(2 * at().seconds)
    assert at(count=2, global_batch_size=8).seconds == pytest.approx(at(global_batch_size=8).seconds / 2)
    assert at(count=2).tokens_per_second == pytest.approx(2 * at().tokens_per_second)


def test_checkpointing_lifts_hfu_above_mfu():
    r = est.estimate("gpt2-xl", Plan(checkpointing="block"), mfu=0.4)
    assert r.time.mfu == 0.4
    assert 1.2 < r.time.hfu / r.time.mfu < 4 / 3
    flash = est.estimate("gpt2", Plan(attention="sdpa"), mfu=0.4)
    naive = est.estimate("gpt2", Plan(), mfu=0.4)
    assert flash.time.seconds_per_step == naive.time.seconds_per_step
    assert flash.time.hfu > flash.time.mfu


def test_results_are_plain_data():
    r = est.estimate("llama-3.2-1b", Plan(seq_len=128), mfu=0.5)
    plain = json.loads(json.dumps(r.to_dict()))
    assert plain["memory"]["peak"] == r.memory.peak
    assert plain["fits"] is r.fits
    frame = r.to_frame()
    assert frame.loc["total", "parameters"] == r.values.parameters == 1_235_814_400
    assert (frame.iloc[:-1].sum() == frame.loc["total"]).all()


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"mfu": 0}, "mfu = 0"),
        ({"mfu": 1.1}, "mfu = 1.1"),
        ({"steps": 0, "mfu": 0.5}, "steps = 0"),
        ({"global_batch_size": -1}, "global_batch_size = -1"),
        ({"count": 0}, "count = 0"),
        ({"count": 8, "global_batch_size": 7}, "global_batch_size = 7: a micro-batch of 1 on 8 has 8 sequences"),
        ({"plan": Plan(grad_accumulation=3), "global_batch_size": 4}, "grad_accumulation = 3: 4 sequences"),
        ({"on": "H100"}, "H100"),
        ({"plan": Plan(data_parallel=2), "count": 3}, "count = 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            est.estimate("gpt2", **changes)
    with pytest.raises(ConfigError, match="bytes = 0"):
        est.max_batch_size("gpt2", Plan(), 0)
    with pytest.raises(ConfigError, match="gpt2"):
        est.estimate("gpt-2-xxl")


def test_a_models_flops_by_both_conventions_are_of_what_a_token_goes_through():
    """6 N of the active parameters, and the ledger's, which has attention beside and leaves out the embedding."""
    r = est.estimate("qwen3-30b-a3b", est.Plan(seq_len=512, precision="bf16"), "h200-141gb-sxm")
    plain = r.to_dict()
    m, by = r.model, plain["flops"]["per_token"]
    assert by["6N"] == 6 * plain["active_parameters"]
    products = plain["active_parameters"] - m.vocab_size * m.d_model - m.d_model * (2 * m.num_layers + 1)
    products -= 2 * m.e * m.num_layers  # the norms on queries and keys
    assert by["ledger"] == 6 * products + 12 * m.num_layers * m.width_of_heads * 512
    assert plain["model_in_words"].startswith("48 layers of width 2,048, 8 of 128 experts a token")


def test_a_large_mixture_is_answered_in_seconds_from_the_shell_and_in_milliseconds_once_it_is_known():
    """3 s from a cold process, of CPU time, as other processes share this machine; 2 ms for a known account."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "estimator", "deepseek-v3"], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    m, p = est.preset("deepseek-v3"), est.Plan()
    known = est.account(m, p)
    known.evaluate(m, p)
    spent = []
    for batch in range(2, 22):
        start = time.process_time()
        known.evaluate(m, p.replace(batch_size=batch))
        spent.append(time.process_time() - start)
    assert min(spent) < 2e-3


def test_on_a_processor_half_precision_says_that_onednn_takes_more():
    said = [list(notes_of_device(Plan(precision=precision), "cpu")) for precision in ("fp32", "bf16-mixed", "bf16")]
    assert [len(notes) for notes in said] == [0, 1, 1]
    assert "oneDNN" in said[1][0]
    assert list(notes_of_device(Plan(precision="bf16"), "cuda")) == []
    assert list(notes_of_device(Plan(optimizer="muon"), "cpu"))  # its iterations are in bf16
