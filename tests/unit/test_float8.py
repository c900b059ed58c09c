"""Products in 8 bits: what is cast and when, how much faster they are, and where they are refused."""

from pathlib import Path

import pytest

import estimator as est
from estimator.accounting.accounts import account
from estimator.answers.advice import Advisor
from estimator.describe.checks import ConfigError
from estimator.hardware.accelerators import accelerator
from estimator.studies.published import judged
from estimator.timing.float8 import Casts, multiplies
from estimator.timing.speed import step_times
from trainer.run.settings import TrainConfig

LLAMA = est.ModelConfig("llama", 3, 256, 4, 512, 128, d_ff=768)
PLAN = est.Plan(precision="bf16", attention="sdpa", compile=True)
# Bytes that torchao's own account says each element of a factor moves (torchao 0.18,
# torchao/testing/training/roofline_utils.py), kernel by kernel, nothing fused with what comes before.
MOVED = {
    ("tensorwise", "input"): [2, 2 + 1 + 1],
    ("tensorwise", "weight"): [2, 2 + 1, 2 + 1],
    ("rowwise", "input"): [2 + 1 + 2, 2 + 1],
    ("rowwise", "weight"): [2 + 1, 2 + 2, 2 + 1],
}


@pytest.mark.parametrize("scales", ["tensorwise", "rowwise"])
def test_a_layers_casts_are_those_of_torchaos_account(scales):
    a = account(LLAMA, PLAN)
    layer = [k for k in a.traced.ledger.kernels if k.where.module == "blocks.1.ffn.down" and multiplies(k)]
    assert [k.where.phase for k in layer] == ["forward", "backward", "backward"]
    x, w = layer[0].operands[:2]
    casts = Casts(scales)
    done = [(cast.operands[0].storage, cast.nbytes) for product in layer for cast in casts.before(product)]
    gradient = next(storage for storage, _ in done if storage not in (x.storage, w.storage))
    for factor, role in ((x, "input"), (w, "weight")):
        moved = [nbytes for storage, nbytes in done if storage is factor.storage]
        assert moved == [each * factor.nbytes / 2 for each in MOVED[scales, role]]  # of 2 bytes an element
    assert sum(storage is gradient for storage, _ in done) == len(MOVED[scales, "input"])


def test_with_a_scale_for_each_row_a_kernel_of_its_own_scales_what_each_product_of_backward_wrote():
    a = account(LLAMA, PLAN.replace(checkpointing="block"))
    products = [k for k in a.traced.ledger.kernels if multiplies(k)]
    assert {(k.where.phase == "backward", k.recompute) for k in products} == {
        (False, False),
        (True, True),
        (True, False),
    }
    for product in products:
        m, n, b = product.gemm.m, product.gemm.n, product.gemm.b
        found = [x.nbytes for x in Casts("rowwise").after(product)]
        scaled = product.where.phase == "backward" and not product.recompute
        assert found == ([4 * b * m * n] if scaled else [])  # read and written, in 16 bits
        assert not list(Casts("tensorwise").after(product))


def test_an_input_of_several_layers_is_cast_once_and_not_read_for_its_scale_where_it_is_made_by_a_fused_kernel():
    kernels = account(LLAMA, PLAN).traced.ledger.kernels
    q, k, _ = (x for x in kernels if x.where.module.startswith("blocks.1.attention.") and multiplies(x)
               and x.where.phase == "forward" and not x.where.module.endswith("out"))  # fmt: skip
    assert q.operands[0].storage is k.operands[0].storage
    casts = Casts("tensorwise")
    assert [len(list(casts.before(product))) for product in (q, k)] == [4, 2]
    casts = Casts("tensorwise")
    casts.fuse(x for x in kernels if any(y.written and y.storage is q.operands[0].storage for y in x.operands))
    assert len(list(casts.before(q))) == 3


def test_products_are_faster_by_what_was_timed_and_nothing_else_is():
    m = est.ModelConfig("llama", 16, 8192, 64, 32_000, 8192, d_ff=28_672)
    sixteen, eight = (
        step_times(m, PLAN.replace(float8=float8), "h100-80gb-sxm") for float8 in ("none", "tensorwise")
    )  # fmt: skip
    a = accelerator("h100-80gb-sxm")
    timed = dict(a.measured_peaks)
    gain = timed["fp8"] / timed["bf16"]  # of the best products, in both dtypes
    logits = 32_000 / (32_000 + 16 * (8192 * 4 + 3 * m.d_ff))  # of the products, in 16 bits still
    found = sixteen["matmul"][0] / eight["matmul"][0]
    assert found == pytest.approx(1 / (logits + (1 - logits) / gain), rel=0.05)
    assert eight["attention"][0] == sixteen["attention"][0]
    assert eight["elementwise"][0] > sixteen["elementwise"][0]


def test_published_runs_with_a_scale_for_each_tensor_are_as_predicted():
    rows = [j for j in judged() if j.run.row["dtype"].startswith("fp8 tensorwise")]
    assert len(rows) == 2
    assert max(abs(j.error) for j in rows) < 0.02


def test_memory_is_that_of_16_bits():
    of = {float8: est.estimate(LLAMA, PLAN.replace(float8=float8), "h100-80gb-sxm") for float8 in ("none", "rowwise")}
    assert len({(r.memory.peak, r.memory.needed, r.memory.reserved) for r in of.values()}) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compile": False}, "float8 = 'tensorwise': compile is False"),
        ({"precision": "fp32"}, "float8 = 'tensorwise': precision 'fp32' does not multiply in 16 bits"),
    ],
)
def test_what_float8_needs_is_asked_for(changes, words):
    with pytest.raises(ConfigError, match=words):
        PLAN.replace(float8="tensorwise", **changes)


@pytest.mark.parametrize(
    ("model", "gpu", "words"),
    [
        (LLAMA, "mi300x-192gb", "nobody has published timings of products in 8 bits on cdna3"),
        (LLAMA.replace(d_ff=1000), "h100-80gb-sxm", "d_ff = 1000, and products in 8 bits take multiples of 16 alone"),
    ],
)
def test_where_they_cannot_be_timed_there_is_no_time_and_the_note_says_why(model, gpu, words):
    r = est.estimate(model, PLAN.replace(float8="tensorwise"), gpu)
    assert r.time is None
    assert any(words in note for note in r.notes), r.notes


def test_the_trainer_says_that_it_has_none(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"plan\.float8 = 'tensorwise'"):
        TrainConfig(data=tmp_path, out=tmp_path, plan=est.Plan(precision="bf16", compile=True, float8="tensorwise"))


def test_a_card_without_floats_of_8_bits_is_refused():
    with pytest.raises(ConfigError, match="float8 = 'rowwise': a100-80gb-sxm multiplies in no floats of 8 bits"):
        est.estimate(LLAMA, PLAN.replace(float8="rowwise"), "a100-80gb-sxm")


def test_advice_for_speed_offers_it_as_a_change_of_what_is_learned():
    m = est.preset("llama-3-8b").replace(num_layers=4)
    r = est.estimate(m, PLAN.replace(seq_len=4096), "h100-80gb-sxm")
    offered = {change.fields["float8"]: change for change in Advisor(r).single() if "float8" in change.fields}
    assert set(offered) == {"tensorwise", "rowwise"}
    assert all(change.alters and change.seconds < 1 for change in offered.values())
