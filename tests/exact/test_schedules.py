"""Schedules on one device: micro-batches whose graphs are alive together, equal to PyTorch's to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from estimator.accounting.accounts import account_at, recipe_of, sizes_for
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.schedules import accumulation, all_forward_first, in_flight, micro_batches, read
from trainer.referee.first_difference import compare
from trainer.referee.measure import measure

pytestmark = pytest.mark.usefixtures("no_onednn")

GPT2 = ModelConfig("gpt2", 5, 24, 3, 101, 13)
LLAMA = ModelConfig("llama", 3, 24, 4, 37, 9, 2, 6, 31, tie_embeddings=False)
EDGES = ModelConfig("gpt2", 1, 6, 1, 17, 1)
MOVES = ("F0 F1 B0 B1", "F0 F1 B1 B0", "F0 F1 F2 B0 B1 B2", "F0 F1 B0 F2 B1 B2", "F0 B0 F1 F2 B2 B1")
CASES = [
    (GPT2, {}, "F0 F1 B0 B1"),
    (GPT2, {"checkpointing": "block", "checkpoint_every": 2}, "F0 F1 F2 B0 B1 B2"),
    (GPT2, {"precision": "fp16-mixed", "loss": "torch"}, "F0 F1 B0 F2 B1 B2"),
    (LLAMA, {"precision": "bf16-mixed", "max_grad_norm": 1.0, "batch_size": 2}, "F0 F1 B1 B0"),
    (LLAMA, {"precision": "bf16-master", "optimizer": "lion", "loss": "chunked"}, "F0 F1 B0 B1"),
    (LLAMA, {"checkpointing": "selective", "attention": "sdpa"}, "F0 F1 B0 F2 B1 B2"),
    (LLAMA, {"dropout": 0.1, "checkpointing": "attention"}, "F0 B0 F1 F2 B2 B1"),
    (EDGES, {"optimizer": "sgd"}, "F0 F1 F2 B0 B1 B2"),
]


@pytest.mark.parametrize(("m", "plan", "moves"), CASES, ids=[f"{m.family} {moves}" for m, _, moves in CASES])
def test_the_peak_is_pytorchs(m, plan, moves):
    schedule = read(moves)
    p = Plan(**plan, grad_accumulation=micro_batches(schedule))
    sizes = sizes_for(m, p, threads=torch.get_num_threads())
    known = account_at(replace(recipe_of(m, p, "cpu"), schedule=schedule), sizes, "cpu").values(sizes)
    real = measure(m, p, timed_steps=0, schedule=schedule)
    assert known.peak_bytes == real.peak_bytes
    assert known.activation_bytes == real.saved_bytes
    assert known.gradient_bytes == real.gradient_bytes


@pytest.mark.parametrize("moves", MOVES)
def test_every_event_is_pytorchs(moves):
    schedule = read(moves)
    p = Plan(grad_accumulation=micro_batches(schedule), optimizer="sgd")
    assert compare(LLAMA, p, schedule=schedule).endswith("events are equal")


def test_each_graph_that_is_alive_adds_its_activations():
    """All forwards first, the first backward meets two more graphs, but not yet the gradients of a micro-batch."""
    m = GPT2.replace(context_length=64)

    def known(schedule):
        p = Plan(grad_accumulation=3, optimizer="sgd")
        sizes = sizes_for(m, p, threads=1)
        return account_at(replace(recipe_of(m, p, "cpu"), schedule=schedule), sizes, "cpu").values(sizes)

    one, three = known(accumulation(3)), known(all_forward_first(3))
    assert in_flight(accumulation(3)) == 1
    assert in_flight(all_forward_first(3)) == 3
    more = three.peak_bytes - one.peak_bytes
    assert 2 * one.activation_bytes - one.gradient_bytes < more < 2 * one.activation_bytes
