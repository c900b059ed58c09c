"""The promise: every exact figure equals what real PyTorch does, to the last byte and FLOP."""

from __future__ import annotations

import gc
import itertools

import pytest

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.settings import choices
from trainer.referee.validate import cases, compare, describe

SHAPES = 68  # of each family: eight edges (B, T, h, L, V of 1, V below T) and sixty at random

CHOSEN = list(cases(SHAPES, seed=20261123))


@pytest.mark.parametrize("turn", range(0, len(CHOSEN), 17))
def test_random_and_edge_shapes(turn):
    for m, p in CHOSEN[turn : turn + 17]:
        wrong = [row for row in compare(m, p) if row.difference]
        assert not wrong, f"{describe(m, p)}: {wrong}"


def test_every_combination_of_recipe_is_among_the_cases():
    seen = {(m.family, p.attention, p.checkpointing != "none", p.optimizer, p.optimizer_impl) for m, p in CHOSEN}
    assert len(seen) == 2 * 4 * 2 * 5
    assert {(p.loss, p.dropout) for _, p in CHOSEN} == set(itertools.product(choices(Plan)["loss"], (0.0, 0.1)))
    assert {(p.checkpointing, p.checkpoint_every) for _, p in CHOSEN if p.checkpointing != "none"} == set(
        itertools.product(choices(Plan)["checkpointing"][1:], (1, 2))
    )
    assert {p.grad_accumulation for _, p in CHOSEN} == {1, 2, 3}


def test_sliding_windows_are_shorter_and_longer_than_the_sequence():
    assert {m.sliding_window < p.tokens(m) for m, p in CHOSEN if m.sliding_window} == {True, False}


def test_the_vocabulary_is_both_larger_and_smaller_than_the_sequence():
    assert {m.vocab_size < p.tokens(m) for m, p in CHOSEN} == {True, False}


@pytest.mark.parametrize("threads", [1, 2])
def test_scratch_that_grows_with_the_threads(threads):
    import torch

    from estimator.accounting.accounts import account
    from trainer.referee.measure import build_step, nbytes, peak_growth

    m = ModelConfig("gpt2", 2, 48, 3, 31, 300)
    p = Plan(batch_size=2, attention="sdpa", optimizer="sgd")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = build_step(m, p)
        step()
        resident = nbytes([*step.model.parameters(), *step.model.buffers(), *step.inputs, *step.state()])
        real = resident + peak_growth(step, "cpu")
    finally:
        torch.set_num_threads(before)
    assert account(m, p, "cpu").evaluate(m, p, threads=threads).peak_bytes == real


LARGE = {
    "gpt2-xl widths, naive": (ModelConfig("gpt2", 1, 1600, 25, 50257, 1024), Plan(batch_size=1, seq_len=256)),
    "gpt2-xl widths, two blocks, sdpa, fused": (
        ModelConfig("gpt2", 2, 1600, 25, 50257, 1024),
        Plan(batch_size=2, seq_len=128, attention="sdpa", optimizer_impl="fused"),
    ),
    "gpt2-xl widths, three checkpointed blocks, bundled": (
        ModelConfig("gpt2", 3, 1600, 25, 50257, 1024),
        Plan(batch_size=2, seq_len=128, checkpointing="block", optimizer_impl="bundled"),
    ),
    "llama-3.2-1b widths, a quarter of its vocabulary, naive, foreach": (
        ModelConfig("llama", 1, 2048, 32, 32_064, 131_072, 8, 64, 8192, True),
        Plan(batch_size=1, seq_len=64, optimizer_impl="foreach"),
    ),
    "mistral-7b's heads and window, sdpa, bf16": (
        ModelConfig("llama", 2, 128, 32, 997, 8192, 8, 128, 256, sliding_window=96),
        Plan(batch_size=2, seq_len=200, precision="bf16", attention="sdpa", optimizer="sgd"),
    ),
    "llama-3.2-1b widths, two checkpointed blocks, sdpa": (
        ModelConfig("llama", 2, 2048, 32, 128_256, 131_072, 8, 64, 8192, True),
        Plan(batch_size=1, seq_len=32, attention="sdpa", checkpointing="block", optimizer_impl="bundled"),
    ),
}


QUICKER = "mistral-7b's heads and window, sdpa, bf16"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICKER else pytest.mark.slow) for name in LARGE]
)
def test_real_widths(name):
    m, p = LARGE[name]
    rows = compare(m, p)
    gc.collect()
    assert [row for row in rows if row.difference] == []


def test_the_scratch_of_the_trainer_is_what_the_ledger_says():
    from estimator.eager.losses import LOSS_CHUNKS, LOSS_TILE
    from estimator.optim.optimizers import SLICE, STATE_BLOCK
    from trainer.model import loss
    from trainer.optim import optimizers as optim
    from trainer.optim.eight_bit import BLOCK

    assert (loss.CPU_TILE, loss.CHUNKS) == (LOSS_TILE, LOSS_CHUNKS)
    assert STATE_BLOCK == BLOCK
    assert SLICE == {"cpu": optim.CPU_SLICE, "cuda": optim.CUDA_SLICE}
