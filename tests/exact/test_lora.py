"""Adapters on random models and recipes: every figure equal to PyTorch's."""

import os
import random
from dataclasses import replace

import pytest
import random_parts
from random_plans import random_model, random_plan

from estimator.describe.adapters import ALL
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.parts import Ends
from estimator.describe.plan import Plan
from estimator.describe.settings import choices
from trainer.referee.validate import compare

pytestmark = pytest.mark.usefixtures("no_onednn")

DRAWS = int(os.environ.get("RECIPE_DRAWS", "12"))
SEED = int(os.environ.get("RECIPE_SEED", "0"))  # added to the seeds, for other draws
LLAMA = ModelConfig("llama", 5, 24, 4, 31, 13, 2, 6, 40)
GPT2 = ModelConfig("gpt2", 5, 24, 3, 31, 13)


def differences(m, p):
    return [row for row in compare(m, p) if row.difference]


def random_adapter(rng, m):
    names = ["qkv", "out", "up", "down"] if m.family == "gpt2" else ["q", "k", "v", "out", "gate", "up", "down"]
    some = rng.sample([*names, "head"], rng.randint(1, 3))
    return {
        "adapter": rng.choice(("lora", "dora")),
        "adapter_rank": rng.choice((1, 2, 4, 5)),
        "adapter_targets": rng.choice((ALL, ",".join(some), "qkv" if m.family == "gpt2" else "q,v")),
        "adapter_dropout": rng.choice((0.0, 0.1)),
        "modules_to_save": rng.choice(("", "", "embedding", "head", "embedding,head")),
    }


@pytest.mark.parametrize("turn", range(2))
def test_random_models_and_recipes(turn):
    rng, done = random.Random(SEED + turn), 0
    while done < DRAWS:
        m = random_model(rng)
        try:
            p = random_plan(rng, m, **random_adapter(rng, m))
            wrong = differences(m, p)
        except ConfigError:  # master weights, the chunked loss with an adapter on the head
            continue
        assert not wrong, f"{m} {p}: {wrong}"
        done += 1


def test_random_mixtures_whose_experts_are_adapted():
    """And their other parts: a saved copy of a normed head was a plain one, as no model of `random_model` has it."""
    rng, done = random.Random(SEED + DRAWS), 0
    while done < DRAWS // 2:
        try:
            m = random_parts.model(rng)
            if not any(layer.sparse for layer in m.layers):
                continue
            use = {
                "adapter_rank": rng.choice((1, 2, 3, 16)),
                "adapter_targets": rng.choice(("experts", f"{ALL},experts")),
            }
            p = random_plan(rng, m, adapter="lora", adapter_dropout=0.0, base_precision="none", **use)
            wrong = differences(m, p)
        except ConfigError:
            continue
        assert not wrong, f"{m} {p}: {wrong}"
        done += 1


def test_a_copy_of_a_normed_head_is_normed():
    m = LLAMA.replace(parts=replace(LLAMA.made_of, ends=Ends(tied=True, head_norm=True)))
    assert differences(m, Plan(adapter="lora", modules_to_save="head")) == []


@pytest.mark.parametrize("fields", [{"adapter": "dora"}, {"adapter": "lora", "adapter_dropout": 0.1}], ids=str)
def test_what_peft_does_not_know_of_experts_is_said(fields):
    with pytest.raises(ConfigError, match="peft knows neither DoRA nor dropout of them"):
        Plan(adapter_targets="all-linear,experts", **fields)


@pytest.mark.parametrize("m", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("checkpointing", choices(Plan)["checkpointing"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_adapters_under_every_precision_and_checkpointing(m, precision, checkpointing, dropout):
    p = Plan(
        batch_size=2, precision=precision, checkpointing=checkpointing, adapter="lora", adapter_rank=4,
        adapter_dropout=dropout, attention="sdpa",
    )  # fmt: skip
    assert differences(m, p) == []
