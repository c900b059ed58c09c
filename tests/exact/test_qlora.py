"""Adapters on quantised weights: every figure equal to what bitsandbytes' layers do, the results those of peft's."""

import copy
import os
import random

import pytest
import torch
from random_plans import random_model, random_plan
from test_lora import SEED, random_adapter

from estimator.accounting.accounts import account
from estimator.answers.estimates import estimate
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from trainer.model.adapters import ON_QUANTISED
from trainer.model.layers import Linear
from trainer.model.quantised import quantise
from trainer.referee.measure import build_step
from trainer.referee.validate import compare

pytestmark = pytest.mark.usefixtures("no_onednn")
pytest.importorskip("bitsandbytes", reason="whose layers are measured: a development dependency")

DRAWS = int(os.environ.get("RECIPE_DRAWS", "8"))
LLAMA = ModelConfig("llama", 3, 24, 4, 31, 13, 2, 6, 40)
QUANTISED = ["nf4", "nf4-double", "int8"]
PLAN = Plan(adapter="lora", adapter_rank=3, base_precision="nf4")


def even(m):
    """The widths that the kernel of the CPU has."""
    return m.d_model % 2 == 0 and m.f % 2 == 0 and (m.num_heads * m.e) % 2 == 0


def test_random_models_and_recipes():
    rng, done = random.Random(SEED + DRAWS), 0
    while done < DRAWS:
        m = random_model(rng)
        adapter = random_adapter(rng, m) | {"base_precision": rng.choice(QUANTISED)}
        in_backward = {"update": "in-backward", "grad_accumulation": 1, "max_grad_norm": None}
        try:
            p = random_plan(rng, m, **adapter, **(in_backward if rng.random() < 0.2 else {}))
            wrong = [row for row in compare(m, p) if row.difference] if even(m) else None
        except ConfigError:  # a precision that is not known on quantised weights
            continue
        assert not wrong, f"{m} {p}: {wrong}"
        done += wrong is not None


@pytest.mark.filterwarnings("ignore")  # of the libraries that peft imports
@pytest.mark.parametrize("base_precision", QUANTISED)
@pytest.mark.parametrize(("adapter", "dropout"), [("lora", 0.0), ("dora", 0.0), ("dora", 0.5)])
def test_outputs_and_gradients_are_pefts_to_the_bit(adapter, dropout, base_precision):
    library = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Linear(64, 48, bias=True).requires_grad_(requires_grad=False)
    ours = torch.nn.ModuleDict({"layer": ON_QUANTISED[adapter](copy.deepcopy(base), 3, 7, dropout)})
    quantise(ours, base_precision, torch.float32)
    use = {"lora_dropout": dropout, "use_dora": adapter == "dora"}
    config = library.LoraConfig(r=3, lora_alpha=7, target_modules=["layer"], **use)
    plain = torch.nn.ModuleDict({"layer": base})
    quantise(plain, base_precision, torch.float32)
    plain.is_loaded_in_4bit, plain.is_loaded_in_8bit = base_precision != "int8", base_precision == "int8"
    theirs = library.inject_adapter_in_model(config, plain)
    assert type(theirs["layer"]).__module__ == "peft.tuners.lora.bnb"
    if adapter == "dora":
        ours["layer"].take_norms()
        assert torch.equal(ours["layer"].magnitude, theirs["layer"].lora_magnitude_vector["default"].weight)
    torch.nn.init.normal_(theirs["layer"].lora_B["default"].weight)
    ours["layer"].a.weight.data = theirs["layer"].lora_A["default"].weight.detach().clone()
    ours["layer"].b.weight.data = theirs["layer"].lora_B["default"].weight.detach().clone()
    found = []
    for module in (ours, theirs):
        x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 64).requires_grad_()
        torch.manual_seed(1)
        y = module["layer"](x)
        y.square().mean().backward()
        grads = sorted((p.grad for p in module.parameters() if p.requires_grad), key=lambda grad: grad.shape)
        found.append([y, x.grad, *grads])
    assert len(found[0]) == len(found[1]) == {"lora": 4, "dora": 5}[adapter]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_model_of_the_paper_takes_a_quarter_of_its_bytes():
    m = preset("llama-2-7b")
    plans = [PLAN.replace(precision="bf16", base_precision=name) for name in ("none", "nf4", "nf4-double")]
    whole, single, double = (account(m, p).evaluate(m, p).parameter_bytes for p in plans)
    # QLoRA, section 3: double quantisation takes 0.5 to 0.127 bits a parameter, of the linear layers.
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert (single - double) * 8 / linear == pytest.approx(0.5 - 0.127, abs=0.002)
    assert 0.25 < double / whole < single / whole < 0.33  # embedding and head stay in bf16
    assert estimate(m, PLAN.replace(precision="bf16", seq_len=512), "a100-80gb-sxm").fits


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapter": "none"}, "quantised weights cannot be trained"),
        ({"precision": "fp16-mixed"}, "allowed with precision fp32, tf32, bf16, bf16-mixed"),
        ({"data_parallel": 2, "sharding": "zero3", "base_precision": "int8"}, "fully_shard shares out no integers"),
        ({"base_precision": "nf5"}, "base_precision = 'nf5': did you mean nf4"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(fields, said):
    with pytest.raises(ConfigError, match=said):
        PLAN.replace(**fields)


def test_odd_widths_are_refused_on_the_cpu():
    layer = Linear(6, 13, bias=False).requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="78 codes of 4 bits are no whole number of torch"):
        quantise(torch.nn.ModuleDict({"layer": layer}), "nf4", torch.float32, torch.float32)
    with pytest.raises(ConfigError, match="a layer reads 27 numbers"):
        build_step(LLAMA.replace(d_ff=27), PLAN)
