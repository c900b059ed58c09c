"""Expert parallelism: each rank's bytes and messages against real processes, and the losses against one process."""

from __future__ import annotations

import os
import sys
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from test_sharding import accounted, differing, measured, totals

import estimator as est
from estimator.accounting.accounts import account
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from trainer.referee.measure import build_step

sys.path.append(str(Path(__file__).parents[1] / "exact"))

import random_parts

RUNS = int(os.environ.get("EXPERT_RUNS", "0"))  # random recipes to try, in place of a few
SIZES = {
    "num_layers": 3, "d_model": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6, "vocab_size": 37,
    "context_length": 8, "num_experts": 4, "d_expert": 10, "sliding_window": None,
}  # fmt: skip
MIXTRAL = est.preset("mixtral-8x7b").replace(**SIZES, experts_per_token=2)
QWEN = est.preset("qwen3-30b-a3b").replace(**SIZES, experts_per_token=3)  # whose rows do not come out even
GPT_OSS = est.preset("gpt-oss-20b").replace(**SIZES | {"sliding_window": 4}, experts_per_token=2)  # with biases
CASES = [
    (MIXTRAL, {}),
    (QWEN, {"seq_len": 7, "optimizer": "sgd", "grad_accumulation": 2, "max_grad_norm": 1.0}),
    (MIXTRAL, {"optimizer": "sgd", "checkpointing": "block", "attention": "sdpa"}),
    (GPT_OSS, {"optimizer": "lion", "seq_len": 7}),
    (QWEN, {"optimizer": "sgd", "precision": "bf16-mixed", "loss": "torch", "imbalance": 1.3}),
    (MIXTRAL, {"sharding": "zero3", "precision": "bf16-fsdp", "checkpointing": "block", "max_grad_norm": 1.0}),
    (GPT_OSS, {"sharding": "zero2", "optimizer": "sgd", "grad_accumulation": 2, "imbalance": 1.5}),
]


FSDP = {"sharding": "zero3"}


def drawn(random, ranks):
    """A model with experts and how so many ranks share them."""
    while True:
        try:
            m = random_parts.model(random)
            if m.num_experts is None:
                continue
            m = m.replace(num_experts=ranks * m.num_experts, num_layers=random.randint(1, 4))
            p = Plan(
                batch_size=random.randint(1, 3),
                data_parallel=ranks,
                expert_parallel=ranks,
                sharding=(sharding := random.choice(["none", "zero2", "zero3"])),
                precision=random.choice(["fp32", "bf16", "bf16-mixed", "fp32" if sharding == "none" else "bf16-fsdp"]),
                attention=random.choice(["naive", "naive-fp32", "sdpa"]),
                checkpointing=random.choice(["none", "none", "block", "attention", "selective"]),
                loss=random.choice(["bundled", "torch", "torch-fp32"]),
                optimizer=random.choice(["sgd", "sgd", "adamw", "lion"]),
                grad_accumulation=random.choice([1, 1, 2, 3]),
                max_grad_norm=random.choice([None, 1.0]),
                balance=random.choice([0.0, 0.01]),
                imbalance=random.choice([1.0, 1.5, min(m.num_experts / (m.experts_per_token or 1), 3.7)]),
            )
            account(m, p, "cpu")
        except ConfigError:
            continue
        return m, p


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_holds_what_the_account_says_to_the_byte(ranks, tmp_path):
    random = Random(ranks)
    cases = [
        (m, Plan(batch_size=2, data_parallel=ranks, expert_parallel=ranks, **plan))
        for m, plan in CASES[ranks == 4 :: ranks // 2]
    ]
    cases += [drawn(random, ranks) for _ in range(RUNS or 1)]
    wrong = differing(cases, measured(ranks, cases, tmp_path))
    assert not wrong, (len(wrong), wrong[0])


def test_each_rank_sends_the_messages_of_the_ledger(tmp_path):
    cases = [(m, Plan(batch_size=2, data_parallel=2, expert_parallel=2, **plan)) for m, plan in CASES]
    for (m, p), processes in zip(cases[1::2], measured(2, cases[1::2], tmp_path, "messages"), strict=True):
        for rank, real in enumerate(processes):
            assert accounted(m, p, rank) == totals(real), (m, p)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.skipif(not RUNS, reason="EXPERT_RUNS"))])
def test_losses_are_those_of_one_process(ranks, tmp_path):
    """Of other tokens in each rank, with routers that choose: equal to 1e-5, as sums are in another order."""
    clips = {"optimizer": "sgd", "max_grad_norm": 0.1}  # to less than half of the norm
    shared = {"batch_size": 2, "data_parallel": ranks, "expert_parallel": ranks}
    cases = [(QWEN, Plan(**shared)), (GPT_OSS, Plan(**shared, **clips)), (QWEN, Plan(**shared, **clips, **FSDP))]
    for (m, p), processes in zip(cases, measured(ranks, cases, tmp_path, "losses"), strict=True):
        step = build_step(m, p.replace(data_parallel=1, expert_parallel=1, sharding="none"))
        inputs, alone = step.inputs, [[] for _ in range(ranks)]
        for _ in range(3):
            for rank in range(ranks):
                step.inputs = tuple(x.roll(rank, 1) for x in inputs)
                loss = step.forward()
                alone[rank].append(loss.item())
                step.backward(loss / ranks)
            if p.max_grad_norm is not None:
                assert torch.nn.utils.clip_grad_norm_(step.model.parameters(), p.max_grad_norm) > 2 * p.max_grad_norm
            step.optimizer.step()
            step.optimizer.zero_grad()
        for losses, own in zip(processes, alone, strict=True):
            assert losses == pytest.approx(own, rel=1e-5)


def test_gradients_are_those_of_one_process(tmp_path):
    """Equal to 1e-5 of a parameter's greatest, on other tokens in each rank."""
    shared = {"batch_size": 2, "data_parallel": 2, "expert_parallel": 2}
    alone = build_step(GPT_OSS, Plan(batch_size=2))
    inputs = alone.inputs
    for rank in range(2):
        alone.inputs = tuple(x.roll(rank, 1) for x in inputs)
        alone.backward(alone.forward() / 2)
    expected = {name: p.grad.flatten().tolist() for name, p in alone.model.named_parameters()}
    cases = [(GPT_OSS, Plan(**shared)), (GPT_OSS, Plan(**shared, **FSDP))]
    for processes in measured(2, cases, tmp_path, "gradients"):
        for found, (name, values) in product(processes, expected.items()):
            assert found[name] == pytest.approx(values, rel=0, abs=1e-5 * max(map(abs, values))), name


def test_experts_add_up_to_the_whole():
    m, plan = est.preset("mixtral-8x7b"), Plan(seq_len=512, precision="bf16")
    alone = account(m, plan).evaluate(m, plan)
    shared = plan.replace(data_parallel=8, expert_parallel=8)
    part = account(m, shared).evaluate(m, shared)
    assert part.parameters == alone.parameters
    assert part.active_parameters == alone.active_parameters
    of_experts = alone.modules["experts"].parameter_bytes
    assert alone.parameter_bytes - part.parameter_bytes == of_experts * 7 // 8
    assert part.forward_flops == alone.forward_flops  # as many rows come as go


@pytest.mark.parametrize(
    ("model", "plan", "field"),
    [
        ("llama-3.1-8b", {"expert_parallel": 2, "data_parallel": 2}, "no experts"),
        ("mixtral-8x7b", {"expert_parallel": 3, "data_parallel": 3}, "num_experts"),
        ("mixtral-8x7b", {"expert_parallel": 2, "data_parallel": 4}, "data_parallel is 4"),
        ("mixtral-8x7b", {"expert_parallel": 2, "data_parallel": 2, "sharding": "zero1"}, "sharding"),
        ("mixtral-8x7b", {"expert_parallel": 4, "data_parallel": 4, "seq_len": 1}, "some get none"),
    ],
)
def test_what_is_not_known_is_refused(model, plan, field):
    with pytest.raises(ConfigError, match=field):
        est.estimate(model, Plan(**plan))
