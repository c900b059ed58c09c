"""Hold from_hf against transformers on random configurations: `python tools/compare_families.py SEED COUNT`.

Each tiny configuration of tests/data/hf/tiny.jsonl is changed COUNT times: flags of its class are thrown, sizes are
drawn again, fields left out. The parameters that from_hf's parts have must be those of the model that transformers
builds (on the meta device). A refusal of ours is listed, a wrong number ends with exit status 1.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import logging as transformers_logging

from estimator.describe.checks import ConfigError
from estimator.describe.fields import class_defaults
from estimator.describe.hf import from_hf

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "unit"))
from shapes_of_parts import parameters  # noqa: E402 - a module of the tests

DRAWN = {
    "decoder_sparse_step": (1, 2),
    "ffn_hidden_size": (None, 72),
    "first_k_dense_replace": (0, 1, 2),
    "head_dim": (8, 16, 32),
    "hidden_act": ("gelu", "relu", "silu"),
    "interleave_moe_layer_step": (1, 2),
    "intermediate_size": (40, 100),
    "max_position_embeddings": (64, 128),
    "max_window_layers": (0, 1, 3),
    "mlp_only_layers": ([], [0], [1, 2]),
    "moe_layers": (None, [0], [1]),
    "n_inner": (None, 72),
    "n_shared_experts": (1, 2),
    "no_rope_layer_interval": (2, 3),
    "num_hidden_layers": (2, 3, 5),
    "num_key_value_heads": (1, 2, 4),
    "num_kv_heads": (None, 1, 2, 4),
    "num_ln_in_parallel_attn": (None, 1, 2),
    "q_lora_rank": (None, 12),
    "shared_expert_intermediate_size": (24, 56),
    "vocab_size": (96, 170),
    "word_embed_proj_dim": (None, 32),
}
BY_LAYER = ("layer_types", "no_rope_layers", "moe_layers", "attention_types")


def changed(rng, family, config):
    """The configuration with up to three flags thrown and three sizes drawn."""
    entry, config = class_defaults()[family], dict(config)
    flags = [name for name, default in entry["defaults"].items() if isinstance(default, bool)]
    for flag in rng.sample(flags, min(len(flags), rng.randint(0, 3))):
        config[flag] = rng.random() < 0.5
    known = [name for name in DRAWN if name in entry["defaults"] or name in entry["also"] or name == "head_dim"]
    for name in rng.sample(known, min(len(known), rng.randint(0, 3))):
        own = entry["also"].get(name, name)
        for other in (name, own, *(spelling for spelling, meant in entry["also"].items() if meant == own)):
            config.pop(other, None)
        config[own] = rng.choice(DRAWN[name])
        if name == "num_hidden_layers":
            for listed in BY_LAYER:
                config.pop(listed, None)
            if family == "gpt_neo":
                config["attention_types"] = [[["global"], config[own]]]
    return config


def built(family, config):
    """The number of parameters in transformers; None where it refuses."""
    given = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**given))
    except Exception as error:  # noqa: BLE001 - whatever it refuses with
        return None, repr(error)
    return sum(p.numel() for p in model.parameters()), ""


def main():
    seed, count = (int(argument) for argument in sys.argv[1:])
    rng, seen, refusals = random.Random(seed), Counter(), Counter()  # noqa: S311 - no secret
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    for line in (ROOT / "tests" / "data" / "hf" / "tiny.jsonl").read_text().splitlines():
        row = json.loads(line)
        for _ in range(count):
            config = changed(rng, row["family"], row["config"])
            total, why = built(row["family"], config)
            try:
                ours = parameters(from_hf(config))
            except ConfigError as error:
                seen["refused by both" if total is None else "refused by us"] += 1
                refusals[f"{row['family']}: {str(error).split('(')[0]}"] += total is not None
                continue
            verdict = "refused by transformers" if total is None else "equal" if ours == total else "WRONG"
            seen[verdict] += 1
            if verdict != "equal":
                changes = {name: value for name, value in config.items() if row["config"].get(name, "") != value}
                print(verdict, row["family"], changes, why[:200] or f"{ours} is not {total}")
    print(dict(seen))
    for refusal, times in refusals.most_common():
        print(f"{times:4} {refusal}")
    sys.exit(1 if seen["WRONG"] else 0)


if __name__ == "__main__":
    main()
