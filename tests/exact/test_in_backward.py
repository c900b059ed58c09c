"""An update in backward: every figure equal to PyTorch's, and the weights those of an update afterwards."""

import os
import random

import pytest
import torch
from random_plans import random_model, random_plan
from test_lora import SEED, random_adapter

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import OPTIMIZERS, Plan
from trainer.referee.measure import build_step
from trainer.referee.validate import compare

pytestmark = pytest.mark.usefixtures("no_onednn")

DRAWS = int(os.environ.get("RECIPE_DRAWS", "10"))
LLAMA = ModelConfig("llama", 3, 24, 4, 31, 13, 2, 6, 40)
IN_BACKWARD = {"update": "in-backward", "grad_accumulation": 1, "max_grad_norm": None}


def test_random_models_and_recipes():
    rng, done = random.Random(SEED + DRAWS), 0
    while done < DRAWS:
        m = random_model(rng)
        adapter = random_adapter(rng, m) if rng.random() < 0.25 else {}
        frozen = {"frozen": "embedding"} if not adapter and rng.random() < 0.2 else {}
        try:
            p = random_plan(rng, m, **IN_BACKWARD, **adapter, **frozen)
            wrong = [row for row in compare(m, p) if row.difference]
        except ConfigError:  # a scaler, masters, an optimizer without this precision
            continue
        assert not wrong, f"{m} {p}: {wrong}"
        done += 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_weights_are_those_of_an_update_afterwards(optimizer):
    found = []
    for update in ("after", "in-backward"):
        step = build_step(LLAMA, Plan(optimizer=optimizer, update=update))
        for _ in range(3):
            step()
        assert all(p.grad is None for p in step.model.parameters())
        found.append(list(step.model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"grad_accumulation": 2}, "each backward moves the parameters"),
        ({"max_grad_norm": 1.0}, "the gradients' norm is known when the first of them are gone"),
        ({"precision": "fp16-mixed"}, "for its GradScaler"),
        ({"precision": "bf16-master"}, "or its masters"),
        ({"data_parallel": 2}, "DDP sums a bucket of gradients after their hooks"),
        ({"data_parallel": 2, "sharding": "zero1"}, "allowed on several accelerators is sharding zero2, zero3"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(fields, said):
    with pytest.raises(ConfigError, match=said):
        Plan(update="in-backward", **fields)
