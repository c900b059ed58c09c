"""One rank of a world that is not there, recorded alone, and the same rank of a real one: every byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer

WORKER = Path(__file__).with_name("recorded_worker.py")
EVERY = os.environ.get("RECORDED_LAYOUTS") == "all"  # by hand: all layouts, and all ranks
LAYOUTS = ["zero3", "zero2", "bf16", "ddp", "ddp views", "tensor", "sequence"]
CASES = {2: LAYOUTS, 4: [*LAYOUTS, "hybrid", "both"]} if EVERY else {4: ["bf16", "ddp", "both"]}


def said(command, source, target, *arguments):
    """What the worker writes."""
    path = str(Path(trainer.__file__).parents[1])
    done = subprocess.run(
        [*command, str(WORKER), str(source), str(target), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(target.read_text())


@pytest.mark.parametrize("ranks", CASES)
def test_a_rank_recorded_alone_is_the_real_one(ranks, tmp_path):
    """Parameters, states, the most that a steady step adds, and each allocation."""
    source = tmp_path / "cases.json"
    source.write_text(json.dumps([(layout, {}) for layout in CASES[ranks]]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    real = said(launch, source, tmp_path / "real.json")
    for rank in range(ranks) if EVERY else (0, ranks - 1):
        alone = said([sys.executable], source, tmp_path / f"{rank}.json", ranks, rank)
        for layout, own, everyones in zip(CASES[ranks], alone, real, strict=True):
            assert own == everyones[rank], (layout, rank)


@pytest.mark.parametrize(
    ("device", "layouts", "seed"),
    [
        ("cpu", ["shards-64", "tensor-2"], 20),  # a selective checkpoint that has kept a product divides no bias again
        ("cuda", ["tensor-2-shards-2", "experts-2"], 3),
    ],
)
def test_a_rank_recorded_alone_is_its_account(device, layouts, seed):
    """Two ways that share no code: peak, parameters, states and messages."""
    command = [sys.executable, "tools/check_recorder.py", "layouts", "1", "--only", *layouts]
    done = subprocess.run(
        [*command, "--device", device, "--seed", str(seed)],
        cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'compared': 2, 'equal': 2") == len(layouts)
