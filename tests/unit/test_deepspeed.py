"""DeepSpeed's implementation: its own published statements of the memory of model states, and its buckets."""

import pytest
import sympy

import estimator as est
from estimator.accounting.accounts import account, sizes_for
from estimator.describe.checks import ConfigError
from estimator.eager.letters import SYMBOLS
from estimator.memory.device import timeline

D = SYMBOLS["D"]
M = est.preset("llama-3.2-1b")
NARROW = M.replace(vocab_size=64, context_length=512)  # whose peak is not the head's
PLAN = est.Plan(
    implementation="deepspeed",
    precision="bf16-master",
    sharding="zero2",
    attention="sdpa",
    data_parallel=8,
    seq_len=512,
)
STATES = ("parameter_bytes", "gradient_bytes", "optimizer_bytes")
K = 12  # bytes of a parameter's fp32 master and its two states
PAPER = {"zero1": 2 + 2 + K / D, "zero2": 2 + (2 + K) / D, "zero3": (2 + 2 + K) / D}


def held(p, m=M):
    a = account(m, p)
    return sympy.simplify(sum(getattr(a, form) for form in STATES) / a.parameters)


@pytest.mark.parametrize("sharding", PAPER)
def test_states_are_those_of_the_zero_paper(sharding):
    """Figure 1 of Rajbhandari et al. 2020 (arXiv 1910.02054)."""
    assert sympy.simplify(held(PLAN.replace(sharding=sharding)) - PAPER[sharding]) == 0


@pytest.mark.parametrize(("sharding", "gigabytes"), [("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.88)])
def test_the_papers_example_of_7_5_billion_on_64(sharding, gigabytes):
    """The same figure: 7.5 B parameters on 64 accelerators."""
    a = account(M, PLAN.replace(sharding=sharding, data_parallel=64))
    per = sum(getattr(a, form) for form in STATES) / a.parameters
    assert float(sympy.simplify(per).subs(D, 64)) * 7.5 == pytest.approx(gigabytes, rel=0.005)


def test_the_update_holds_what_deepspeeds_own_estimator_says():
    """`estimate_zero2_model_states_mem_needs`: 2 P + 18 P / N with gradients in both widths; here the flat copy too."""
    p = PLAN.replace(data_parallel=64, seq_len=1, reduce_bucket_size=1)
    r = est.estimate(NARROW, p, "a100-80gb-sxm")
    stated = 2 * r.values.parameters + 18 * r.values.parameters / 64
    assert r.memory.peak == pytest.approx(stated + 2 * r.values.parameters / 64, rel=0.005)


def test_the_bucket_is_there_from_the_first_gradient_on():
    small, large = (
        est.estimate(NARROW, PLAN.replace(reduce_bucket_size=n), "a100-80gb-sxm").memory.peak
        for n in (400_000_000, 500_000_000)
    )
    assert large - small == 2 * 100_000_000


def test_the_third_stage_has_no_more_whole_than_it_may():
    p = PLAN.replace(sharding="zero3", seq_len=2048)
    peaks = [
        est.estimate(M, p.replace(max_live_parameters=n), "a100-80gb-sxm").memory.peak for n in (10**8, 10**9, 10**10)
    ]
    assert peaks[1] - peaks[0] == 2 * 9 * 10**8
    norms = (2 * M.num_layers + 1) * M.d_model  # small enough to stay whole (stage3_param_persistence_threshold)
    assert peaks[2] - peaks[1] == 2 * (est.estimate(M, p, "a100-80gb-sxm").values.parameters - norms - 10**9)


def test_of_the_third_stage_small_parameters_are_whole_but_in_the_update():
    """`_partition_all_parameters` in `step`, and `persistent_parameters[0].all_gather` at its end."""
    m = NARROW.replace(num_layers=3)
    a = account(m, PLAN.replace(sharding="zero3"), "cpu")
    line = timeline(a, sizes_for(m, PLAN.replace(sharding="zero3"), threads=1))
    whole = [
        int(delta) for delta, i in zip(line.delta, range(len(line)), strict=True) if line.where(i).op == "all_gather"
    ]
    assert whole == [2 * m.d_model] * (2 * m.num_layers + 1)
    assert line.live[-1] == line.start


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "bf16-mixed"}, "precision = 'bf16-mixed'"),
        ({"sharding": "none"}, "sharding = 'none'"),
        ({"tensor_parallel": 2}, "tensor_parallel"),
        ({"adapter": "lora"}, "adapter"),
        ({"implementation": "bundled", "reduce_bucket_size": 5}, "reduce_bucket_size"),
        ({"max_live_parameters": 5}, "only zero3"),
        ({"sharding": "zero3", "offload": "states"}, "not known of ZeRO-3"),
        ({"offload": "parameters"}, "policy of fully_shard"),
    ],
)
def test_what_it_is_not_known_with_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        PLAN.replace(**changes)


@pytest.mark.parametrize("sharding", PAPER)
def test_recipes_that_people_run_have_an_answer_and_a_time(sharding):
    p = PLAN.replace(
        sharding=sharding, checkpointing="block", grad_accumulation=4, max_grad_norm=1.0, data_parallel=16, seq_len=4096
    )
    for name in ("llama-3-8b", "mixtral-8x7b", "gpt2-xl"):
        m = est.preset(name)
        r = est.estimate(m, p.replace(seq_len=min(4096, m.context_length)), "a100-80gb-sxm", steps=10)
        assert r.time.hours > 0
        assert any("DeepSpeed" in note for note in r.notes)


def test_offloaded_states_leave_two_bytes_a_parameter():
    """`estimate_zero2_model_states_mem_needs` with cpu_offload: 2 P here, 16 P / N or more on the host."""
    p = PLAN.replace(data_parallel=64, offload="states", seq_len=1, reduce_bucket_size=1)
    here, there = (est.estimate(NARROW, x, "a100-80gb-sxm") for x in (p.replace(offload="none"), p))
    P = there.values.parameters
    assert there.memory.host == pytest.approx(18 * P / 64, rel=0.01)  # theirs, and the buffer of 16 bits
    assert there.memory.peak < here.memory.peak
    assert there.memory.peak == pytest.approx(2 * P, rel=0.15)  # and of one block gradients and activations
    assert there.time is None
