"""The recipes of CONTRIBUTING.md, followed: a new operator, and a part of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from estimator.accounting.accounts import account
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.eager.autograd import attach, backward, record
from estimator.eager.letters import B, Sizes, d
from estimator.eager.ops import elementwise, parameter
from estimator.eager.repetition import Group, Stack
from estimator.eager.sizes import ShapeClass
from estimator.eager.tensor import FLOAT32, Locals, Machine, op
from trainer.referee.measure import onednn
from trainer.referee.validate import compare

SIZES = {"B": 3, "d": 5}


# derivatives.yaml: "name: tanh ... self: tanh_backward(grad, result)": it saves its result.
@op
def tanh(x):
    """torch.tanh."""

    def gradient(c, grad):
        return [elementwise("tanh_backward", grad, c.saved[0])]

    node = record("TanhBackward0", (x,), gradient)
    out = elementwise("tanh", x)
    return attach(node, out, save=(out,))


def test_an_operator_is_its_real_events():
    """y = tanh(tanh(tanh(p))): each allocation and each free, in order, as the profiler sees them."""
    machine = Machine(ShapeClass(frozenset(), False, True), "cpu", Stack((Group(("all",), 1),)), SIZES)
    p = parameter(machine, (B, d), FLOAT32)
    with Locals() as v:
        v.y = p
        for _ in range(3):
            v.y = tanh(v.y)
        backward(v.y)
    mine = [event.sign * Sizes(SIZES).value(event.storage.nbytes) for event in machine.ledger.events[1:]]

    real = torch.zeros(SIZES["B"], SIZES["d"], requires_grad=True)

    def step():
        y = real
        for _ in range(3):
            y = torch.tanh(y)
        y.backward(torch.ones_like(y))

    step()
    real.grad = None
    with onednn(enabled=False), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert mine == [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


LLAMA = ModelConfig("llama", 3, 16, 4, 53, 12, 2, 4, 24)
RECIPES = (
    {"attention": "naive"},
    {"attention": "sdpa", "precision": "bf16-mixed", "optimizer_impl": "fused"},
    {"attention": "sdpa", "precision": "bf16", "checkpointing": "block", "loss": "torch"},
    {"attention": "naive-fp32", "precision": "bf16-master", "grad_accumulation": 2, "max_grad_norm": 1.0},
    {"attention": "sdpa", "checkpointing": "selective", "optimizer": "muon", "loss": "chunked"},
)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: "-".join(map(str, recipe.values())))
def test_queries_and_keys_with_norms_are_exact_in_every_recipe(recipe):
    """QK-norm in a Llama: `Attention.qk_norm`, which Qwen3 and others have."""
    plain = LLAMA.made_of
    m = LLAMA.replace(parts=replace(plain, attention=replace(plain.attention, qk_norm="head")))
    p = Plan(batch_size=2, **recipe)
    without, rows = account(LLAMA, p, "cpu").evaluate(LLAMA, p), compare(m, p)
    (parameters,) = [row for row in rows if row.quantity == "parameters"]
    assert (
        parameters.estimate == without.parameters + 3 * 2 * 4
    )  # in 3 blocks a weight of head_dim 4 for each of the two
    assert [row for row in rows if row.difference] == []
