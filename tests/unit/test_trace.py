"""A ledger of three blocks, repeated, is the ledger of any number of blocks."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from estimator.accounting.accounts import account, recipe_of, sizes_for
from estimator.accounting.sizes import sizes_of
from estimator.accounting.step import run_step
from estimator.accounting.trace import Trace
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.eager.ledger import Phase
from estimator.eager.repetition import Group, Stack
from estimator.eager.sizes import ShapeClass
from estimator.memory.device import rounded_peak, timeline

GPT2 = ModelConfig("gpt2", 7, 48, 4, 101, 32)
LLAMA = ModelConfig("llama", 7, 40, 4, 101, 32, 2, 6, 33, qkv_bias=True)
PLANS = [
    Plan(batch_size=3, seq_len=9, attention=a, checkpointing=c, optimizer_impl=i, grad_accumulation=g, max_grad_norm=n)
    for a, c, i, g, n in product(
        ("naive", "sdpa"), ("none", "block"), ("loop", "foreach", "fused", "bundled"), (1, 2), (None, 1.0)
    )
]


def named(m):
    return f"{m.family}-{m.num_layers}"


def executed(m, p, device="cpu"):
    """The trace of a step of which a few turns of blocks are executed."""
    recipe, sizes = recipe_of(m, p, device), sizes_for(m, p)
    stack = recipe.layout(m.num_layers).stack
    return Trace(run_step(recipe, ShapeClass.at(sizes, recipe.halved), device, stack, sizes), stack)


def executed_whole(m, p, device="cpu"):
    """The trace of a step of which every block is executed."""
    recipe, sizes = recipe_of(m, p, device), sizes_for(m, p)
    layout = recipe.layout(m.num_layers)
    kinds = [
        kind for group, turns in zip(layout.stack.groups, layout.turns, strict=True) for kind in group.pattern * turns
    ]
    stack = Stack(tuple(Group((kind,), 1) for kind in kinds))
    return Trace(run_step(recipe, ShapeClass.at(sizes, recipe.halved), device, stack, sizes), stack)


def events_of(trace, sizes):
    nbytes = trace.class_bytes(sizes)
    return [
        (int(nbytes[trace.klass[i]]), trace.classes[trace.klass[i]][1], int(trace.sign[i])) for i in trace.expand(sizes)
    ]


@pytest.mark.parametrize("m", [GPT2, LLAMA], ids=lambda m: m.family)
def test_three_blocks_repeated_are_seven_blocks_event_by_event(m):
    for p in PLANS[::5]:
        repeated, whole = executed(m, p), executed_whole(m, p)
        sizes = sizes_of(m, 3, 9)
        assert events_of(repeated, sizes) == events_of(whole, sizes), p


@pytest.mark.parametrize("m", [GPT2, LLAMA], ids=lambda m: m.family)
@pytest.mark.parametrize(("every", "layers"), [(2, 11), (3, 15)])
@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_units_of_which_one_block_is_checkpointed_repeat_event_by_event(m, every, layers, checkpointing):
    m = m.replace(num_layers=layers)
    p = Plan(batch_size=3, seq_len=9, checkpointing=checkpointing, checkpoint_every=every, grad_accumulation=2)
    repeated, whole = executed(m, p), executed_whole(m, p)
    assert len(repeated.stack.places) == 3 * every + layers % every
    sizes = sizes_of(m, 3, 9)
    assert events_of(repeated, sizes) == events_of(whole, sizes)
    line, all_of_it = timeline(account(m, p, "cpu"), sizes), [e.where.block for e in whole.ledger.events[whole.step :]]
    assert list(line.blocks) == [-1 if block is None else block for block in all_of_it]
    assert {account(m, p, "cpu").values(sizes).peak_where.block} <= {None, *range(layers)}


@pytest.mark.parametrize("m", [GPT2, LLAMA, GPT2.replace(num_layers=1), LLAMA.replace(num_layers=2)], ids=named)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_timeline_peaks_where_the_closed_form_says_and_ends_where_it_began(m, device):
    for p in PLANS[::9]:
        a = account(m, p, device)
        sizes = sizes_of(m, p.batch_size, p.tokens(m))
        values, line = a.values(sizes), timeline(a, sizes)
        assert line.live.max() == values.peak_bytes
        assert line.live[-1] == line.start
        assert np.array_equal(sum(line.categories.values()), line.live)
        assert values.peak_bytes == sum(values.peak_categories.values())
        at_peak = {name: int(x[line.peak]) for name, x in line.categories.items()}
        ties = np.flatnonzero(line.live == values.peak_bytes)
        assert len(ties) > 1 or at_peak == values.peak_categories
        assert timeline(a, sizes, 512).live.max() == rounded_peak(a, sizes)


def test_blocks_of_the_timeline_run_forward_and_backward():
    p = Plan(batch_size=3, seq_len=9)
    line = timeline(account(GPT2, p, "cpu"), sizes_of(GPT2, 3, 9))
    for phase, order in (("forward", range(7)), ("backward", range(6, -1, -1))):
        blocks = line.blocks[(line.phases == phase) & (line.blocks >= 0)]
        changes = blocks[np.flatnonzero(np.diff(blocks, prepend=-2))]
        assert list(changes) == list(order)
    assert {line.where(i).module.split(".")[1] for i in np.flatnonzero(line.blocks == 4)} == {"4"}


def test_the_setup_comes_before_the_step():
    trace = executed(GPT2, PLANS[0])
    phases = [e.where.phase for e in trace.ledger.events]
    assert all(x is Phase.SETUP for x in phases[: trace.step])
    assert Phase.SETUP not in phases[trace.step :]
