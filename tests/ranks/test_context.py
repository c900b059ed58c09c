"""Context parallelism: each rank's bytes and messages against real processes, and the losses against one process."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
from test_sharding import accounted, differing, losses_alone, measured, totals

import estimator as est
from estimator.accounting.accounts import account
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.referee.measure import build_step

sys.path.append(str(Path(__file__).parents[1] / "exact"))

import random_parts

RUNS = int(os.environ.get("CONTEXT_RUNS", "0"))  # random recipes to try, in place of a few
GPT2 = ModelConfig("gpt2", 3, 24, 4, 37, 12, d_ff=40)
LLAMA = ModelConfig("llama", 4, 24, 4, 37, 12, 2, 6, 32, tie_embeddings=False)
ALIBI = GPT2.replace(parts=replace(GPT2.made_of, positions=replace(GPT2.made_of.positions, kind="alibi")))
CASES = [
    (LLAMA, {"max_grad_norm": 1.0, "grad_accumulation": 2}),
    (GPT2, {"optimizer": "sgd", "batch_size": 1}),
    (LLAMA.replace(sliding_window=5), {"optimizer": "sgd", "attention": "sdpa", "precision": "bf16-mixed"}),
    (GPT2, {"optimizer": "sgd", "checkpointing": "block", "attention": "sdpa", "sharding": "zero3"}),
    (LLAMA, {"optimizer": "lion", "precision": "bf16-fsdp", "sharding": "zero2", "loss": "chunked"}),
    (ALIBI, {"optimizer": "sgd", "checkpointing": "attention", "seq_len": 10}),
]


def drawn(random, replicas, ranks):
    """A model and how so many ranks share its sequences."""
    while True:
        try:
            m = random_parts.model(random)
            tokens = ranks * random.randint(1, 7)
            m = m.replace(context_length=tokens + random.choice([0, 3]), num_layers=random.randint(1, 4))
            sharding = random.choice(["none", "none", "zero1", "zero2", "zero3"])
            mixed = sharding in ("zero2", "zero3") and random.random() < 0.4
            p = Plan(
                batch_size=random.randint(1, 3),
                seq_len=tokens,
                data_parallel=replicas,
                context_parallel=ranks,
                sharding=sharding,
                precision="bf16-fsdp" if mixed else random.choice(["fp32", "fp32", "bf16", "bf16-mixed"]),
                attention=random.choice(["naive", "naive-fp32", "sdpa", "sdpa-math"]),
                checkpointing=random.choice(["none", "none", "block", "attention", "selective"]),
                loss=random.choice(["bundled", "torch", "torch-fp32", "chunked"]),
                optimizer=random.choice(["sgd", "sgd", "adamw", "lion"]),
                grad_accumulation=random.choice([1, 1, 2, 3]),
                max_grad_norm=random.choice([None, 1.0]),
                dropout=random.choice([0.0, 0.0, 0.1]),
            )
            account(m, p, "cpu")
        except ConfigError:
            continue
        return m, p


@pytest.mark.parametrize(("replicas", "ranks"), [(1, 2), (2, 2)])
def test_each_rank_holds_what_the_account_says_to_the_byte(replicas, ranks, tmp_path):
    random, shared = Random(replicas), {"data_parallel": replicas, "context_parallel": ranks}
    cases = [(m, Plan(**{"batch_size": 2} | shared | plan)) for m, plan in CASES[replicas > 1 :: replicas]]
    cases += [drawn(random, replicas, ranks) for _ in range(RUNS or 1)]
    wrong = differing(cases, measured(replicas * ranks, cases, tmp_path))
    assert not wrong, (len(wrong), wrong[0])


def test_each_rank_sends_the_messages_of_the_ledger(tmp_path):
    cases = [(m, Plan(**{"batch_size": 2} | {"context_parallel": 2} | plan)) for m, plan in (CASES[0], CASES[3])]
    for (m, p), processes in zip(cases, measured(2, cases, tmp_path, "messages"), strict=True):
        for real in processes:
            assert accounted(m, p) == totals(real), (m, p)


def test_losses_are_those_of_one_process(tmp_path):
    """Their mean over the ranks equals it to 1e-5: sums are in another order."""
    plans = [{}, {"optimizer": "sgd", "max_grad_norm": 0.1, "sharding": "zero3"}]  # to less than half of the norm
    models = LLAMA.replace(sliding_window=5), ALIBI
    cases = [(m, Plan(batch_size=2, context_parallel=2, **plan)) for m, plan in zip(models, plans, strict=True)]
    for (m, p), processes in zip(cases, measured(2, cases, tmp_path, "losses"), strict=True):
        alone = losses_alone(build_step(m, p.replace(context_parallel=1, sharding="none")), p.max_grad_norm)
        assert [sum(losses) / 2 for losses in zip(*processes, strict=True)] == pytest.approx(alone, rel=1e-5)


def test_gradients_are_those_of_one_process(tmp_path):
    """Equal to 1e-5 of a parameter's greatest."""
    alone = build_step(ALIBI, Plan(batch_size=2))
    alone.backward(alone.forward())
    expected = {name: p.grad.flatten().tolist() for name, p in alone.model.named_parameters()}
    plans = [Plan(batch_size=2, context_parallel=2, sharding=sharding) for sharding in ("none", "zero3")]
    for processes in measured(2, [(ALIBI, p) for p in plans], tmp_path, "gradients"):
        for found, (name, values) in product(processes, expected.items()):
            assert found[name] == pytest.approx(values, rel=0, abs=1e-5 * max(map(abs, values))), name


def test_activations_are_shared_out():
    m, plan = est.preset("llama-3.1-8b"), Plan(seq_len=8192, precision="bf16", attention="sdpa-math")
    alone = account(m, plan).evaluate(m, plan)
    shared = plan.replace(context_parallel=8)
    part = account(m, shared).evaluate(m, shared)
    assert part.parameter_bytes == alone.parameter_bytes
    assert part.forward_flops == alone.forward_flops // 8
    assert alone.activation_bytes / 8 < part.activation_bytes < alone.activation_bytes / 6  # keys and values are whole


@pytest.mark.parametrize(
    ("model", "plan", "field"),
    [
        ("llama-3.1-8b", {"context_parallel": 3, "seq_len": 1024}, "seq_len"),
        ("deepseek-v2-lite", {"context_parallel": 2}, "attention.latent"),
        ("llama-3.1-8b", {"context_parallel": 2, "tensor_parallel": 2}, "tensor_parallel"),
        ("llama-3.1-8b", {"context_parallel": 2, "precision": "bf16", "attention": "sdpa-flash"}, "a context_parallel"),
    ],
)
def test_what_is_not_known_is_refused(model, plan, field):
    with pytest.raises(ConfigError, match=field):
        est.estimate(model, Plan(**plan), "a100-80gb-sxm")
