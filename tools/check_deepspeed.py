"""Hold implementation="deepspeed" against DeepSpeed itself, on two processes of this machine's CPU.

    pip install deepspeed==0.19.8    (with DS_BUILD_OPS=0: it needs no compiler)
    python tools/check_deepspeed.py ["llama zero3" ...]

For each case a line: the peak of a steady step as predicted, as measured, and the difference. The optimizer is
torch.optim.AdamW(fused=True), as FusedAdam wants a compiler; like it, it updates with no tensors of its own.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections import Counter
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from estimator.accounting.accounts import account
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.referee.measure import build_parts, loss_of

if TYPE_CHECKING:
    from collections.abc import Callable

RANKS = 2
TRIES = 8  # steps
GPT = {"family": "gpt2", "num_layers": 4, "d_model": 256, "num_heads": 4, "vocab_size": 2000, "context_length": 128}
LLAMA = {"family": "llama", "num_layers": 6, "d_model": 192, "num_heads": 6, "d_ff": 512, "vocab_size": 999}
LLAMA |= {"num_kv_heads": 2, "context_length": 64, "tie_embeddings": False}
CASES = [
    (name, model, sharding, recipe)
    for name, model in (("gpt2", GPT), ("llama", LLAMA))
    for sharding in ("zero1", "zero2", "zero3")
    for recipe in (
        {"batch_size": 1, "reduce_bucket_size": 100_000},
        {"batch_size": 8, "reduce_bucket_size": 400_000},
        {"batch_size": 4, "checkpointing": "block", "grad_accumulation": 2, "reduce_bucket_size": 200_000},
    )
]


def plan(sharding: str, recipe: dict) -> Plan:
    return Plan(implementation="deepspeed", precision="bf16-master", sharding=sharding, data_parallel=RANKS, **recipe)


def measured(m: ModelConfig, p: Plan) -> int:
    """The most bytes of live tensors in a steady step of this process, one of RANKS."""
    import deepspeed  # noqa: PLC0415 - of those who run this alone

    torch.backends.mkldnn.enabled = False
    model, (ids, targets) = build_parts(m, p.replace(implementation="bundled", sharding="none", **DEFAULT), "cpu", 0)
    stage = int(p.sharding[-1])
    config = {
        "train_micro_batch_size_per_gpu": p.batch_size,
        "gradient_accumulation_steps": p.grad_accumulation,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": p.reduce_bucket_size,
        },
    }
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step() -> None:
        for _ in range(p.grad_accumulation):
            engine.backward(loss_of(engine, p, ids, targets))
            engine.step()

    step()
    step()
    peaks = Counter(profiled(step) for _ in range(TRIES))
    often = max(peaks.values())
    return min(peak for peak, times in peaks.items() if times == often)


def profiled(step: Callable[[], None]) -> int:
    """The most bytes of live tensors in a step.

    What gloo's own threads are the last to hold they free where no profiler looks, and it seems to stay: hence the
    commonest of several steps.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()  # of whose memory what goes in the next was seen
        gc.collect()
        alive = {}
        for x in gc.get_objects():
            if isinstance(x, torch.Tensor):
                alive[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        with record_function("begin"):
            pass
        step()
    events = sorted((e.start_ns(), e.name(), e.nbytes()) for e in prof.profiler.kineto_results.events())
    begin = next(at for at, name, _ in events if name == "begin")
    own = [nbytes for at, name, nbytes in events if name == "[memory]" and at > begin]
    return sum(alive.values()) + max(accumulate(own))


DEFAULT = {name: getattr(Plan(), name) for name in ("reduce_bucket_size", "max_live_parameters", "data_parallel")}


def worker() -> None:
    torch.distributed.init_process_group("gloo")
    model, sharding, recipe = json.loads(sys.argv[1])
    found = measured(ModelConfig(**model), plan(sharding, recipe))
    if torch.distributed.get_rank() == 0:
        print("measured", found)


def main(only: list[str]) -> None:
    """Those of the cases named `only` ("llama zero3"), or all."""
    chosen = [case for case in CASES if not only or " ".join((case[0], case[2])) in only]
    for port, (name, model, sharding, recipe) in enumerate(chosen, 29600):
        m, p = ModelConfig(**model), plan(sharding, recipe)
        run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}", f"--master_port={port}"]
        done = subprocess.run(  # noqa: S603 - this file
            [*run, __file__, json.dumps([model, sharding, recipe])],
            env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("measured")]
        if not lines:
            sys.exit(done.stderr)
        real, ours = int(lines[0].split()[1]), account(m, p, "cpu").evaluate(m, p, threads=1).peak_bytes
        print(f"{name} {sharding} {recipe}: {ours:,} predicted, {real:,} measured, {ours / real - 1:+.1%}", flush=True)


if __name__ == "__main__":
    worker() if sys.argv[1:] and sys.argv[1].startswith("[") else main(sys.argv[1:])
