"""Runs whose every step is taken under another layout of four processes, from the checkpoint of the step before.

Not in the suite: LAYOUT_CHAINS=4 runs so many, a minute each; LAYOUT_SEED draws others.
"""

import json
import os
from pathlib import Path
from random import Random

import pytest
from test_distributed import losses, torchrun

from trainer.files.prepare import PrepareConfig, prepare
from trainer.run.commands import main

CHAINS = int(os.environ.get("LAYOUT_CHAINS", "0"))
SEED = int(os.environ.get("LAYOUT_SEED", "0"))
CONFIG = """
steps = 8
save_every = 100
eval_every = 2
eval_batches = 4
device = "cpu"
[model]
context_length = 16
vocab_size = 260
like = "{like}"
[plan]
batch_size = 2
grad_accumulation = 12
loss = "torch"
optimizer = "{optimizer}"
optimizer_impl = "{implementation}"
checkpointing = "{checkpointing}"
max_grad_norm = 0.5
[optim]
lr = 1e-2
warmup_steps = 1
"""
SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
MODELS = {
    "llama": {},
    "phi3": {"sliding_window": None},
    "qwen3": {"head_dim": 6},
    "gpt_neox": {"rotary_pct": 0.5},
    "glm4": {"head_dim": 4},
    "starcoder2": {},
}
OPTIMIZERS = [("adamw", "loop"), ("adamw", "fused"), ("adamw", "bundled"), ("sgd-momentum", "foreach")]
TENSOR, PIPELINE = "--plan.tensor-parallel", "--plan.pipeline-parallel"
SEQUENCE, VOCABULARY = "--plan.sequence-parallel", "--plan.vocabulary-parallel"
GPIPE, INTERLEAVED = ("--plan.pipeline-schedule", "gpipe"), ("--plan.virtual-stages", "2")
ZERO2, ZERO3 = ("--sharding", "zero2"), ("--sharding", "zero3")
LAYOUTS = [
    (),
    ZERO3,
    ("--sharding", "zero1"),
    ("--plan.context-parallel", "2"),
    (TENSOR, "4"),
    (TENSOR, "4", SEQUENCE),
    (TENSOR, "4", VOCABULARY),
    (TENSOR, "2", *ZERO2),
    (TENSOR, "2", SEQUENCE, *ZERO3),
    (TENSOR, "2", SEQUENCE, VOCABULARY, *ZERO3),
    (PIPELINE, "4"),
    (PIPELINE, "4", *GPIPE),
    (PIPELINE, "4", *INTERLEAVED),
    (PIPELINE, "2"),
    (PIPELINE, "2", *ZERO2),
    (PIPELINE, "2", *GPIPE, *ZERO2),
    (PIPELINE, "2", TENSOR, "2"),
    (PIPELINE, "2", *INTERLEAVED, TENSOR, "2"),
    (PIPELINE, "2", *GPIPE, TENSOR, "2", SEQUENCE),
]


@pytest.mark.skipif(not CHAINS, reason="a minute each: LAYOUT_CHAINS=1 runs one")
@pytest.mark.parametrize("number", range(max(CHAINS, 1)))
def test_a_run_through_many_layouts_has_the_losses_of_one_process(number, tmp_path, monkeypatch):
    random = Random(f"{SEED} {number}")
    family = random.choice(sorted(MODELS))
    optimizer, implementation = random.choice(OPTIMIZERS)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SIZES | MODELS[family] | {"model_type": family}))
    prepare(PrepareConfig((Path(os.__file__).parent / "argparse.py",), tmp_path / "data", bytes=True))
    recomputed = random.choice(["none", "block", "selective"])
    filled = {"like": config, "optimizer": optimizer, "implementation": implementation, "checkpointing": recomputed}
    (tmp_path / "c.toml").write_text(CONFIG.format(**filled))
    given = ["train", "--config", str(tmp_path / "c.toml"), "--data", str(tmp_path / "data")]
    monkeypatch.setattr("trainer.run.train.matmul_peak", lambda *_: 1e9)
    assert main([*given, "--out", str(tmp_path / "one")]) == 0
    jobs, chain = [], [random.choice(LAYOUTS) for _ in range(8)]
    for step, layout in enumerate(chain, 1):
        more = ["--out", str(tmp_path / "many"), *layout, *(["--resume"] if step > 1 else [])]
        stop = {"stop_at": step, "status": 143} if step < len(chain) else {"stop_at": None, "status": 0}
        jobs.append({"arguments": [*given, *more], **stop})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    torchrun(str(Path(__file__).with_name("distributed_worker.py")), str(tmp_path / "jobs.json"), processes=4)
    ours, one = losses(tmp_path / "many"), losses(tmp_path / "one")
    assert [step for step, _ in ours] == [step for step, _ in one], (family, chain)
    assert [x for _, x in ours] == pytest.approx([x for _, x in one], rel=4e-6), (family, optimizer, chain)
    assert one[-1][1] < one[0][1]
