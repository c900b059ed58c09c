"""Several accelerators: what real processes hold, to the byte, and what must hold for any number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
import trainer
from estimator.accounts import account, sizes_for
from estimator.config import SHARDINGS, ConfigError, ModelConfig, Plan
from estimator.memory import rounded_peak, timeline

quick = settings(derandomize=True, deadline=None, max_examples=12)

GPT2 = ModelConfig("gpt2", 4, 24, 3, 31, 16)  # a vocabulary that nothing divides
LLAMA = ModelConfig("llama", 3, 20, 4, 33, 14, 2, 6, 27)
TIED = ModelConfig("llama", 2, 16, 4, 32, 14, 2, 4, 32, tie_embeddings=True)
ONE_BLOCK = GPT2.replace(num_layers=1)
REAL = [
    (GPT2, {"sharding": "none", "attention": "sdpa"}),
    (LLAMA, {"sharding": "none", "grad_accumulation": 2, "max_grad_norm": 1.0, "optimizer": "lion"}),
    (GPT2, {"sharding": "zero1"}),
    (LLAMA, {"sharding": "zero1", "optimizer_impl": "foreach", "grad_accumulation": 3, "max_grad_norm": 1.0}),
    (TIED, {"sharding": "zero2", "optimizer": "sgd-momentum"}),
    (LLAMA, {"sharding": "zero2", "checkpointing": "block", "optimizer_impl": "foreach"}),
    (GPT2, {"sharding": "zero3", "optimizer": "sgd", "attention": "sdpa"}),
    (LLAMA, {"sharding": "zero3", "grad_accumulation": 2, "optimizer": "lion", "max_grad_norm": 1.0}),
    (TIED, {"sharding": "zero3", "checkpointing": "block", "optimizer_impl": "fused"}),
    (GPT2, {"sharding": "zero3", "checkpointing": "attention", "loss": "torch"}),
    (ONE_BLOCK, {"sharding": "zero3", "optimizer": "sgd"}),
]


def measured(processes, cases, folder):
    source, target = folder / f"cases{processes}.json", folder / f"found{processes}.json"
    source.write_text(json.dumps([(m.to_dict(), p.to_dict()) for m, p in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = Path(__file__).with_name("sharding_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    done = subprocess.run(
        [*command, str(worker), str(source), str(target)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(target.read_text())


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_holds_what_the_account_says_to_the_byte(processes, tmp_path):
    cases = [(m, Plan(batch_size=2, data_parallel=processes, **plan)) for m, plan in REAL]
    if processes == 3:  # where little divides
        cases = cases[::3]
    for (m, p), real in zip(cases, measured(processes, cases, tmp_path), strict=True):
        v = account(m, p, "cpu").evaluate(m, p, threads=1)
        assert {name: getattr(v, name) for name in real} == real, (m, p)
