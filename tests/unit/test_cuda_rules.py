"""Rules of CUDA that no machine without one can measure: each is held against the size that PyTorch's source gives."""

import dataclasses
from importlib import import_module

import pytest
import torch
from rich.console import Console

import estimator as est
from estimator.accounting.sizes import sizes_of
from estimator.eager.letters import evaluate
from estimator.timing.roofline import efficiency
from estimator.timing.speed import times
from trainer.referee import validate


def allocations(m, plan):
    """(operator, bytes) of every allocation of the step on CUDA."""
    a = est.account(m, plan, "cuda")
    nbytes = a.traced.class_bytes(sizes_of(m, plan.batch_size, plan.tokens(m)))
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


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(("precision", "kernel"), [("bf16", "flash"), ("bf16", "efficient"), ("fp32", "efficient")])
def test_fused_attention_saves_what_pytorchs_own_node_saves(kernel, precision, dropout):
    """Without a device, by the operator on meta tensors (torch/_meta_registrations.py): shapes, dtypes, what is kept.

    Where the generator's state is, it does not say. attention.cu, _efficient_attention_forward, has seed and offset on
    the CPU unless a graph is captured; flash_api.cpp, mha_fwd, has them in CUDA memory.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    q, k, v = (torch.empty(2, 3, 200, 40, dtype=dtype, device="meta", requires_grad=True) for _ in range(3))
    if kernel == "flash":
        node = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)[0].grad_fn
        names = ("output", "logsumexp", "rng_state", "unused")
    else:
        node = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True, dropout, True)[0].grad_fn
        names = ("output", "log_sumexp")
        assert {node._saved_philox_seed.numel(), node._saved_philox_offset.numel()} == {1}
    kept = sorted(getattr(node, f"_saved_{name}").nbytes for name in names)
    plan = est.Plan(batch_size=2, precision=precision, attention=f"sdpa-{kernel}", dropout=dropout)
    a = est.account(M, plan, "cuda")
    sizes = sizes_of(M, 2, 200)
    saved = [evaluate(x.nbytes, sizes) for x in a.traced.ledger.saved if x.where.module == "blocks.0.attention"]
    if dropout:
        saved.remove(2 * 200 * 120)  # the mask of what attention adds to the residual stream
    assert sorted(saved) == kept


def test_the_memory_efficient_kernel_keeps_dq_in_tiles_with_locks():
    found = allocations(M, est.Plan(batch_size=2, attention="sdpa"))
    assert ("backward", "blocks.0.attention", 2 * 3 * 4 * (64 * 64 + 4) * 4) in found  # 200 rows are 4 tiles of 64


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2), ("fp16-mixed", 2)])
def test_a_sliding_window_takes_the_memory_efficient_kernel_with_a_mask_to_add_for_each_block(precision, width):
    m = M.replace(sliding_window=50, num_layers=2)
    plan = est.Plan(batch_size=2, seq_len=197, precision=precision, attention="sdpa")
    made = [n for phase, module, n in allocations(m, plan) if (phase, module) == ("forward", "blocks.1.attention")]
    assert {width * 197 * 197, width * 197 * 200, 4 * 2 * 3 * 224} <= set(made)  # rows padded to 8 elements; sums
    aligned = [n for *_, n in allocations(m, plan.replace(seq_len=200))]
    assert aligned.count(width * 200 * 200) == 2  # one a block: rows of 200 need no other
    account = {T: est.account(m, plan.replace(seq_len=T)) for T in (197, 200, 50)}
    saved = {T: account[T].evaluate(m, plan.replace(seq_len=T)).activation_bytes for T in account}
    whole = {T: est.account(M, plan).evaluate(M.replace(num_layers=2), plan.replace(seq_len=T)) for T in account}
    if precision == "fp32":  # the kernel is the same one without a window
        assert saved[197] - whole[197].activation_bytes == 2 * width * 197 * 200
        assert saved[200] - whole[200].activation_bytes == 2 * width * 200 * 200
    assert saved[50] == whole[50].activation_bytes  # no longer than the window: nothing changes


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16-mixed"])
def test_a_kernel_by_name_is_the_one_that_pytorch_picks_or_the_other(precision):
    plan = est.Plan(batch_size=2, precision=precision, attention="sdpa")
    picked = plan.attention_kernel("cuda")
    named = plan.replace(attention=f"sdpa-{picked}")
    assert est.account(M, named, "cuda") is est.account(M, plan, "cuda")
    if picked == "flash":
        mine, other = (
            est.account(M, p, "cuda").evaluate(M, p) for p in (named, plan.replace(attention="sdpa-efficient"))
        )
        assert other.forward_flops == mine.forward_flops
        rows, state = 4 * 2 * 3 * (224 - 200), 24  # of the log-sum-exp; the generator's
        assert other.activation_bytes - mine.activation_bytes == rows - state


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"attention": "sdpa-efficient"}, "cpu", "allowed on the CPU are"),
        ({"attention": "sdpa-flash", "dropout": 0.1}, "cpu", "the CPU's has no dropout; allowed with 0.1 are"),
        ({"attention": "sdpa-flash", "precision": "tf32"}, "cuda", "allowed with precision 'tf32' are"),
        ({"attention": "sdpa-flash"}, "cuda", "allowed with precision 'fp32' are"),
    ],
)
def test_a_kernel_that_the_device_has_not_is_refused_by_field(changes, device, message):
    plan = est.Plan(**changes)
    with pytest.raises(est.ConfigError, match=f"attention = '{plan.attention}': .*{message}"):
        est.account(M, plan, device)


def test_flash_by_name_is_refused_beyond_a_sliding_window_on_cuda_only():
    m, plan = M.replace(sliding_window=50), est.Plan(precision="bf16", attention="sdpa-flash")
    with pytest.raises(est.ConfigError, match=r"attention = 'sdpa-flash': .* sliding_window of 50 is at 200 tokens"):
        est.account(m, plan, "cuda")
    est.account(m, plan.replace(seq_len=50), "cuda")
    est.account(m, plan, "cpu")


def test_flash_by_name_is_refused_where_the_architecture_has_it_not():
    plan = est.Plan(precision="fp16-mixed", attention="sdpa-flash", batch_size=2)
    for refused in (lambda: est.estimate(M, plan, "t4-16gb"), lambda: est.max_batch_size(M, plan, "v100-32gb-sxm")):
        with pytest.raises(est.ConfigError, match="attention = 'sdpa-flash': CUDA's is for Ampere and newer"):
            refused()
    assert est.estimate(M, plan.replace(attention="sdpa-efficient"), "t4-16gb").fits


def test_time_takes_the_kernels_own_figures_where_there_are_some_and_says_where_there_are_none():
    plan = est.Plan(batch_size=2, precision="bf16", attention="sdpa-efficient")
    flash, other = (
        est.estimate(M, plan.replace(attention=name), "a100-80gb-sxm").time for name in ("sdpa", plan.attention)
    )
    assert "memory-efficient" not in flash.origin
    assert "Nobody has published measurements of the memory-efficient attention" in other.origin
    on, form = est.accelerator("a100-80gb-sxm"), est.account(M, plan, "cuda")
    sizes = sizes_of(M, 2, 200)
    half = dataclasses.replace(efficiency(on).flash["flash-2"], forward=(0.01, 0.01), backward=(0.01, 0.01))
    slow = dataclasses.replace(efficiency(on), flash={**efficiency(on).flash, "efficient": half})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("estimator.timing.speed.efficiency", lambda _: slow)
        slower = times(form, sizes, plan, on)["attention"]
    assert slower > 10 * times(form, sizes, plan, on)["attention"]


def test_autocast_keeps_the_softmax_in_fp32_on_cuda_only():
    plan = est.Plan(batch_size=2, precision="bf16-mixed")
    saved = {device: est.account(M, plan, device).evaluate(M, plan).activation_bytes for device in ("cpu", "cuda")}
    scores = 2 * 3 * 200 * 200
    assert saved["cuda"] - saved["cpu"] == 4 * scores  # in fp32 for softmax's backward, beside the bf16 of P @ V


def test_on_cuda_the_allocators_figures_are_compared_too_and_their_errors_fail_nothing(monkeypatch):
    m, plan = est.preset("gpt2"), est.Plan(batch_size=2, precision="bf16", attention="sdpa")
    r = est.estimate(m, plan, "h100-80gb-sxm")
    exact = est.account(m, plan, "cuda").evaluate(m, plan)
    real = {q: getattr(exact, q) for q in validate.QUANTITIES if q != "saved_bytes"} | {
        "saved_bytes": exact.activation_bytes,
        "allocated_bytes": r.memory.allocated,
        "reserved_bytes": r.memory.reserved + 2**21,
    }

    class Measured:
        def to_dict(self):
            return real

    monkeypatch.setattr(import_module("trainer.referee.measure"), "measure", lambda *_, **__: Measured())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    rows = validate.compare(m, plan, "cuda")
    assert {row.quantity: row.difference for row in rows if row.difference} == {"reserved_bytes": -(2**21)}
    assert {row.quantity for row in rows} == {*validate.QUANTITIES, *validate.MODELLED}
    assert validate.report([(m, plan)], [rows], Console(quiet=True)) == 0
    real["peak_bytes"] += 1
    assert validate.report([(m, plan)], [validate.compare(m, plan, "cuda")], Console(quiet=True)) == 1
