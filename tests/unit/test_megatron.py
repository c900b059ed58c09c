"""Megatron's implementation: the formulas of Korthikanti et al. 2022 (arXiv 2205.05198) read off the ledger.

Their letters s, b, h, a, L, v, t, p, m are T, B, d, h, L, V, t, stages and parts of a stage here; their bytes leave out
the statistics of the norms, two numbers of 4 bytes a token and norm, and the loss's two masks.
"""

import time

import pytest
import sympy

import estimator as est
from estimator.accounting.accounts import account, sizes_for, stage_account
from estimator.describe.checks import ConfigError
from estimator.describe.pipeline import in_flight
from estimator.describe.schedules import interleaved
from estimator.eager.letters import SYMBOLS
from estimator.timing.pipeline import StageTime, simulated_parts

B, T, L, d, h, V, t = (SYMBOLS[name] for name in "BTLdhVt")
GPT = est.ModelConfig("gpt2", 96, 12288, 96, 51200, 2048)
PLAN = est.Plan(
    batch_size=2, implementation="megatron", precision="bf16-master", dropout=0.1, tensor_parallel=8, seq_len=2048
)
TOKENS = B * T
BLOCK = TOKENS * d
LAYER = {  # table 2, of one layer; and the norms' statistics
    "alone": ({"tensor_parallel": 1}, BLOCK * (34 + 5 * h * T / d), 16 * TOKENS),
    "tensor": ({}, BLOCK * (10 + 24 / t + 5 * h * T / (d * t)), 16 * TOKENS),
    "sequence": ({"sequence_parallel": True}, BLOCK * (34 + 5 * h * T / d) / t, 16 * TOKENS / t),
    "selective": ({"checkpointing": "selective"}, BLOCK * (10 + 24 / t), 16 * TOKENS),
    "both": ({"sequence_parallel": True, "checkpointing": "selective"}, BLOCK * 34 / t, 16 * TOKENS / t),
    "full": ({"checkpointing": "block"}, 2 * BLOCK, 0),
}


def closed(p, form="activation_bytes", m=GPT):
    """A form with what follows in their models: e = d / h, f = 4 d."""
    a = account(m, p)
    follows = {SYMBOLS["e"]: d / h, SYMBOLS["f"]: 4 * d}
    return sympy.expand(getattr(a, form).subs(follows))


@pytest.mark.parametrize("name", LAYER)
def test_a_layer_saves_what_the_paper_says(name):
    changes, published, statistics = LAYER[name]
    layer = closed(PLAN.replace(**changes)).coeff(L)
    assert sympy.simplify(layer - published - statistics) == 0


def test_embedding_and_head_save_what_the_paper_says():
    """Section 4.3: the embedding's dropout, the last norm's input, the head's input, and logits in fp32."""
    whole = closed(PLAN.replace(tensor_parallel=1))
    outside = whole - L * whole.coeff(L)
    statistics, masks = 8 * TOKENS, 9 * TOKENS
    assert sympy.simplify(outside - (BLOCK * (1 + 2 + 2) + 4 * TOKENS * V + statistics + masks)) == 0


@pytest.mark.parametrize(
    ("changes", "per_parameter"),
    [({}, 18), ({"data_parallel": 4, "sharding": "zero1"}, 6 + 12 / SYMBOLS["D"])],
)
def test_states_are_18_bytes_a_parameter_and_6_and_12_shared_out(changes, per_parameter):
    """Megatron-LM's documentation, "Distributed Optimizer": bf16 parameters, fp32 gradients."""
    p = PLAN.replace(tensor_parallel=1, **changes)
    held = sum(closed(p, form) for form in ("parameter_bytes", "gradient_bytes", "optimizer_bytes"))
    assert sympy.simplify(held - per_parameter * closed(p, "parameters")) == 0


def test_ranks_have_equal_parts_of_the_same_parameters():
    alone, part = (closed(PLAN.replace(tensor_parallel=n), "parameters") for n in (1, 8))
    assert alone == part == sympy.expand(12 * L * d**2 + 13 * L * d + (V + SYMBOLS["C"] + 2) * d)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "stages", "parts", "micro_batch"),
    [(48, 6144, 64, 1, 1, 4), (96, 12288, 96, 8, 3, 1), (105, 20480, 128, 35, 3, 1), (128, 25600, 160, 64, 1, 1)],
    ids=["22B", "175B", "530B", "1T"],
)
def test_the_first_stage_holds_what_section_4_says(layers, width, heads, stages, parts, micro_batch):
    """Section 4.2.3, as many layers as the whole model has, times 1 + (p - 1) / (p m) where stages are interleaved."""
    m = est.ModelConfig("gpt2", layers, width, heads, 51200, 2048)
    p = PLAN.replace(
        batch_size=micro_batch, sequence_parallel=True, checkpointing="selective", pipeline_parallel=stages,
        virtual_stages=parts, grad_accumulation=4 * stages,
    )  # fmt: skip
    a, sizes = stage_account(m, p, "cuda", 0), sizes_for(m, p, 1)
    passes = in_flight(p, 0) / parts
    more = 1 + (stages - 1) / (stages * parts) if parts > 1 else 1
    assert passes * layers / stages == pytest.approx(layers * more)
    v = a.values(sizes)
    own = v.activation_bytes - sum(
        part.activation_bytes for name, part in v.modules.items() if name in ("embedding", "head", "loss")
    )
    layer = 34 * 2048 * micro_batch * width / 8
    assert own == pytest.approx(layer * layers / stages, rel=0.03)  # the last norm of one stage, and statistics
    alive = v.peak_categories["activations"]
    assert alive == pytest.approx(passes * v.activation_bytes, rel=0.1)  # what backward has let go of at the peak


def test_interleaved_stages_idle_less():
    """(p - 1) / (m v) of the work: Narayanan et al. 2021, section 2.2.2; and each move comes once."""
    stages, count, parts = 4, 8, 2
    moves = interleaved(count, 1, stages, parts)
    assert len(set(moves)) == len(moves) == 2 * count * parts
    bars = simulated_parts(count, parts, [StageTime(1.0, 2.0, 0.0, 0.0)] * stages)
    work = 3.0 * count
    assert max(bar.end for bar in bars) == pytest.approx(work * (1 + (stages - 1) / (count * parts)))


def test_a_llama_of_it_is_predicted_too():
    p = PLAN.replace(
        batch_size=1, dropout=0.0, attention="sdpa", sequence_parallel=True, pipeline_parallel=4, sharding="zero1",
        seq_len=4096,
    )  # fmt: skip
    r = est.estimate("llama-3-70b", p, "h100-80gb-sxm", count=64, global_batch_size=128)
    assert r.plan.data_parallel == 2
    assert len(r.stages) == 4
    assert 0.3 < r.time.mfu < 0.6
    assert sum(r.time.parts.values()) == pytest.approx(r.time.seconds_per_step)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"precision": "bf16"}, "precision"),
        ({"sharding": "zero3", "data_parallel": 2}, "sharding"),
        ({"sequence_parallel": True, "tensor_parallel": 1}, "sequence_parallel"),
        ({"virtual_stages": 2}, "virtual_stages"),
        ({"virtual_stages": 2, "pipeline_parallel": 4, "grad_accumulation": 6}, "grad_accumulation"),
        ({"virtual_stages": 5, "pipeline_parallel": 4, "grad_accumulation": 4}, "num_layers"),
    ],
)
def test_what_is_not_known_is_refused(changes, field):
    with pytest.raises(ConfigError, match=field):
        account(GPT, PLAN.replace(**changes))


def test_a_vocabulary_that_is_not_padded_is_refused():
    with pytest.raises(ConfigError, match="vocab_size = 50257"):
        account(GPT.replace(vocab_size=50257), PLAN)


def test_the_largest_micro_batch_is_that_of_the_stage_that_needs_the_most():
    p = PLAN.replace(
        batch_size=1, dropout=0.0, attention="sdpa", sequence_parallel=True, pipeline_parallel=4, data_parallel=2,
        sharding="zero1", seq_len=4096,
    )  # fmt: skip
    most = est.max_batch_size("llama-3-70b", p, "h100-80gb-sxm", global_batch_size=64)
    assert most >= 1
    fits = [
        est.estimate("llama-3-70b", p.replace(batch_size=n, grad_accumulation=4), "h100-80gb-sxm").fits
        for n in (most, most + 1)
    ]
    assert fits == [True, False]


def test_sixteen_thousand_accelerators_are_a_matter_of_seconds_and_cost_what_was_published():
    """430 and 400 TFLOP/s of an H100 (989): Meta's runs of 405B on 8,192 and 16,384, docs/time.md."""
    start = time.process_time()
    p = PLAN.replace(
        batch_size=1, dropout=0.0, attention="sdpa", sequence_parallel=True, pipeline_parallel=14, virtual_stages=9,
        sharding="zero1", seq_len=8192,
    )  # fmt: skip
    found = [
        est.estimate("llama-3.1-405b", p, "h100-80gb-sxm", count=count, global_batch_size=2016, network=50e9)
        for count in (8064, 16128)
    ]
    assert time.process_time() - start < 10
    for r, published in zip(found, (430, 400), strict=True):
        assert r.time.mfu * r.time.peak_flops == pytest.approx(published * 1e12, rel=0.08)
