"""Started by torchrun: `python -m trainer` several times in the same processes, whose start is what takes time.

The argument is a JSON file, a list of jobs: {"copy": [from, to]}, which prepares an interrupted run, or
{"arguments": [...], "stop_at": step or null, "status": expected}.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import trainer.run.train
from trainer.files.checkpoint import checkpoints
from trainer.parallel.distributed import end_process
from trainer.run.commands import main


def half(source, target):
    """A run's state after its first checkpoint, as if it had been interrupted there."""
    target.mkdir()
    first = checkpoints(source)[0]
    (shutil.copytree if first.is_dir() else shutil.copy)(first, target / first.name)
    shutil.copy(source / "metrics.jsonl", target)


def run(job):
    if "copy" in job:
        if os.environ["RANK"] == "0":
            half(*map(Path, job["copy"]))
        dist.barrier()
        return
    real = trainer.run.train.Reporter.step

    def step(self, step, *args, **values):
        real(self, step, *args, **values)
        if step == job["stop_at"] and os.environ["RANK"] == "1":  # one process alone gets the signal
            signal.raise_signal(signal.SIGTERM)

    trainer.run.train.Reporter.step = step
    status = main(job["arguments"])
    trainer.run.train.Reporter.step = real
    assert status == job["status"], (job, status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer.run.train.matmul_peak = lambda *_: 1e9
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(job)
    dist.barrier()
    end_process(0)
