"""`python -m trainer train` with tensor and pipeline parallelism: one process's losses, checkpoints for any layout.

The tolerance is that of test_distributed: gradients are sums of float32 in another order.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from distributed_worker import half
from test_distributed import losses, torchrun

from trainer.files.prepare import PrepareConfig, prepare
from trainer.run.commands import main

CONFIG = """
steps = 4
save_every = 2
eval_every = 2
eval_batches = 2
keep = 9
device = "cpu"
[model]
context_length = 16
vocab_size = 258
like = "{like}"
[plan]
batch_size = 2
grad_accumulation = 6
max_grad_norm = 0.5
[optim]
lr = 1e-2
warmup_steps = 1
"""
PHI3 = {  # q, k and v in one matrix, of unlike widths, and gate and up in another
    "model_type": "phi3",
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "sliding_window": None,
}
TENSOR = ["--plan.tensor-parallel", "2"]
SEQUENCE = [*TENSOR, "--plan.sequence-parallel"]
VOCABULARY = [*SEQUENCE, "--plan.vocabulary-parallel", "--plan.loss", "torch", "--changed"]
PIPELINE = ["--plan.pipeline-parallel", "2"]
GPIPE = [*PIPELINE, "--plan.pipeline-schedule", "gpipe"]
INTERLEAVED = [*PIPELINE, "--plan.virtual-stages", "2"]
FSDP = ["--sharding", "fsdp"]
ZERO2 = ["--sharding", "zero2"]
TWO = {  # name -> options, and the run whose first half it goes on from
    "tensor": (TENSOR, None),
    "sequence": (SEQUENCE, None),
    "pipeline": (PIPELINE, None),
    "gpipe": (GPIPE, None),
    "interleaved": (INTERLEAVED, None),
    "tensor_of_one": (SEQUENCE, "one"),
    "pipeline_of_one": (PIPELINE, "one"),
    "vocabulary_of_tensor": (VOCABULARY, "tensor"),
    "pipeline_of_tensor": (GPIPE, "tensor"),
    "tensor_of_interleaved": (TENSOR, "interleaved"),
    "fsdp_of_pipeline": (FSDP, "pipeline"),
    "tensor_of_fsdp": (TENSOR, "fsdp_of_pipeline"),
}
FOUR = {
    "tensor_fsdp_of_pipeline": ([*TENSOR, *FSDP], "pipeline"),
    "pipeline_ddp_of_tensor_fsdp": (PIPELINE, "tensor_fsdp_of_pipeline"),
    "interleaved_tensor_of_one": ([*INTERLEAVED, *SEQUENCE], "one"),
    "pipeline_zero2": ([*PIPELINE, *ZERO2], None),
}
ONE = ["sequence", "pipeline", "tensor_fsdp_of_pipeline", "interleaved_tensor_of_one"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of finished runs: name -> run."""
    root = tmp_path_factory.mktemp("runs")
    prepare(PrepareConfig((Path(os.__file__).parent / "argparse.py",), root / "data", bytes=True))
    (root / "config.json").write_text(json.dumps(PHI3))
    (root / "c.toml").write_text(CONFIG.format(like=root / "config.json"))

    def arguments(name, more):
        given = ["--config", str(root / "c.toml"), "--data", str(root / "data"), "--out", str(root / name)]
        return ["train", *given, *more]

    def jobs(table):
        for name, (more, source) in table.items():
            if source:
                yield {"copy": (str(root / source), str(root / name))}
            resumed = ["--resume"] if source else []
            yield {"arguments": arguments(name, [*more, *resumed]), "stop_at": None, "status": 0}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.train.matmul_peak", lambda *_: 1e9)
        assert main(arguments("one", [])) == 0
        worker = str(Path(__file__).with_name("distributed_worker.py"))
        for processes, table in ((2, TWO), (4, FOUR)):
            (root / "jobs.json").write_text(json.dumps(list(jobs(table))))
            torchrun(worker, str(root / "jobs.json"), processes=processes)
        for source in ONE:
            half(root / source, root / f"one_of_{source}")
            assert main(arguments(f"one_of_{source}", ["--resume"])) == 0
    torch.set_num_threads(threads)
    return root


@pytest.mark.parametrize("name", [*TWO, *FOUR, *(f"one_of_{source}" for source in ONE)])
def test_losses_equal_those_of_one_process_also_from_a_checkpoint_of_another_layout(runs, name):
    ours, one = losses(runs / name), losses(runs / "one")
    assert [step for step, _ in ours] == [step for step, _ in one] == [1, 2, 2, 3, 4, 4]
    assert [loss for _, loss in ours] == pytest.approx([loss for _, loss in one], rel=2e-6)


@pytest.mark.parametrize("name", ["tensor", "gpipe", "tensor_fsdp_of_pipeline"])
def test_the_norm_that_clips_is_that_of_all_processes(runs, name):
    def norms(folder):
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [record["grad_norm"] for record in records if "grad_norm" in record]

    one = norms(runs / "one")
    assert min(one) > 0.5  # clipped
    assert norms(runs / name) == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", ["sequence", "pipeline", "tensor_fsdp_of_pipeline", "pipeline_zero2"])
def test_weights_are_exported_as_one_process_has_them(runs, name, tmp_path):
    from safetensors.torch import load_file

    assert main(["export", str(runs / name), str(tmp_path / "model.safetensors")]) == 0
    ours, one = load_file(tmp_path / "model.safetensors"), load_file(runs / "one" / "model.safetensors")
    assert ours.keys() == one.keys()
    for key, weight in one.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (TENSOR, "plan.tensor_parallel = 2: must divide the 1 processes"),
        (PIPELINE, "plan.pipeline_parallel = 2: must divide the 1 processes"),
        ([*PIPELINE, "--plan.compile"], "plan.compile = True: stages of a pipeline are not compiled"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(runs, tmp_path, capsys, more, said):
    given = ["--config", str(runs / "c.toml"), "--data", str(runs / "data"), "--out", str(tmp_path / "x")]
    assert main(["train", *given, *more]) == 2
    assert said in capsys.readouterr().err
