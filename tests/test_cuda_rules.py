"""Rules of CUDA that no machine without one can measure: each is held against the size that PyTorch's source gives."""

import pytest

import estimator as est
from estimator.eager.sizes import sizes_of


def allocations(m, plan):
    """(operator, bytes) of every allocation of the step on CUDA."""
    a = est.account(m, plan, "cuda")
    nbytes = a.traced.class_bytes(sizes_of(m, plan.batch_size, plan.tokens(m), "cuda"))
    events = zip(a.traced.ledger.events, a.traced.klass, strict=True)
    return [(e.where.phase.value, e.where.module, int(nbytes[k])) for e, k in events if e.sign > 0]


M = est.ModelConfig("gpt2", 1, 120, 3, 101, 200)  # heads of 40


def test_the_backward_of_flash_adds_up_dq_in_fp32_whole_tiles():
    found = allocations(M, est.Plan(batch_size=2, precision="bf16", attention="sdpa"))
    tiles = [n for phase, module, n in found if phase == "backward" and module == "blocks.0.attention"]
    assert 4 * 2 * 256 * 3 * 64 in tiles  # (B, T to 128s, h, e to 32s), mha_bwd's dq_accum
    assert 4 * 2 * 3 * 256 in tiles  # softmax_d


def test_the_memory_efficient_kernel_pads_the_log_sum_exp_to_32_rows():
    found = allocations(M, est.Plan(batch_size=2, attention="sdpa"))
    assert ("forward", "blocks.0.attention", 4 * 2 * 3 * 224) in found
    assert 4 * 2 * 256 * 3 * 64 not in [n for *_, n in found]


@pytest.mark.parametrize(
    ("precision", "device", "dropout", "kernel"),
    [
        ("fp32", "cuda", 0.0, "efficient"),
        ("tf32", "cuda", 0.1, "efficient"),
        ("bf16", "cuda", 0.1, "flash"),
        ("fp16-mixed", "cuda", 0.0, "flash"),
        ("fp32", "cpu", 0.0, "flash"),
        ("bf16", "cpu", 0.1, "math"),
    ],
)
def test_which_kernel_scaled_dot_product_attention_runs(precision, device, dropout, kernel):
    assert est.Plan(precision=precision, dropout=dropout, attention="sdpa").attention_kernel(device) == kernel


def test_autocast_keeps_the_softmax_in_fp32_on_cuda_only():
    plan = est.Plan(batch_size=2, precision="bf16-mixed")
    saved = {device: est.account(M, plan, device).evaluate(M, plan).activation_bytes for device in ("cpu", "cuda")}
    scores = 2 * 3 * 200 * 200
    assert saved["cuda"] - saved["cpu"] == 4 * scores  # in fp32 for softmax's backward, beside the bf16 of P @ V
