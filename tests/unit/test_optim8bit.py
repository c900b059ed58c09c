"""AdamW with 8-bit states: close to AdamW's updates, and exact in what it keeps."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.optim.optimizers import STATE_BLOCK
from trainer.optim.eight_bit import BLOCK, AdamW8bit, dynamic_fractions
from trainer.optim.optimizers import AdamW


@pytest.mark.parametrize("signed", [True, False])
def test_the_fractions_are_256_in_order_with_0_and_1_among_them_and_dense_near_0(signed):
    x = dynamic_fractions(signed=signed)
    assert len(x) == 256
    assert bool((x.diff() > 0).all())
    assert float(x[-1]) == 1
    assert 0.0 in x.tolist()
    assert float(x.min()) == (pytest.approx(-0.99297, abs=1e-5) if signed else 0)
    assert int((x.abs() < 0.1).sum()) > 100


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_its_updates_are_adamws_within_the_steps_of_the_fractions(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine, exact = AdamW8bit([ours], lr=1e-2), AdamW([theirs], lr=1e-2)
    for _ in range(5):
        g = torch.randn(rows, columns, generator=generator)
        ours.grad, theirs.grad = g.clone(), g.clone()
        mine.step()
        exact.step()
    moved = (theirs.detach() - start).norm()
    assert float((ours.detach() - theirs.detach()).norm() / moved) < 0.1
    state = mine.state[ours]
    assert state["code1"].dtype == state["code2"].dtype == torch.uint8
    assert state["absmax1"].numel() == -(-rows * columns // BLOCK)


def test_a_state_dict_goes_round_and_the_next_step_is_the_same():
    torch.manual_seed(0)
    a, b = (torch.nn.Parameter(torch.ones(30, 20)) for _ in range(2))
    first, second = AdamW8bit([a]), AdamW8bit([b])
    for _ in range(3):
        a.grad = torch.randn(30, 20)
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    b.data.copy_(a.data)
    a.grad = b.grad = torch.randn(30, 20)
    first.step()
    second.step()
    assert second.state[b]["code1"].dtype == torch.uint8
    assert torch.equal(a, b)


def test_blocks_are_what_the_ledger_says_and_states_are_a_quarter():
    assert BLOCK == STATE_BLOCK
    whole, small = (
        est.estimate("gpt2", est.Plan(optimizer=name)).values.optimizer_bytes for name in ("adamw", "adamw-8bit")
    )
    assert 0.25 < small / whole < 0.26


def test_bf16_weights_move_as_float32_ones_do_and_are_rounded_once():
    torch.manual_seed(0)
    wide = torch.nn.Parameter(torch.randn(30, 20).bfloat16().float())
    half = torch.nn.Parameter(wide.detach().bfloat16())
    first, second = AdamW8bit([wide], lr=1e-2), AdamW8bit([half], lr=1e-2)
    wide.grad = torch.randn(30, 20).bfloat16().float()
    half.grad = wide.grad.bfloat16()
    first.step()
    second.step()
    assert torch.equal(half, wide.bfloat16())
    assert second.state[half]["absmax1"].dtype == torch.float32
    again = AdamW8bit([half])
    again.load_state_dict(copy.deepcopy(second.state_dict()))
    assert all(torch.equal(x, again.state[half][name]) for name, x in second.state[half].items() if name != "step")
    assert {x.dtype for name, x in again.state[half].items() if name != "step"} == {torch.uint8, torch.float32}
