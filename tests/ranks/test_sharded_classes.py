"""`implementation="transformers"` under `fully_shard`: each figure that of a recorded rank of transformers' class."""

import json
import subprocess
import sys
from pathlib import Path

import estimator as est

B, T = 2, 40
LLAMA = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
CONFIGS = {"llama": LLAMA, "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True}}


def test_a_rank_holds_what_its_recording_does():
    worker = Path(__file__).with_name("sharded_classes_worker.py")
    ran = subprocess.run(
        [sys.executable, str(worker), json.dumps(CONFIGS), str(B), str(T)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name, recipes in json.loads(ran.stdout.splitlines()[-1]).items():
        m = est.from_hf(CONFIGS[name])
        for recipe, recorded in recipes.items():
            precision, checkpointing = recipe.split(", ")
            p = est.Plan(
                batch_size=B,
                seq_len=T,
                precision=precision,
                attention="sdpa",
                checkpointing=checkpointing,
                data_parallel=2,
                sharding="zero3",
                implementation="transformers",
            )
            values = est.account(m, p, device="cpu").evaluate(m, p)
            assert [values.peak_bytes, values.parameters, values.optimizer_bytes] == recorded, (name, recipe)
