"""Adapters: the statements of peft's, its parameter counts on every family, files, and what cannot be."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from estimator.accounting.accounts import account
from estimator.describe.checks import ConfigError
from estimator.describe.hf import from_hf
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from trainer.files.adapters import load_adapters, load_base, save_adapters
from trainer.files.checkpoint import export_safetensors
from trainer.files.contents import CheckpointError
from trainer.model.adapters import KINDS, adapter_parameters
from trainer.model.decoder import build_model
from trainer.model.expert_adapters import ExpertsLoRA
from trainer.model.experts import Experts
from trainer.model.layers import Linear

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "data/hf/tiny.jsonl").read_text().splitlines()]
LLAMA = ModelConfig("llama", 3, 24, 4, 31, 13, 2, 6, 40, tie_embeddings=False)
GPT2 = ModelConfig("gpt2", 2, 24, 3, 31, 13)
PLAN = Plan(adapter="lora", adapter_rank=4)


def peft():
    return pytest.importorskip("peft", reason="whose adapters ours are held against: a development dependency")


def both(kind, dtype, dropout, bias):
    """(our adapter, peft's) with the same weights, beside a frozen layer of 6 -> 5."""
    library = peft()
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5, bias=bias, dtype=dtype)
    use = {"r": 3, "lora_alpha": 7, "lora_dropout": dropout, "use_dora": kind == "dora"}
    config = library.LoraConfig(target_modules=["layer"], **use)
    theirs = library.inject_adapter_in_model(config, torch.nn.ModuleDict({"layer": copy.deepcopy(base)}))["layer"]
    for x in (p for name, p in theirs.named_parameters() if "lora" in name):
        x.data = x.detach().float()  # as get_peft_model does, by autocast_adapter_dtype
    own = Linear(6, 5, bias=bias)
    own.load_state_dict(base.state_dict())
    ours = KINDS[kind](own.to(dtype).requires_grad_(requires_grad=False), 3, 7, dropout)
    if kind == "dora":
        assert torch.equal(ours.magnitude.to(dtype), theirs.lora_magnitude_vector["default"].weight.to(dtype))
        ours.magnitude.data = theirs.lora_magnitude_vector["default"].weight.detach().clone()
    torch.nn.init.normal_(theirs.lora_B["default"].weight)
    ours.a.weight.data = theirs.lora_A["default"].weight.detach().clone()
    ours.b.weight.data = theirs.lora_B["default"].weight.detach().clone()
    return ours, theirs


@pytest.mark.filterwarnings("ignore")  # of the libraries that peft imports
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_outputs_and_gradients_are_pefts_to_the_bit(kind, dtype, autocast, dropout, bias):
    found = []
    for module in both(kind, dtype, dropout, bias):
        x = torch.linspace(-1, 1, 2 * 3 * 6, dtype=dtype).view(2, 3, 6).requires_grad_()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        F.mse_loss(y.float(), torch.ones(2, 3, 5)).backward()
        trained = [p for p in module.parameters() if p.requires_grad]
        assert all(p.dtype == torch.float32 for p in trained)
        grads = sorted((p.grad for p in trained), key=lambda grad: grad.shape)
        found.append([y, x.grad, *grads])
    assert len(found[0]) == len(found[1]) == {"lora": 4, "dora": 5}[kind]
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


ROUTERS = ("gate", "router", "wg", "layer")  # as transformers calls them; some are linear layers


def adapted_by_peft(row, targets, **more):
    library = peft()
    import transformers

    config = dict(row["config"])
    kind = config.pop("model_type")
    make = transformers.AutoModelForCausalLM.from_config
    if kind == "mistral4":  # whose class is in no list of causal models, since it is published inside another
        make = transformers.Mistral4ForCausalLM._from_config
    model = make(transformers.AutoConfig.for_model(kind, **config))
    return library.get_peft_model(model, library.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", **more))


def count_of_peft(row, targets, **more):
    return adapted_by_peft(row, targets, **more).get_nb_trainable_parameters()[0]


def count_without_routers(row, monkeypatch, **more):
    """Of a mixture of experts: what peft puts beside its linear layers but the routers.

    For families whose experts transformers 5 has stacked, peft 0.21 takes the names gate, up and down, of a shared
    expert and of dense layers too, for those of the stacked matrices (`_convert_peft_config_moe`). That is off here.
    """
    peft()
    from peft.utils import transformers_weight_conversion

    monkeypatch.setattr(transformers_weight_conversion, "_MODEL_TO_CONVERSION_PATTERN", {})
    found = 0
    for name, p in adapted_by_peft(row, "all-linear", **more).named_parameters():
        owner = name.partition(".lora_")[0].rpartition(".")[2]
        found += p.numel() if p.requires_grad and owner not in ROUTERS else 0
    return found


def stacked(row):
    """The names by which peft's `target_parameters` finds a mixture's matrices, where transformers has stacked them."""
    ends = {name.split(".layers.")[-1].partition(".")[2] for name in row["tensors"]}
    return sorted(name for name in ends if name.endswith(("experts.gate_up_proj", "experts.down_proj")))


def own_count(row, targets, **more):
    with torch.device("meta"):
        model = build_model(from_hf(row["config"]), PLAN.replace(adapter_targets=targets, **more))
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_the_parameters_are_as_many_as_pefts(row, monkeypatch):
    m = from_hf(row["config"])
    if any(layer.sparse for layer in m.layers) or m.made_of.attention.experts:
        assert own_count(row, "all-linear") == count_without_routers(row, monkeypatch)
    else:
        assert own_count(row, "all-linear") == count_of_peft(row, "all-linear")
    alone = sorted({name.split(".")[-2] for name in row["tensors"]} & {"q_proj", "v_proj", "Wq", "Wv"})
    if alone:  # latent attention without a compressed query has a q_proj alone
        assert own_count(row, "q,v") == count_of_peft(row, alone)
    else:  # one matrix for queries, keys and values, or latent attention's pairs
        with pytest.raises(ConfigError, match="adapter_targets = 'q,v': the model's linear layers are "):
            own_count(row, "q,v")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_what_is_trained_whole_beside_them_is_as_many_as_pefts(name, saved):
    row = next(row for row in ROWS if row["config"]["model_type"] == name)
    theirs = count_of_peft(row, ["q_proj"], modules_to_save=[saved])
    assert own_count(row, "q", modules_to_save=saved) == theirs


def test_what_is_trained_whole_starts_as_the_original_and_is_saved_with_the_adapters(tmp_path):
    torch.manual_seed(0)
    p = PLAN.replace(modules_to_save="embedding,head")
    plain, first, second = build_model(LLAMA, Plan()), build_model(LLAMA, p), build_model(LLAMA, p)
    export_safetensors(plain, tmp_path / "model.safetensors")
    for model in (first, second):
        load_base(model, tmp_path / "model.safetensors")
    ids = torch.randint(31, (2, 13))
    assert torch.equal(first(ids), plain(ids))
    torch.nn.init.normal_(first.head.weight)
    save_adapters(first, tmp_path / "adapters.safetensors")
    load_adapters(second, tmp_path / "adapters.safetensors")
    assert torch.equal(first(ids), second(ids))
    assert not torch.equal(first(ids), plain(ids))


@pytest.mark.parametrize("m", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_the_estimate_knows_how_many_are_trained(m):
    values = account(m, PLAN, "cpu").evaluate(m, PLAN)
    model = build_model(m, PLAN)
    assert values.trained_parameters == sum(p.numel() for p in adapter_parameters(model).values())
    assert values.parameters == sum(p.numel() for p in model.parameters())
    assert values.gradient_bytes == 4 * values.trained_parameters


def test_an_adapter_changes_nothing_before_it_has_been_trained():
    torch.manual_seed(0)
    plain = build_model(LLAMA, Plan())
    adapted = build_model(LLAMA, PLAN)
    own = {name.replace(".base.", "."): p for name, p in adapted.named_parameters()}
    for name, p in plain.named_parameters():
        own[name].data = p.data
    ids = torch.randint(31, (2, 13))
    assert torch.equal(plain(ids), adapted(ids))


def test_adapters_and_the_weights_under_them_are_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    plain, first, second = build_model(LLAMA, Plan()), build_model(LLAMA, PLAN), build_model(LLAMA, PLAN)
    for p in adapter_parameters(first).values():
        torch.nn.init.normal_(p)
    export_safetensors(plain, tmp_path / "model.safetensors")
    save_adapters(first, tmp_path / "adapters.safetensors")
    ids = torch.randint(31, (2, 13))
    assert not torch.equal(first(ids), second(ids))
    for model in (first, second):
        load_base(model, tmp_path / "model.safetensors")
    load_adapters(second, tmp_path / "adapters.safetensors")
    assert torch.equal(first(ids), second(ids))
    assert (tmp_path / "adapters.safetensors").stat().st_size < (tmp_path / "model.safetensors").stat().st_size
    with pytest.raises(CheckpointError, match="of another model"):
        load_adapters(build_model(LLAMA, PLAN.replace(adapter_rank=5)), tmp_path / "adapters.safetensors")
    with pytest.raises(CheckpointError, match="is missing"):
        load_base(build_model(LLAMA.replace(num_layers=4), PLAN), tmp_path / "model.safetensors")
    (tmp_path / "adapters.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_adapters(second, tmp_path / "adapters.safetensors")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"adapter": "lorra"}, "adapter = 'lorra': did you mean lora"),
        ({"adapter_targets": "qq"}, "adapter_targets = 'qq'"),
        ({"adapter_targets": ""}, "adapter_targets = '': must be all-linear, or some of q"),
        ({"adapter_targets": "qkv"}, "adapter_targets = 'qkv': the model's linear layers are q, k, v, out, gate"),
        ({"adapter_rank": 0}, "adapter_rank = 0"),
        ({"modules_to_save": "norm"}, "modules_to_save = 'norm'"),
        ({"modules_to_save": "head", "adapter_targets": "q,head"}, "adapter_targets puts an adapter beside it"),
        ({"modules_to_save": "head", "adapter": "none"}, "it is trained beside adapters, and adapter is 'none'"),
        ({"adapter_dropout": 1.0}, "adapter_dropout = 1.0"),
        ({"adapter_alpha": 0}, "adapter_alpha = 0"),
        ({"trained": "norms"}, "it freezes the model"),
        ({"precision": "bf16-master"}, "adapters are fp32 by themselves"),
    ],
    ids=str,
)
def test_what_cannot_be_is_said(fields, said):
    with pytest.raises(ConfigError, match=said):
        build_model(LLAMA, PLAN.replace(**fields))


@pytest.mark.parametrize("fields", [{"adapter_targets": "qkv"}])
def test_the_account_says_the_same(fields):
    p = PLAN.replace(**fields)
    with pytest.raises(ConfigError, match="adapter_targets = 'qkv': the model's linear layers are "):
        account(LLAMA, p, "cpu")


def test_names_of_transformers_are_understood():
    assert PLAN.replace(adapter_targets=["q_proj", "o_proj"]).adapter_targets == "q,out"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_of_adapted_experts_are_pefts_to_the_bit(dtype, autocast):
    library = peft()
    torch.manual_seed(0)
    base = Experts(from_hf(next(row for row in ROWS if row["config"]["model_type"] == "mixtral")["config"])).to(dtype)
    base.requires_grad_(requires_grad=False)
    ours, module = ExpertsLoRA(copy.deepcopy(base), 3, 7), torch.nn.ModuleDict({"experts": base})
    config = library.LoraConfig(
        r=3, lora_alpha=7, target_modules=[], target_parameters=["experts.gate_up", "experts.down"]
    )
    theirs = library.inject_adapter_in_model(config, module)["experts"]
    wrappers = {x.parameter_name: x for x in (theirs, theirs.base_layer)}
    for name, wrapper in wrappers.items():
        for x in (wrapper.lora_A["default"], wrapper.lora_B["default"]):
            x.float()
        torch.nn.init.normal_(wrapper.lora_B["default"].weight, std=0.1)
        ours.a[name].weight.data = wrapper.lora_A["default"].weight.detach().clone()
        ours.b[name].weight.data = wrapper.lora_B["default"].weight.detach().clone()
    E, d = base.gate_up.shape[0], base.gate_up.shape[2]
    found = []
    for layer in (ours, theirs):
        x = torch.linspace(-1, 1, 3 * E * d, dtype=dtype).view(3 * E, d).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x, torch.full((E,), 3), None)
        y.float().square().mean().backward()
        weights = [x for side in ("a", "b") for x in (getattr(ours, side)["gate_up"], getattr(ours, side)["down"])]
        if layer is theirs:
            weights = [
                getattr(wrappers[name], side)["default"]
                for side in ("lora_A", "lora_B")
                for name in ("gate_up", "down")
            ]
        found.append([y, x.grad, *(w.weight.grad for w in weights)])
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in ROWS if stacked(row)], ids=lambda row: row["name"])
def test_the_parameters_of_adapted_experts_are_as_many_as_pefts(row, monkeypatch):
    names = stacked(row)
    theirs = count_without_routers(row, monkeypatch, target_parameters=names)
    assert own_count(row, "all-linear,experts") == theirs


def test_adapters_on_experts_alone_are_refused_where_layers_have_none():
    with pytest.raises(ConfigError, match="the model has layers without experts"):
        account(preset("deepseek-v3"), Plan(adapter="lora", adapter_targets="experts", seq_len=64))
