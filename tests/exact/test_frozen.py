"""Models of which a part is trained: every figure equal to PyTorch's, whatever the part and the recipe."""

import random

import pytest
import torch
from random_plans import random_model, random_parts, random_plan

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from trainer.referee.measure import build_step
from trainer.referee.validate import compare

pytestmark = pytest.mark.usefixtures("no_onednn")

LLAMA = ModelConfig("llama", 12, 24, 4, 31, 13, 2, 6, 40, tie_embeddings=False)
GPT2 = ModelConfig("gpt2", 12, 24, 3, 31, 13)


def differences(m, p):
    return [row for row in compare(m, p) if row.difference]


@pytest.mark.parametrize("turn", range(2))
def test_random_parts_and_recipes(turn):
    rng, done = random.Random(turn), 0
    while done < 15:
        m = random_model(rng)
        lists = rng.choice((("trained",), ("frozen",), ("trained", "frozen")))
        try:
            p = random_plan(rng, m, **{name: random_parts(rng, m) for name in lists})
            wrong = differences(m, p)
        except ConfigError:  # nothing is left to train, a tied head, an optimizer without this precision
            continue
        assert not wrong, f"{m} {p}: {wrong}"
        done += 1


@pytest.mark.parametrize("m", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
@pytest.mark.parametrize(
    "parts",
    [
        {"frozen": "embedding"},
        {"frozen": "embedding,layers:0-7"},
        {"trained": "norms"},
        {"frozen": "norms"},
        {"trained": "layers:10-11"},
        {"trained": "attention", "frozen": "layers:0-4"},
    ],
    ids=str,
)
def test_what_people_freeze(m, parts, checkpointing):
    assert differences(m, Plan(batch_size=2, checkpointing=checkpointing, **parts)) == []


def test_frozen_weights_have_no_gradient_no_state_and_take_no_part_in_the_update():
    step = build_step(LLAMA, Plan(trained="norms", optimizer_impl="bundled"))
    before = {name: x.clone() for name, x in step.model.named_parameters()}
    step()
    moved = {name for name, x in step.model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "norm" in name}
    assert len(step.optimizer.state) == len(moved) == 2 * LLAMA.num_layers + 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"frozen": "all"}, "no parameter of the model is left to train"),
        ({"trained": ""}, "no parameter of the model is left to train"),
        ({"frozen": "layers:10-12"}, r"frozen = 'layers:10-12': the model's layers are 0 to 11"),
        ({"frozen": "layers:3-1"}, "layers are two numbers from 0"),
        ({"trained": "atention"}, "trained = 'atention': did you mean attention"),
        ({"frozen": 3}, "frozen = 3: must be names with commas"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(fields, said):
    with pytest.raises(ConfigError, match=said):
        build_step(LLAMA, Plan(**fields))


def test_the_head_of_a_tied_model_is_its_embedding():
    with pytest.raises(ConfigError, match="its embedding's matrix; say embedding"):
        build_step(preset("gpt2").replace(num_layers=1), Plan(frozen="head"))


def test_lists_may_be_lists():
    assert Plan(frozen=("embeddings", "layers:0-3")) == Plan(frozen="embedding,layers:0-3")
