"""Tensor parallelism: each rank's bytes and messages against real processes, and the losses against one process."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import product
from random import Random

import pytest
from test_sharding import accounted, losses_alone, measured, totals

import estimator as est
from estimator.accounting.accounts import account, sizes_for
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.referee.measure import build_step

GPT2 = ModelConfig("gpt2", 3, 24, 4, 37, 9, d_ff=40)
LLAMA = ModelConfig("llama", 4, 24, 4, 37, 9, 2, 6, 32, tie_embeddings=False)
RUNS = int(os.environ.get("TENSOR_RUNS", "0"))  # random recipes to try, in place of a few
GATED = LLAMA.replace(parts=replace(LLAMA.made_of, attention=replace(LLAMA.made_of.attention, out_gate=True)))
NORMED = LLAMA.replace(parts=replace(LLAMA.made_of, attention=replace(LLAMA.made_of.attention, qk_norm="head")))
NORMED = NORMED.replace(vocab_size=40)  # which the ranks can share
TIED = GPT2.replace(vocab_size=200)  # the peak is in the loss
SEQUENCE = {"sequence_parallel": True, "seq_len": 8}
VOCABULARY = {"vocabulary_parallel": True, "loss": "torch"}
CASES = [
    (GPT2, {}),
    (LLAMA, {"optimizer": "sgd", "grad_accumulation": 2, "max_grad_norm": 1.0}),
    (LLAMA, {"optimizer": "sgd", "checkpointing": "block", "attention": "sdpa"}),
    (GPT2, {"optimizer": "sgd", "precision": "bf16-mixed", "loss": "torch"}),
    (GATED, {"optimizer": "sgd"}),
    (NORMED, {"optimizer": "sgd", "grad_accumulation": 2}),
    (NORMED, {"optimizer": "sgd", **SEQUENCE}),
    (GPT2, {"checkpointing": "block", "dropout": 0.1, **SEQUENCE}),
    (LLAMA, {"batch_size": 1, "checkpointing": "block", "precision": "bf16-mixed", "optimizer": "sgd", **SEQUENCE}),
    (NORMED, {"optimizer": "sgd", **SEQUENCE, **VOCABULARY}),
    (TIED, {"optimizer": "sgd", "grad_accumulation": 2, **VOCABULARY}),
]


def drawn(random, ranks):
    """A model and how so many ranks share it."""
    family, each = random.choice(["gpt2", "llama"]), random.choice([1, 2])
    heads = ranks * each * random.choice([1, 2])
    kv = heads if family == "gpt2" else random.choice([n for n in range(ranks, heads + 1, ranks) if heads % n == 0])
    e = random.choice([2, 6])
    sequence, vocabulary = random.random() < 0.5, random.random() < 0.4
    vocabulary_size = random.randint(5, 60) * (ranks if vocabulary else 1)
    m = ModelConfig(
        family, random.randint(1, 5), heads * e, heads, vocabulary_size, 11, kv, e, ranks * random.randint(1, 9),
        tie_embeddings=family == "gpt2" or random.random() < 0.5,
        qkv_bias=random.random() < 0.3 if family == "llama" else None,
    )  # fmt: skip
    return m, Plan(
        batch_size=random.randint(1, 3),
        seq_len=random.choice([ranks, 2 * ranks] if sequence else [1, 5, 11]),
        tensor_parallel=ranks,
        sequence_parallel=sequence,
        vocabulary_parallel=vocabulary,
        precision=random.choice(["fp32", "fp32", "bf16", "bf16-mixed", "bf16" if vocabulary else "fp16-mixed"]),
        attention=random.choice(["naive", "naive-fp32", "sdpa"]),
        checkpointing=random.choice(["none", "none", "block", "attention", "selective"]),
        loss=random.choice(["torch", "torch-fp32"] + ["bundled", "chunked"] * (not vocabulary)),
        optimizer=random.choice(["sgd", "sgd", "adamw", "lion"]),
        grad_accumulation=random.choice([1, 1, 2]),
        max_grad_norm=random.choice([None, 1.0]),
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_what_the_account_says_to_the_byte(ranks, tmp_path):
    random = Random(ranks)
    fixed = [(m.replace(num_kv_heads=4) if m is not GPT2 and ranks == 4 else m, plan) for m, plan in CASES]
    cases = [(m, Plan(**{"batch_size": 2, "tensor_parallel": ranks} | plan)) for m, plan in fixed]
    cases += [drawn(random, ranks) for _ in range(RUNS or 2)]
    for (m, p), processes in zip(cases, measured(ranks, cases, tmp_path), strict=True):
        v = account(m, p, "cpu").evaluate(m, p, threads=1)
        for rank, real in enumerate(processes):
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


def test_ranks_that_share_matrices_and_shards_too(tmp_path):
    """`fully_shard` over the rows that a rank of tensor parallelism has: each of 2 x 2 processes."""
    plan = {"batch_size": 2, "tensor_parallel": 2, "data_parallel": 2}
    cases = [
        (GPT2, Plan(sharding="zero3", **plan)),
        (LLAMA, Plan(sharding="zero2", optimizer="sgd", grad_accumulation=2, max_grad_norm=1.0, **plan)),
        (NORMED, Plan(sharding="zero3", precision="bf16-fsdp", optimizer="sgd", checkpointing="block", **plan)),
        (NORMED, Plan(sharding="zero3", precision="bf16-fsdp", optimizer="sgd", **SEQUENCE, **plan)),
        (TIED, Plan(sharding="zero3", optimizer="sgd", **SEQUENCE, **VOCABULARY, **plan)),
    ]
    random = Random(0)
    for _ in range(RUNS):
        m, p = drawn(random, 2)
        mixed = random.random() < 0.5
        sharding = random.choice(["zero2", "zero3"])
        cases.append(
            (m, p.replace(data_parallel=2, sharding=sharding, precision="bf16-fsdp" if mixed else p.precision))
        )
    for (m, p), processes in zip(cases, measured(4, cases, tmp_path), strict=True):
        for rank, real in enumerate(processes):
            v = account(m, p, "cpu", rank // 2).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


HYBRID = {"batch_size": 2, "data_parallel": 4, "tensor_parallel": 2, "shard_group": 2}


@pytest.mark.skipif(not RUNS, reason="eight processes: TENSOR_RUNS=1 runs it")
def test_replicas_of_shards_of_shared_matrices(tmp_path):
    """HSDP around tensor parallelism: each of 2 x 2 x 2 processes."""
    cases = [
        (LLAMA, Plan(sharding="zero3", precision="bf16-fsdp", max_grad_norm=1.0, **HYBRID)),
        (GPT2, Plan(sharding="zero2", optimizer="sgd", grad_accumulation=2, **HYBRID)),
        (LLAMA, Plan(sharding="zero3", optimizer="sgd", checkpointing="block", **HYBRID)),
    ]
    for (m, p), processes in zip(cases, measured(8, cases, tmp_path), strict=True):
        for rank, real in enumerate(processes):
            v = account(m, p, "cpu", rank // 2).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


def test_each_rank_sends_the_messages_of_the_ledger(tmp_path):
    cases = [(m, Plan(**{"batch_size": 2, "tensor_parallel": 2} | plan)) for m, plan in (*CASES[:3], *CASES[-6:])]
    for (m, p), processes in zip(cases, measured(2, cases, tmp_path, "messages"), strict=True):
        for real in processes:
            assert accounted(m, p) == totals(real), (m, p)


def test_losses_are_those_of_one_process(tmp_path):
    """Equal to 1e-5: sums over the ranks are in another order."""
    clips = {"optimizer": "sgd", "max_grad_norm": 0.1}  # to less than half of the norm
    cases = [(GPT2, Plan(batch_size=2, tensor_parallel=2)), (LLAMA, Plan(batch_size=2, tensor_parallel=2, **clips))]
    for (m, p), processes in zip(cases, measured(2, cases, tmp_path, "losses"), strict=True):
        alone = losses_alone(build_step(m, p.replace(tensor_parallel=1)), p.max_grad_norm)
        for losses in processes:
            assert losses == pytest.approx(alone, rel=1e-5)


def test_gradients_are_those_of_one_process(tmp_path):
    """Equal to 1e-5 of a parameter's greatest, also of a norm of all heads: each rank has the sum over its own."""
    plan = {"batch_size": 2, "tensor_parallel": 2}
    alone = build_step(NORMED, Plan(batch_size=2, seq_len=8))
    alone.backward(alone.forward())
    expected = {name: p.grad.flatten().tolist() for name, p in alone.model.named_parameters()}
    cases = {2: [Plan(seq_len=8, **plan), Plan(**SEQUENCE, **plan), Plan(**SEQUENCE, **VOCABULARY, **plan)]}
    if RUNS:
        cases[4] = [Plan(data_parallel=2, sharding="zero3", **SEQUENCE, **VOCABULARY, **plan)]
    for ranks, plans in cases.items():
        for processes in measured(ranks, [(NORMED, p) for p in plans], tmp_path, "gradients"):
            for found, (name, values) in product(processes, expected.items()):
                assert found[name] == pytest.approx(values, rel=0, abs=1e-5 * max(map(abs, values))), name


def test_parts_add_up_to_the_whole():
    m = est.preset("llama-3.1-8b")
    alone, part = (account(m, Plan(seq_len=512, tensor_parallel=n)) for n in (1, 8))
    sizes = sizes_for(m, Plan(seq_len=512, tensor_parallel=8), threads=1)
    assert part.evaluate(m, Plan(seq_len=512, tensor_parallel=8)).parameters == alone.evaluate(m, Plan()).parameters
    held, whole = part.values(sizes).parameter_bytes, alone.evaluate(m, Plan(seq_len=512)).parameter_bytes
    shared = 4 * (2 * m.vocab_size * m.d_model + (2 * m.num_layers + 1) * m.d_model)  # embedding, head and norms
    assert held - shared == (whole - shared) // 8


def test_an_estimate_of_several_accelerators():
    plan = Plan(precision="bf16", attention="sdpa", seq_len=4096)
    alone = est.estimate("llama-3.1-8b", plan, "h100-80gb-sxm")
    r = est.estimate("llama-3.1-8b", plan.replace(tensor_parallel=4), "h100-80gb-sxm", count=4)
    assert r.memory.peak < alone.memory.peak
    assert r.flops.model == alone.flops.model
    assert r.flops.sequences == 1
    assert r.time.count == 4
    assert alone.time.seconds_per_step / 4 < r.time.seconds_per_step < alone.time.seconds_per_step
    assert r.time.parts["communication"] > 0
    sharded = plan.replace(tensor_parallel=4, sharding="zero3", precision="bf16-fsdp")
    several = est.estimate("llama-3.1-8b", sharded, "h100-80gb-sxm", count=16, global_batch_size=16)
    assert several.plan.data_parallel == 4
    assert several.flops.model == 16 * alone.flops.model
    shared = sharded.replace(sequence_parallel=True, vocabulary_parallel=True, loss="torch")
    parts = est.estimate("llama-3.1-8b", shared, "h100-80gb-sxm", count=16, global_batch_size=16)
    assert parts.memory.peak < several.memory.peak * 0.7  # the logits and the stream are shared too
    assert parts.flops.model == several.flops.model
    found = est.layouts("llama-3.1-8b", shared, "h100-80gb-sxm", count=8, global_batch_size=8)
    cut = (found.tensor_parallel > 1) & (found.pipeline_parallel == 1)
    assert cut.any()
    assert (found.sequence_parallel == (found.tensor_parallel > 1)).all()
    assert (found.vocabulary_parallel == cut).all()
    hybrid = est.estimate(
        "llama-3.1-8b", sharded.replace(shard_group=2), "h100-80gb-sxm", count=16, global_batch_size=16
    )
    assert hybrid.memory.peak > several.memory.peak  # each holds twice as much of the state
    with pytest.raises(ConfigError, match="count = 6: the plan's tensor_parallel is 4"):
        est.estimate("llama-3.1-8b", plan.replace(tensor_parallel=4), "h100-80gb-sxm", count=6)


@pytest.mark.parametrize(
    ("model", "plan", "field"),
    [
        ("llama-3.1-8b", {"tensor_parallel": 3}, "num_heads"),
        ("llama-3.1-8b", {"tensor_parallel": 16}, "num_kv_heads"),
        ("mixtral-8x7b", {"tensor_parallel": 2}, "experts"),
        ("llama-3.1-8b", {"tensor_parallel": 2, "data_parallel": 2}, "sharding"),
        ("llama-3.1-8b", {"tensor_parallel": 0}, "tensor_parallel"),
        ("llama-3.1-8b", {"tensor_parallel": 4, "sequence_parallel": True, "seq_len": 1022}, "seq_len"),
        ("llama-3.1-8b", {"sequence_parallel": True}, "tensor_parallel is 1"),
        ("gpt2", {"tensor_parallel": 2, **VOCABULARY}, "vocab_size"),
        ("gpt2", {"tensor_parallel": 2, "pipeline_parallel": 2, **VOCABULARY}, "pipeline_parallel"),
        ("gpt2", {"tensor_parallel": 2, "vocabulary_parallel": True}, "loss"),
    ],
)
def test_what_is_not_known_is_refused(model, plan, field):
    with pytest.raises(ConfigError, match=field):
        est.estimate(model, Plan(**plan))
