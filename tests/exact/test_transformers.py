"""`implementation="transformers"` against recordings of transformers' own classes: the same peak, saved bytes, ..."""

import json
import math
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from recorder_symbolic import runs

import estimator as est
import trainer
from estimator.describe.checks import ConfigError
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import evaluate
from trainer.referee.first_difference import symbolic_events
from trainer.referee.recorder.builds import of_config
from trainer.referee.recorder.remedies import checkpointed

transformers.logging.set_verbosity_error()
B, T = 2, 40
TINY = Path(__file__).parents[1] / "data" / "hf" / "tiny.jsonl"
FUSED, EAGER = {"attention": "sdpa"}, {"attention": "naive"}
# (recipe, whose rules); a case has one of them by turns, with TRANSFORMERS_ALL=1 all.
RECIPES = [
    ({"precision": "fp32"}, "cpu"),
    ({"precision": "bf16", "checkpointing": "block"}, "cuda"),
    ({"precision": "bf16-mixed"}, "cpu"),
    ({"precision": "fp32", **EAGER}, "cpu"),
    ({"precision": "bf16-mixed"}, "cuda"),
    ({"precision": "fp32", "checkpointing": "block"}, "cpu"),
    ({"precision": "bf16"}, "cuda"),
    ({"precision": "bf16", "optimizer": "adafactor", "grad_accumulation": 2}, "cpu"),
    ({"precision": "fp32", "max_grad_norm": 1.0, "optimizer_impl": "foreach"}, "cuda"),
]


def suited(m, recipe):
    """The recipe, or what of it the class has: attention of the other kind, no checkpoints; None if none of that."""
    for changes in ({}, EAGER, FUSED, EAGER | {"checkpointing": "none"}):
        found = FUSED | recipe | changes
        try:
            est.Plan(implementation="transformers", **found).attention_kernel("cpu", m)
        except ConfigError:
            continue
        return found
    return None


def known():
    """Tiny configurations of the classes that are known, without dropout, which each class has of its own."""
    found = {}
    for line in TINY.read_text(encoding="utf-8").splitlines():
        case = json.loads(line)
        config = case["config"]
        if suited(est.from_hf(config), {}) is not None:
            whole = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
            drops = {k: 0.0 for k, v in whole.items() if "drop" in k and isinstance(v, float)}
            found[case["name"].removeprefix("tiny ")] = config | drops
    return found


CASES = known()


def drawn():
    """(case, recipe, whose rules)."""
    every = bool(os.environ.get("TRANSFORMERS_ALL"))
    for i, name in enumerate(CASES):
        for recipe, device in RECIPES if every else [RECIPES[i % len(RECIPES)]]:
            said = ", ".join(str(value) for value in recipe.values())
            yield pytest.param(name, recipe, device, id=f"{name}, {said}, {device}")


def recorded(tmp_path, config, plan, device):
    """A recording of transformers' class, its labels apart from its ids as a data collator has them."""
    eager = {"_attn_implementation": "eager"} if plan.attention.startswith("naive") else {}
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config | eager), encoding="utf-8")
    given = of_config(file, B, T)

    def build():
        module, loss, (batch,) = given()
        return module, loss, ({name: x.clone() for name, x in batch.items()},)

    return trainer.record(checkpointed(build) if plan.checkpointing == "block" else build, plan, device)


def figures(recording, m, p):
    """(recorded, symbolic) of each figure."""
    values = est.account(m, p, device=recording.account.device).evaluate(m, p)
    return {
        "peak": (recording.peak_bytes, values.peak_bytes),
        "parameters": (recording.parameters, values.parameters),
        "states": (recording.bytes_before(Category.OPTIMIZER), values.optimizer_bytes),
        "saved": (recording.saved_bytes, values.activation_bytes),
        "FLOPs": (products(recording), (values.forward_flops + values.backward_flops) * p.grad_accumulation),
    }


def products(recording):
    """FLOPs of the matrix products before the update, recomputation included."""
    before = (kernel for kernel in recording.ledger.kernels if kernel.where.phase is not Phase.OPTIMIZER)
    gemms = (kernel.gemm for kernel in before if kernel.gemm is not None)
    return 2 * sum(math.prod(evaluate(size, {}) for size in (x.b, x.m, x.n, x.k)) for x in gemms)


@pytest.mark.parametrize(("name", "recipe", "device"), list(drawn()))
def test_classes_are_as_they_are_recorded(tmp_path, name, recipe, device):
    m = est.from_hf(CASES[name])
    p = est.Plan(batch_size=B, seq_len=T, implementation="transformers", **suited(m, recipe))
    for figure, (seen, said) in figures(recorded(tmp_path, CASES[name], p, device), m, p).items():
        assert seen == said, (figure, seen, said)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "deepseek_v3"])
def test_every_event_is_the_recorded_one(tmp_path, name):
    m, recipe = est.from_hf(CASES[name]), FUSED | {"precision": "fp32", "checkpointing": "block"}
    p = est.Plan(batch_size=B, seq_len=T, implementation="transformers", **recipe)
    recording = recorded(tmp_path, CASES[name], p, "cpu")
    setup = sum(e.where.phase is Phase.SETUP for e in recording.ledger.events)
    assert runs(recording.account.delta[setup:].tolist()) == runs(e.nbytes for e in symbolic_events(m, p))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_of_peft_are_added_as_recorded(tmp_path, precision):
    config, dtype = CASES["llama"], {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")

    def build():
        module, loss, (batch,) = of_config(file, B, T)()
        wanted = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
        return peft.get_peft_model(module.to(dtype), wanted).train(), loss, ({k: x.clone() for k, x in batch.items()},)

    m = est.from_hf(config)
    p = est.Plan(
        batch_size=B,
        seq_len=T,
        precision=precision,
        implementation="transformers",
        attention="sdpa",
        adapter="lora",
        adapter_rank=4,
        adapter_alpha=8,
        adapter_targets="q,v",
        adapter_dropout=0.0,
    )
    recording = trainer.record(build, est.Plan(precision="fp32"), "cpu")  # peft chose the dtypes
    for figure, (seen, said) in figures(recording, m, p).items():
        assert seen == said, (figure, seen, said)


def test_nearly_every_class_is_known():
    assert len(CASES) >= 97


def test_a_class_that_is_not_known_is_refused():
    m = est.ModelConfig(
        family="my own", num_layers=2, d_model=64, num_heads=4, d_ff=96, vocab_size=200, context_length=64, parts={}
    )
    with pytest.raises(ConfigError, match=r"implementation = 'transformers': how its class for family = 'my own' is"):
        est.account(m, est.Plan(implementation="transformers"))


@pytest.mark.parametrize(
    ("preset", "recipe", "said"),
    [
        (
            "mixtral-8x7b",
            {"adapter": "lora", "adapter_targets": "q,experts"},
            "adapters on stacked experts are not known",
        ),
        ("llama-3-8b", {"data_parallel": 2, "sharding": "none", "tensor_parallel": 2}, "tensor_parallel"),
        ("llama-3-8b", {"logits_to_keep": 8}, "logits_to_keep"),
    ],
)
def test_what_is_not_known_of_a_class_is_refused_by_name(preset, recipe, said):
    with pytest.raises(ConfigError, match=said):
        est.account(est.preset(preset), est.Plan(implementation="transformers", seq_len=64, **recipe))
