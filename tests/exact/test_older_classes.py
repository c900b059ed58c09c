"""transformers' older classes, with dropout: each allocation and each free is the recorded one; and LoRA."""

import json

import peft
import pytest
import torch
import transformers
from recorder_symbolic import runs
from test_transformers import TINY, B, T, figures, suited

import estimator as est
import trainer
from estimator.describe.checks import ConfigError
from estimator.describe.transformers import OLDER
from estimator.eager.ledger import Phase
from trainer.referee.first_difference import symbolic_events
from trainer.referee.recorder.builds import of_config
from trainer.referee.recorder.remedies import checkpointed

OFF = ("activation", "classifier", "layerdrop", "summary")  # dropout beside that which a plan's is
RECIPES = [
    {"precision": "fp32"},
    {"precision": "bf16-mixed"},
    {"precision": "bf16", "checkpointing": "block"},
    {"precision": "fp32", "attention": "naive"},
]


def configs():
    """(name, config) of each older class, and what its tiny configuration has not."""
    found = {}
    for line in TINY.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        if case["config"]["model_type"] in OLDER:
            found[case["name"].removeprefix("tiny ")] = case["config"]
    found["falcon, rotary, one head of keys"] = found["falcon"] | {
        "alibi": False, "multi_query": True, "parallel_attn": True, "bias": False
    }  # fmt: skip
    found["bloom, heads no power of two"] = found["bloom"] | {"n_head": 6, "hidden_size": 96}
    found["codegen, several heads a part"] = found["codegen"] | {"n_head": 8}
    found["gpt_bigcode, one head of keys"] = found["gpt_bigcode"] | {"multi_query": True}
    return found


CONFIGS = configs()


def with_dropout(config, rate):
    whole = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    names = [k for k, v in whole.items() if "drop" in k and isinstance(v, float)]
    return config | {k: 0.0 if k.startswith(OFF) else rate for k in names}


def building(tmp_path, config):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    given = of_config(file, B, T)

    def build():
        module, loss, (batch,) = given()
        return module, loss, ({name: x.clone() for name, x in batch.items()},)

    return build


def compare(recording, m, p):
    for figure, (seen, said) in figures(recording, m, p).items():
        assert seen == said, (figure, seen, said)
    setup = sum(e.where.phase is Phase.SETUP for e in recording.ledger.events)
    assert runs(recording.account.delta[setup:].tolist()) == runs(e.nbytes for e in symbolic_events(m, p))


@pytest.mark.parametrize(("turn", "name"), list(enumerate(CONFIGS)), ids=list(CONFIGS))
def test_every_event_is_the_recorded_one(tmp_path, turn, name):
    rate = 0.0 if CONFIGS[name]["model_type"] == "mpt" else 0.1  # a whole number in its class
    config = with_dropout(CONFIGS[name], rate)
    m = est.from_hf(config)
    recipe = suited(m, RECIPES[turn % len(RECIPES)])
    p = est.Plan(batch_size=B, seq_len=T, implementation="transformers", dropout=rate, **recipe)
    eager = {"_attn_implementation": "eager"} if p.attention.startswith("naive") else {}
    build = building(tmp_path, config | eager)
    compare(trainer.record(checkpointed(build) if p.checkpointing == "block" else build, p, "cpu"), m, p)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("gpt2", ("c_attn", "c_fc"), "qkv,up"),
        ("falcon", ("query_key_value",), "qkv"),
        ("opt", ("fc1", "q_proj"), "q,up"),
    ],
)
def test_lora_of_peft_is_beside_their_layers(tmp_path, name, theirs, ours):
    config = with_dropout(CONFIGS[name], 0.0)
    m, given = est.from_hf(config), building(tmp_path, config)

    def build():
        module, loss, inputs = given()
        wanted = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(theirs), fan_in_fan_out=name == "gpt2")
        return peft.get_peft_model(module.to(torch.bfloat16), wanted).train(), loss, inputs

    p = est.Plan(
        batch_size=B, seq_len=T, precision="bf16", implementation="transformers", attention="sdpa", adapter="lora",
        adapter_rank=4, adapter_alpha=8, adapter_targets=ours, adapter_dropout=0.0,
    )  # fmt: skip
    compare(trainer.record(build, est.Plan(precision="fp32"), "cpu"), m, p)  # peft chose the dtypes


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bloom", {"attention": "sdpa"}, "has eager attention alone"),
        ("ctrl", {"checkpointing": "block"}, "has no checkpoints"),
        ("gpt2", {"adapter": "dora"}, "are Conv1D"),
    ],
)
def test_what_a_class_has_not_is_refused(name, changes, said):
    plan = est.Plan(implementation="transformers", **{"attention": "naive", **changes})
    with pytest.raises(ConfigError, match=said):
        est.account(est.from_hf(CONFIGS[name]), plan)
