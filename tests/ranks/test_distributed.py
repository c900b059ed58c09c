"""Two processes on gloo against one: the same losses, and checkpoints that either can read."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_worker import half

import trainer
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.files.checkpoint import checkpoints
from trainer.files.contents import CheckpointError
from trainer.files.prepare import PrepareConfig, prepare
from trainer.model.decoder import build_model
from trainer.parallel.distributed import Weights, World
from trainer.parallel.saved import RUN_FILE, checksum, load_run
from trainer.run.commands import main

CONFIG = """
steps = 6
save_every = 3
eval_every = 3
eval_batches = 2
keep = 9
device = "cpu"
[model]
num_layers = 2
d_model = 16
num_heads = 2
context_length = 16
[plan]
batch_size = 4
[optim]
lr = 1e-2
warmup_steps = 1
"""
TWO = ["--plan.grad-accumulation", "2"]  # the processes take a micro-batch each; otherwise half the rows of each
CHUNKED = ["--plan.loss", "chunked"]  # which reads the head's weight where the model's forward has it whole
CONTEXT = ["--plan.context-parallel", "2"]  # they take half the tokens of each sequence
LOOP = ["--plan.optimizer-impl", "loop"]  # whose state has a scalar tensor


def torchrun(*arguments, processes=2):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.terminate()  # which it passes on to its workers
        output, _ = process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of finished runs: name -> run; see the calls of `add`."""
    root = tmp_path_factory.mktemp("runs")
    library = Path(os.__file__).parent
    prepare(PrepareConfig((library / "argparse.py",), root / "data", bytes=True))
    (root / "c.toml").write_text(CONFIG)
    jobs = []

    def arguments(name, *more):
        return [
            "train",
            "--config",
            str(root / "c.toml"),
            "--data",
            str(root / "data"),
            "--out",
            str(root / name),
            *more,
        ]

    def add(name, *more, source=None, stop_at=None):
        if source:
            jobs.append({"copy": (str(root / source), str(root / name))})
            more = (*more, "--resume")
        status = 0 if stop_at is None else 128 + signal.SIGTERM
        jobs.append({"arguments": arguments(name, *more), "stop_at": stop_at, "status": status})

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.train.matmul_peak", lambda *_: 1e9)
        assert main(arguments("one", *TWO)) == 0
        assert main(arguments("one_rows")) == 0
        assert main(arguments("one_loop", *TWO, *LOOP)) == 0
        assert main(arguments("one_chunked", *TWO, *CHUNKED)) == 0
        add("ddp", *TWO)
        add("ddp_rows")
        add("fsdp", *TWO, "--sharding", "fsdp")
        add("fsdp_rows", "--sharding", "fsdp")
        add("fsdp_loop", *TWO, *LOOP, "--sharding", "fsdp")
        add("zero1", *TWO, *LOOP, "--sharding", "zero1")
        add("zero2", *TWO, *LOOP, "--sharding", "zero2")
        for name, precision in (("fp16", "fp16-mixed"), ("master", "bf16-master")):
            half_precision = [*TWO, *LOOP, "--plan.precision", precision]
            assert main(arguments(f"one_{name}", *half_precision)) == 0
            for sharding in ("none", "zero1", "zero2", "fsdp"):
                add(f"{sharding}_{name}", *half_precision, "--sharding", sharding)
            add(f"fsdp_of_one_{name}", *half_precision, "--sharding", "fsdp", source=f"one_{name}")
            add(f"zero1_of_fsdp_{name}", *half_precision, "--sharding", "zero1", source=f"fsdp_{name}")
        add("ddp_chunked", *TWO, *CHUNKED)
        add("fsdp_chunked", *TWO, *CHUNKED, "--sharding", "fsdp")
        add("context", *TWO, *CONTEXT)
        add("context_of_ddp", *TWO, *CONTEXT, "--sharding", "fsdp", "--changed", source="ddp")
        add("zero1_of_one", *TWO, *LOOP, "--sharding", "zero1", source="one_loop")
        add("zero1_of_fsdp", *TWO, *LOOP, "--sharding", "zero1", source="fsdp_loop")
        add("ddp_of_one", *TWO, source="one")
        add("fsdp_of_one", *TWO, "--sharding", "fsdp", source="one")
        add("fsdp_of_ddp", *TWO, "--sharding", "fsdp", source="ddp")
        add("ddp_of_fsdp", *TWO, source="fsdp")
        add("fsdp_loop_of_one", *TWO, *LOOP, "--sharding", "fsdp", source="one_loop")
        add("stopped", *TWO, stop_at=2)
        add("stopped", *TWO, "--resume")
        (root / "jobs.json").write_text(json.dumps(jobs))
        torchrun(str(Path(__file__).with_name("distributed_worker.py")), str(root / "jobs.json"))
        loops = (("fsdp_loop", TWO + LOOP), ("zero1", TWO + LOOP))
        for source, more in (("ddp", TWO), ("fsdp", TWO), *loops):
            name = f"one_of_{source}"
            half(root / source, root / name)
            assert main(arguments(name, *more, "--resume")) == 0
    torch.set_num_threads(threads)
    return root


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss") or r.get("valid_loss")) for r in records]


ONE = {"ddp_rows": "one_rows", "fsdp_rows": "one_rows"}
ONE |= dict.fromkeys(("fsdp_loop", "fsdp_loop_of_one", "one_of_fsdp_loop"), "one_loop")
ONE |= dict.fromkeys(("zero1", "zero2", "zero1_of_one", "zero1_of_fsdp", "one_of_zero1"), "one_loop")
ONE |= dict.fromkeys(("ddp_chunked", "fsdp_chunked"), "one_chunked")
ALL = ["ddp", "ddp_rows", "fsdp", "fsdp_rows", "fsdp_loop", "stopped", "ddp_of_one", "fsdp_of_one", "fsdp_of_ddp"]
ALL += [
    "zero1",
    "zero2",
    "ddp_chunked",
    "fsdp_chunked",
    "zero1_of_one",
    "zero1_of_fsdp",
    "one_of_zero1",
    "ddp_of_fsdp",
    "fsdp_loop_of_one",
    "one_of_ddp",
    "one_of_fsdp",
    "one_of_fsdp_loop",
    "context",
    "context_of_ddp",
]


@pytest.mark.parametrize("name", ALL)
def test_losses_equal_those_of_one_process_on_the_same_global_batch(runs, name):
    ours, one = losses(runs / name), losses(runs / ONE.get(name, "one"))
    assert [step for step, _ in ours] == [step for step, _ in one] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in one], rel=2e-6)


@pytest.mark.parametrize("precision", ["fp16", "master"])
@pytest.mark.parametrize("name", ["none", "zero1", "zero2", "fsdp", "fsdp_of_one", "zero1_of_fsdp"])
def test_half_precision_is_shared_out_too(runs, name, precision):
    """Within 0.1 %: a difference of 1e-8 in a sum of gradients can turn the rounding of a weight or an activation."""
    ours, one = losses(runs / f"{name}_{precision}"), losses(runs / f"one_{precision}")
    assert [step for step, _ in ours] == [step for step, _ in one]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in one], rel=1e-3)
    assert one[-1][1] < one[0][1]


@pytest.mark.parametrize("sharding", [pytest.param("none", marks=pytest.mark.slow), "fsdp"])
def test_torchrun_runs_the_command(runs, tmp_path, sharding):
    config = ["--config", str(runs / "c.toml"), "--data", str(runs / "data"), "--out", str(tmp_path / "x"), *TWO]
    output = torchrun("-m", "trainer", "train", *config, "--sharding", sharding)
    assert output.count("validation loss") == 2 + 1  # said by one process: two validations and the unigram loss
    assert [loss for _, loss in losses(tmp_path / "x")] == pytest.approx([y for _, y in losses(runs / "one")], rel=2e-6)


def load(path, model=None):
    model = model or build_model(ModelConfig("gpt2", 2, 16, 2, 257, 16), Plan())
    load_run(World("cpu"), path, Weights(model), None)
    return model.state_dict()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_of_one"])
def test_a_checkpoint_of_many_holds_the_weights_that_one_process_has(runs, name):
    ours, one = load(checkpoints(runs / name)[-1]), load(checkpoints(runs / "one")[-1])
    for key, weight in one.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-5)


def test_one_process_alone_stopped_and_so_did_all(runs):
    assert [path.name for path in checkpoints(runs / "stopped")] == ["step_00000002", "step_00000003", "step_00000006"]


def test_text_is_generated_from_a_sharded_checkpoint(runs, capsys):
    assert main(["generate", str(runs / "fsdp"), "--prompt", "def", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("def")


@pytest.fixture
def sharded(runs, tmp_path):
    return Path(shutil.copytree(checkpoints(runs / "fsdp")[-1], tmp_path / "step_00000006"))


def test_damaged_sharded_checkpoints_are_refused(sharded):
    load(sharded)
    for name in sorted(path.name for path in sharded.iterdir()):
        whole = (sharded / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for content in (bytes(flipped), whole[: len(whole) // 2], b""):
            (sharded / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=r"checksum|truncated"):
                load(sharded)
        (sharded / name).unlink()
        with pytest.raises(CheckpointError, match=rf"checksum|{RUN_FILE} is missing"):
            load(sharded)
        (sharded / name).write_bytes(whole)
    load(sharded)


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_never_runs_what_the_metadata_holds(sharded, tmp_path):
    (sharded / ".metadata").write_bytes(pickle.dumps(Program(tmp_path / "ran")))
    content = torch.load(sharded / RUN_FILE)
    content["files"][".metadata"] = checksum(sharded / ".metadata")  # whoever altered it fixed the checksum too
    torch.save(content, sharded / RUN_FILE)
    with pytest.raises(CheckpointError, match="more than metadata"):
        load(sharded)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("layers", "width", "message"),
    [
        (3, 16, r"blocks\.2\S* is absent, the model's is \("),
        (1, 16, r"the model's is absent"),
        (2, 8, r"is \(257, 16\), the model's is \(257, 8\)"),
    ],
)
def test_another_models_sharded_checkpoint_is_refused(sharded, layers, width, message):
    with pytest.raises(CheckpointError, match=message):
        load(sharded, build_model(ModelConfig("gpt2", layers, width, 2, 257, 16), Plan()))


OVERFLOW = """
import torch
import torch.distributed as dist
from trainer.optim.precision import loss_scaler
from trainer.parallel.distributed import end_process

dist.init_process_group("gloo")
for overflowing in ([1], [0, 1]):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([p], fused=True)
    scaler = loss_scaler("fp16-mixed", "cpu", sharded=True)
    scaler.scale(p.sum()).backward()
    if dist.get_rank() in overflowing:
        p.grad[1] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [1, 1] and scaler.get_scale() == 2.0**15, (dist.get_rank(), overflowing, p, scaler.get_scale())
dist.barrier()
end_process(0)
"""


def test_an_overflow_in_one_process_or_in_two_leaves_the_step_out_in_all(tmp_path):
    (tmp_path / "overflow.py").write_text(OVERFLOW)
    torchrun(str(tmp_path / "overflow.py"))
