import io
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_model
from torch import nn

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.files.checkpoint import (
    CheckpointError,
    checkpoint_path,
    checkpoints,
    export_safetensors,
    load_checkpoint,
    random_states,
    read_checkpoint,
    save_checkpoint,
    set_random_states,
)
from trainer.model.decoder import build_model

pytestmark = pytest.mark.usefixtures("one_thread")


CONFIGS = {
    "gpt2": ModelConfig("gpt2", num_layers=1, d_model=8, num_heads=2, vocab_size=11, context_length=6),
    "llama": ModelConfig("llama", num_layers=1, d_model=8, num_heads=2, vocab_size=11, context_length=6, d_ff=12),
}


def build(family="gpt2", seed=0, **changes):
    torch.manual_seed(seed)
    model = build_model(CONFIGS[family].replace(**changes), Plan())
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, seed=1):
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps):
        ids = torch.randint(11, (2, 7))
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def content(model, optimizer):
    buffer = io.BytesIO()
    save_checkpoint(model, optimizer, 0, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("where", ["path", "string", "file object"])
def test_training_goes_on_bit_for_bit_after_a_load(family, where, tmp_path):
    model, optimizer = build(family)
    train(model, optimizer, 3)
    out = {"path": tmp_path / "x.pt", "string": str(tmp_path / "x.pt"), "file object": io.BytesIO()}[where]
    save_checkpoint(model, optimizer, 3, out)
    expected = train(model, optimizer, 3, seed=2)
    if where == "file object":
        out.seek(0)
    other, other_optimizer = build(family, seed=9)
    assert load_checkpoint(out, other, other_optimizer) == 3
    assert train(other, other_optimizer, 3, seed=2) == expected


def test_what_a_run_adds_comes_back(tmp_path):
    model, optimizer = build()
    states = random_states()
    run = {"config": {"lr": 1e-3, "betas": [0.9, 0.999], "name": "x"}, "random": states}
    save_checkpoint(model, optimizer, 7, tmp_path / "x.pt", run)
    drawn = torch.rand(3)
    found = read_checkpoint(tmp_path / "x.pt")["run"]
    assert found["config"] == run["config"]
    set_random_states(found["random"])
    assert torch.equal(torch.rand(3), drawn)


def test_weights_alone_can_be_loaded(tmp_path):
    model, optimizer = build()
    save_checkpoint(model, optimizer, 7, tmp_path / "x.pt")
    other, _ = build(seed=9)
    assert load_checkpoint(tmp_path / "x.pt", other, None) == 7
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def trained():
    model, optimizer = build()
    train(model, optimizer, 1)
    return content(model, optimizer)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_unchanged_in_meaning(trained, data):
    whole, (other, other_optimizer) = trained, build(seed=9)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    before = content(other, other_optimizer)
    try:
        load_checkpoint(io.BytesIO(bytes(damaged)), other, other_optimizer)
    except CheckpointError:
        assert content(other, other_optimizer) == before
    else:  # the damage was in padding
        assert content(other, other_optimizer) == whole


@settings(max_examples=30, deadline=None)
@given(fraction=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(fraction):
    whole = content(*build())
    with pytest.raises(CheckpointError, match="no checkpoint, or a truncated one"):
        load_checkpoint(io.BytesIO(whole[: int(fraction * len(whole))]), *build())


def test_foreign_files_are_refused_by_name(tmp_path):
    file = tmp_path / "x.pt"
    for write in (
        lambda: file.write_bytes(b""),
        lambda: file.write_text("a poem"),
        lambda: file.write_bytes(pickle.dumps({"model": {}})),
        lambda: zipfile.ZipFile(file, "w").close(),
        lambda: torch.save([1, 2], file),
        lambda: torch.save({"model": {}, "iteration": 1}, file),
        lambda: torch.save({"model": [], "optimizer": {}, "iteration": 1}, file),
        lambda: torch.save({"model": {}, "optimizer": {}, "iteration": "1"}, file),
    ):
        write()
        with pytest.raises(CheckpointError, match=r"x\.pt: .*no checkpoint"):
            load_checkpoint(file, *build())
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt", *build())


class Program:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_loading_never_runs_what_a_file_holds(tmp_path):
    model, optimizer = build()
    torch.save({**torch.load(io.BytesIO(content(model, optimizer))), "run": Program(tmp_path / "ran")}, tmp_path / "x")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        load_checkpoint(tmp_path / "x", model, optimizer)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "x", weights_only=False)  # the trap is real
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 2}, "only in the model"),
        ({"vocab_size": 12}, r"embedding.weight is \(11, 8\), the model's is \(12, 8\)"),
        ({"family": "llama", "d_ff": 12}, "only in the"),
    ],
)
def test_another_models_checkpoint_is_refused_and_nothing_is_copied(changes, message):
    saved = io.BytesIO(content(*build()))
    model, optimizer = build(seed=9, **changes)
    before = content(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(saved, model, optimizer)
    assert content(model, optimizer) == before


def test_another_optimizers_checkpoint_is_refused():
    model, optimizer = build()
    train(model, optimizer, 1)
    whole = content(model, optimizer)
    with pytest.raises(CheckpointError, match=r"of another optimizer: .*AdamW, this run's is .*SGD"):
        load_checkpoint(io.BytesIO(whole), model, torch.optim.SGD(model.parameters(), lr=1))
    fewer = torch.optim.AdamW(list(model.parameters())[1:])
    with pytest.raises(CheckpointError, match="optimizer state does not fit"):
        load_checkpoint(io.BytesIO(whole), model, fewer)


# The child does nothing but save, which starts no thread and needs none of its parent's: forking is safe here.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def large():
    model, optimizer = build(vocab_size=20_000)  # some megabytes with its optimizer state
    train(model, optimizer, 1)
    return model, optimizer


def start_saving(large, folder, died_at=0):
    """Fork a process that saves for ever, wait for its first checkpoint, and return its id."""
    folder.mkdir()
    child = os.fork()
    if child:
        deadline = time.monotonic() + 30
        while not checkpoints(folder) and time.monotonic() < deadline:
            time.sleep(0.001)
        return child
    try:
        if died_at:
            _die_after_writing(died_at)
        for step in range(100_000):
            save_checkpoint(*large, step, checkpoint_path(folder, step))
            for old in checkpoints(folder)[:-2]:
                old.unlink()
    finally:
        os._exit(1)


def _die_after_writing(size):
    real = torch.save
    saves = iter(range(100))

    class Dying(io.RawIOBase):
        def __init__(self, file):
            self.file, self.left = file, size

        def write(self, chunk):
            self.left -= len(chunk)
            if self.left < 0:
                self.file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return self.file.write(chunk)

    torch.save = lambda content, file: real(content, file if next(saves) < 2 else Dying(file))


def check_newest(folder):
    found = checkpoints(folder)
    assert found
    model, optimizer = build(vocab_size=20_000)
    for path in found:  # every complete one, not only the newest
        assert checkpoint_path(folder, load_checkpoint(path, model, optimizer)) == path


@forks
def test_killed_at_any_moment_the_newest_checkpoint_loads(large, tmp_path):
    chance = random.Random(0)
    parts = 0
    for trial in range(int(os.environ.get("KILLS", "40"))):
        child = start_saving(large, tmp_path / str(trial))
        time.sleep(chance.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        parts += bool(list((tmp_path / str(trial)).glob("*.part")))
        check_newest(tmp_path / str(trial))
    assert parts  # some were killed in the middle of a save


@forks
@pytest.mark.parametrize("died_at", [1, 3_000, 1_000_000])
def test_killed_in_the_middle_of_writing_the_older_checkpoint_loads(large, tmp_path, died_at):
    child = start_saving(large, tmp_path / "x", died_at)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in checkpoints(tmp_path / "x")] == ["step_00000000.pt", "step_00000001.pt"]
    assert (tmp_path / "x" / "step_00000002.pt.part").exists()
    check_newest(tmp_path / "x")


def test_a_full_disk_raises_and_leaves_the_older_file(tmp_path):
    model, optimizer = build()
    path = tmp_path / "x.pt"
    save_checkpoint(model, optimizer, 1, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(model, optimizer, 2, path)
        with pytest.raises(OSError, match="cannot be written"):
            export_safetensors(build(vocab_size=1000)[0], tmp_path / "x.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_device_is_never_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="it is no file"):
        export_safetensors(build()[0], pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_safetensors_round_trip(family, tied, tmp_path):
    model, _ = build(family, tie_embeddings=tied)
    export_safetensors(model, tmp_path / "x.safetensors", {"config": "{}"})
    other, _ = build(family, seed=9, tie_embeddings=tied)
    load_model(other, str(tmp_path / "x.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata()["config"] == "{}"
        assert len(file.keys()) == len(model.state_dict()) - tied


def test_the_same_weights_give_the_same_safetensors_bytes(tmp_path):
    """The library's own order of metadata changes from process to process."""
    code = (
        "import sys, torch; from torch import nn; from trainer.files.checkpoint import export_safetensors\n"
        "torch.manual_seed(0); m = nn.Sequential(*[nn.Linear(3, 5) for _ in range(4)]); m[1].weight = m[0].weight\n"
        "export_safetensors(m, sys.argv[1], {c: c for c in 'qwertyuiop'})"
    )
    made = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for path in made:
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    assert len({path.read_bytes() for path in made}) == 1
    model = nn.Sequential(*[nn.Linear(3, 5) for _ in range(4)])
    model[1].weight = model[0].weight
    load_model(model, made[0])
    torch.manual_seed(0)
    again = nn.Sequential(*[nn.Linear(3, 5) for _ in range(4)])
    assert torch.equal(model[3].weight, again[3].weight)
