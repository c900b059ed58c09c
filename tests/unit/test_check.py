"""`estimate check`: somebody's own code, which this command alone runs."""

import json
import pickle
import textwrap

import pytest

from estimator.describe.checks import ConfigError
from estimator.show.commands import main
from trainer.referee.recorder.builds import of_file, with_sizes
from trainer.referee.recorder.recording import record

CODE = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            return x + self.down(torch.relu(self.up(x)))

    class Model(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embedding = nn.Embedding(100, width)
            self.blocks = nn.ModuleList(Block(width) for _ in range(2))
            self.head = nn.Linear(width, 100)

        def forward(self, ids):
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    def build(batch_size, width=32):
        return Model(width)

    def wants(width):
        return Model(width)

    def other():
        return 3

    def raises():
        raise KeyError("no such data")
"""


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(textwrap.dedent(CODE))
    return path


def test_it_says_whose_statement_the_peak_is(code, capsys):
    assert main(["check", f"{code}:build", "--batch-size", "2", "--seq-len", "64", "--measure"]) == 0
    out = capsys.readouterr().out
    assert "as no other command" in out.splitlines()[0]
    assert "Fits on A100" in out
    assert "A step takes " in out
    assert f"{code}:" in out
    assert "events are equal, and so is the peak" in out


def test_what_does_not_fit_is_tried_with_changes(code, capsys):
    """Nine billion parameters, of which AdamW needs 16 bytes each and SGD 8: 74 GB."""
    asked = ["check", f"{code}:build", "--seq-len", "64", "--set", "width=24000"]
    assert main(asked) == 1
    answer, _, tried = capsys.readouterr().out.partition("What it needs with these changes")
    assert "Does not fit on A100" in answer
    assert "--optimizer sgd: 69" in tried
    assert "which fits" in tried
    assert "checkpoints of its own: does not fit, parameters and optimizer state alone take" in tried
    assert "checkpoints, bf16 and adafactor: not tried, the module has no gradient_checkpointing_enable" in tried
    assert main([*asked, "--no-remedies"]) == 1
    assert "--optimizer sgd" not in capsys.readouterr().out


def test_a_config_of_half_precision_weights_is_built_in_the_plans_precision(tmp_path, capsys):
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "vocab_size": 100, "dtype": "bfloat16", **tiny}))
    held = {}
    for precision in ("fp32", "bf16"):
        asked = ["check", "--hf", str(file), "--seq-len", "16", "--precision", precision, "--json"]
        assert main(asked) == 0
        held[precision] = json.loads(capsys.readouterr().out)
    assert held["fp32"]["parameters"] == 2 * held["bf16"]["parameters"] == 4 * held["fp32"]["parameters_number"]


def test_the_parts_add_up(code, capsys):
    assert main(["check", f"{code}:build", "--seq-len", "64", "--set", "width=48", "--optimizer", "sgd", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(found["modules"].values()) == found["peak"]
    assert found["line"]["file"] == str(code)
    parts = ("parameters", "gradients", "optimizer", "activations", "temporary", "inputs", "buffers", "communication")
    assert sum(found[part] for part in parts) == found["peak"]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")  # it returns a view: that is the head's
def test_a_rank_of_a_world_that_is_not_there_holds_its_shards(code, capsys):
    from torch import distributed

    with code.open("a") as file:
        file.write(
            textwrap.dedent("""
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            def sharded(device):
                model, mesh = Model(64).to(device), init_device_mesh(device, (8,))
                for block in model.blocks:
                    fully_shard(block, mesh=mesh)
                return fully_shard(model, mesh=mesh)

            def elsewhere():
                return sharded("cpu")
        """)
        )
    try:
        assert main(["check", f"{code}:sharded", "--seq-len", "16", "--fake-world", "8", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        with pytest.raises(ConfigError, match=r"is shared out on a mesh of cpu, and the rules are cuda's"):
            record(of_file(f"{code}:elsewhere", {"seq_len": 16}), device="cuda")
    finally:
        distributed.destroy_process_group()
    sent = {x["kind"]: x["count"] for x in found["messages"]}
    assert sent == {"all-gather": 3 + 2, "reduce-scatter": 3}  # the root's parameters stay whole until backward
    rows = sum(-(-n // 8) * width for n, width in ((100, 64), *2 * ((256, 64), (64, 256)), (100, 64)))
    biases = sum(-(-n // 8) for n in (256, 64, 256, 64, 100))
    assert found["parameters"] == 4 * (rows + biases)
    assert found["optimizer"] >= 2 * found["parameters"]


def test_a_snapshot_of_a_card_is_laid_beside(code, tmp_path, capsys):
    frames = [{"filename": "train.py", "line": 7, "name": "forward"}]
    trace = [{"action": "alloc", "addr": 1, "size": 512, "stream": 0, "frames": frames}]
    snapshot = {"segments": [{"device": 0, "total_size": 2 << 20, "allocated_size": 512}], "device_traces": [trace]}
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    assert main(["check", f"{code}:build", "--seq-len", "64", "--snapshot", str(path)]) == 0
    out = capsys.readouterr().out
    assert "The snapshot's peak is 512 bytes" in out
    assert "train.py:7" in out


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("{}:builds", "its functions are build, other, raises, wants"),
        ("{}:other", "build returned a int"),
        ("{}:wants", "give it with --set width=NUMBER"),
        ("{}:raises", "raised KeyError: 'no such data'"),
        ("nowhere.py:build", "must be FILE.py:FUNCTION"),
    ],
)
def test_what_cannot_be_checked_is_said_in_a_sentence(code, capsys, argument, said):
    assert main(["check", argument.format(code)]) == 2
    assert said in capsys.readouterr().err


def test_an_argument_that_the_function_does_not_take_is_refused_by_name():
    def build(batch_size, width=16):
        return batch_size * width

    with pytest.raises(ConfigError, match="set = 'widht': build takes batch_size, width"):
        with_sizes(build, {"batch_size": 1, "seq_len": 8, "widht": 32})
    assert with_sizes(build, {"batch_size": 1, "seq_len": 8, "width": 32})() == 32


def test_a_function_keeps_its_own_sizes_and_none_is_below_1(tmp_path, capsys):
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\n"
        "def build(batch_size=3, seq_len=5):\n"
        "    module = torch.nn.Linear(8, 8)\n"
        "    return module, lambda m, x: m(x).square().mean(), (torch.randn(batch_size, seq_len, 8),)\n"
    )
    assert main(["check", f"{path}:build", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)
    assert main(["check", f"{path}:build", "--batch-size", "6", "--json"]) == 0
    twice = json.loads(capsys.readouterr().out)
    assert (own["inputs"], twice["inputs"]) == (3 * 5 * 8 * 4, 6 * 5 * 8 * 4)
    assert main(["check", f"{path}:build", "--batch-size", "0"]) == 2
    assert "batch_size = 0: must be 1 or more" in capsys.readouterr().err
