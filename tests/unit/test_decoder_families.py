"""The bundled decoder against transformers: of every family the tensors, and the logits from the same weights.

The rows are those of tests/data/hf/tiny.jsonl, whose README says where they come from.
"""

import json
import os
import warnings
from collections import Counter
from math import prod
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from weights_from_transformers import copy_weights

from estimator.describe.hf import from_hf
from estimator.describe.plan import Plan
from trainer.model import norms
from trainer.model.decoder import build_model
from trainer.model.positions import ROPE_THETA

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [json.loads(line) for line in (Path(__file__).parents[1] / "data/hf/tiny.jsonl").read_text().splitlines()]
T = 40  # longer than the windows of 16, at most once as long as any context


def shapes(tensors):
    """How often each shape occurs, a matrix the same as its transpose."""
    return Counter(tuple(sorted(shape)) for shape in tensors)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_the_tensors_are_those_of_transformers(row):
    m = from_hf(row["config"])
    with torch.device("meta"):
        own = [tuple(p.shape) for p in build_model(m, Plan()).parameters()]
    assert sum(map(prod, own)) == row["parameters"]
    theirs = row["tensors"]
    if m.family == "dbrx":  # holds the gate and up of all experts apart, its down in the other order: the same numbers
        return
    if m.made_of.attention.qk_norm == "head-own" and m.family == "stablelm":  # has a module a head
        theirs = {name: shape for name, shape in theirs.items() if ".norms." not in name}
        own = [shape for shape in own if shape not in ((m.num_heads, m.e), (m.kv_heads, m.e))]
    if m.family == "ernie4_5_moe":  # the correction of its router has a first dimension of 1
        theirs = {name: shape[1:] if name.endswith("correction_bias") else shape for name, shape in theirs.items()}
    assert shapes(own) == shapes(theirs.values())


CORRECTIONS = ("e_score_correction_bias", "expert_bias")
OTHER_FLOPS = {
    "falcon": "its code takes the fused attention also where it is asked for the plain one, which is counted otherwise",
    "llama4_text": "its code puts every token through every expert, with a weight of 0 where it is not chosen",
}


@pytest.mark.parametrize("row", [row for row in ROWS if row["family"] not in OTHER_FLOPS], ids=lambda row: row["name"])
def test_the_flops_are_those_of_transformers(row):
    m = from_hf(row["config"])
    model = build_model(m, Plan())
    ids = torch.randint(2, m.vocab_size, (row["batch_size"], row["seq_len"]))
    with FlopCounterMode(display=False) as forward:
        logits = model(ids)
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    assert forward.get_total_flops() == row["forward_flops"]
    assert backward.get_total_flops() == row["backward_flops"]


def plainly(theirs):
    """Transformers' model with our constants: eps of the norms, and the base of rotary positions without scaling.

    They are numbers that no shape and no operator depends on.
    """
    for module in theirs.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, norms.NORM_EPS)
        if hasattr(module, "attention_scaling"):
            module.attention_scaling = 1.0
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                width = 2 * len(buffer)
                buffer.copy_(ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float32) / width))
            if name == "e_score_correction_bias":
                buffer.copy_(torch.randn_like(buffer) * 0.02)
    return theirs


def transformers_model(config):
    os.environ["HF_HUB_OFFLINE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers", reason="transformers is the judge here; pip install it")
        transformers.logging.set_verbosity_error()
        kind = config["model_type"]
        given = {name: value for name, value in config.items() if name != "model_type"}
        if kind == "phimoe":  # makes its frequencies anew in each forward
            given["rope_theta"] = ROPE_THETA
        config = transformers.AutoConfig.for_model(kind, **given)
        make = transformers.AutoModelForCausalLM.from_config
        if kind == "mistral4":  # whose class is in no list of causal models, since it is published inside another
            make = transformers.Mistral4ForCausalLM._from_config
        model = make(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            start = 0.5 if p.ndim == 1 and not name.endswith("bias") else 0
            p.copy_(torch.randn_like(p) * 0.08 + start)
    return plainly(model)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_the_logits_are_those_of_transformers(row):
    torch.manual_seed(1)
    theirs = transformers_model(row["config"])
    m = from_hf(row["config"])
    model = build_model(m, Plan(attention="naive")).eval()
    with torch.no_grad():  # zeros as they are made, which would show nothing
        for name, x in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if name.endswith(CORRECTIONS):
                x.normal_(std=0.1)
    copy_weights(model, dict(theirs.named_parameters()), m)
    corrections = [x for name, x in theirs.named_buffers() if name.endswith("e_score_correction_bias")]
    buffered = [r for r in model.routers() if "correction" in dict(r.named_buffers())]
    for router, correction in zip(buffered, corrections, strict=True):
        router.correction.copy_(correction)
    if m.family == "falcon" and m.made_of.positions.kind == "alibi":
        model.slopes.mul_(2 * m.e**-0.5)  # its eager code adds the bias twice, before scores are scaled
    if m.family == "xglm":  # its own sinusoids, from the third position on
        model.positions.table.copy_(theirs.model.embed_positions.weights[2:])
    ids = torch.randint(2, m.vocab_size, (2, T))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted, found = theirs(input_ids=ids, use_cache=False).logits, model(ids)
    assert (found - wanted).abs().max() < 2e-4 * wanted.abs().max()
