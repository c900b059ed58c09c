"""Add to tests/data/hf/tiny.jsonl what transformers makes of a small configuration of each family that has none.

Run with transformers installed: `python tools/hf_tiny.py`. Nothing is downloaded: models are built of their
configuration, on the meta device for the shapes of their tensors and on the CPU for the FLOPs of a step.
"""

import json
from pathlib import Path

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

from estimator.describe.families import FAMILIES
from estimator.describe.fields import class_defaults

OUT = Path(__file__).parents[1] / "tests" / "data" / "hf" / "tiny.jsonl"
B, T = 2, 32
# Sizes by the names that most classes have; a class takes those that it knows.
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ffn_dim": 192,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "max_window_layers": 2,
    "rotary_dim": 8,
    "moe_intermediate_size": 48,
    "shared_intermediate_size": 40,
    "num_local_experts": 8,
    "num_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 2,
    "moe_num_experts": 8,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "shared_expert_intermediate_size": 40,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
# What a family needs beside, or in place of these.
BESIDE = {
    "aria_text": {"moe_topk": 2},
    "cohere2_moe": {
        "num_shared_experts": 2,
        "prefix_dense_intermediate_size": 72,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "expert_selection_fn": "sigmoid",
    },
    "cohere_compass_text": {
        "logit_scale": 0.25,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    "flint": {"mlp_only_layers": [1]},
    "granite_swa": {"layer_rope_theta": [0, 10000, 10000, 10000]},
    "granitemoe_swa": {"layer_rope_theta": [0, 10000, 10000, 10000]},
    "mellum": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]},
    "granitemoehybrid": {"layer_types": ["attention"] * 4, "position_embedding_type": "rope"},
    "minicpm3": {"num_key_value_heads": 4},
    "mistral4": {
        "n_group": 1,
        "first_k_dense_replace": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "partial_rotary_factor": 1 / 3,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8192,
        },
    },
    "seed_oss": {"attention_bias": True},
}
# Further ones of a family, whose switches make other parts of it.
VARIANTS = {
    "granitemoehybrid dense": {"num_local_experts": 0, "position_embedding_type": None},
}


def tiny(kind):
    entry = class_defaults()[kind]
    latent = "kv_lora_rank" in entry["defaults"]
    config = {"model_type": kind}
    for name, size in SIZES.items():
        own = entry["also"].get(name, name)
        known = own in entry["defaults"] and not (latent and name in ("head_dim", "num_key_value_heads"))
        if known:
            config[own] = size
        if latent and name == "num_key_value_heads" and name in entry["defaults"]:
            config[name] = SIZES["num_attention_heads"]
    return config | BESIDE.get(kind, {}) | {"pad_token_id": None}


def row(name):
    kind = name.split()[0]
    config = tiny(kind) | VARIANTS.get(name, {})
    given = CONFIG_MAPPING[kind](**{name: value for name, value in config.items() if name != "model_type"})
    of_class = getattr(transformers, f"{class_defaults()[kind]['class']}ForCausalLM", None)
    # A class that is published inside another's model is in no list of causal ones.
    make = AutoModelForCausalLM.from_config if kind in CAUSAL else of_class._from_config  # noqa: SLF001 - what it calls
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in make(given).named_parameters()}
    model = make(given, attn_implementation="eager", experts_implementation="eager").float()
    ids = torch.randint(2, 160, (B, T))
    with FlopCounterMode(display=False) as forward:
        logits = model(input_ids=ids, use_cache=False).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    return {
        "name": f"tiny {name}",
        "family": kind,
        "config": config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": shapes,
        "batch_size": B,
        "seq_len": T,
        "forward_flops": forward.get_total_flops(),
        "backward_flops": backward.get_total_flops(),
    }


def main():
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    torch.manual_seed(0)
    rows = [json.loads(line) for line in OUT.read_text().splitlines()]
    there = {one["family"] for one in rows} | {one["name"].removeprefix("tiny ") for one in rows}
    new = [row(name) for name in [*FAMILIES, *VARIANTS] if name.split()[0] in CONFIG_MAPPING and name not in there]
    OUT.write_text("".join(json.dumps(one) + "\n" for one in rows + new))
    for one in new:
        print(one["name"], f"{one['parameters']:,} parameters, {one['forward_flops']:,} FLOPs forward")


if __name__ == "__main__":
    main()
