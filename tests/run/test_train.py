import dataclasses
import errno
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import trainer.run.passes
import trainer.run.train
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import OPTIMIZERS, Plan
from trainer.files.checkpoint import checkpoints, read_checkpoint
from trainer.files.prepare import PrepareConfig, prepare
from trainer.optim.optimizers import AdamW
from trainer.parallel.distributed import Weights
from trainer.run.announce import matmul_peak
from trainer.run.commands import main, parse_train
from trainer.run.curve import WIDTH
from trainer.run.optimizer import build_optimizer
from trainer.run.passes import Share
from trainer.run.progress import duration
from trainer.run.settings import CONFIGS, ModelSection, OptimSection, TrainConfig, load_config
from trainer.run.train import TrainingError, train
from trainer.system.memory import available_memory


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, since these tensors are tiny, and no time spent on the machine's peak."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("trainer.run.train.matmul_peak", lambda *_: 1e9)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Some hundred kilobytes of the standard library, a token a byte."""
    out = tmp_path_factory.mktemp("data") / "bytes"
    library = Path(os.__file__).parent
    prepare(PrepareConfig(tuple(library / f"{n}.py" for n in ("argparse", "ast", "heapq", "inspect")), out, bytes=True))
    return out


def configure(corpus, out, **changes):
    plan = Plan(batch_size=4, attention="sdpa", optimizer_impl="bundled", max_grad_norm=1.0)
    base = TrainConfig(
        data=corpus,
        out=out,
        steps=8,
        model=ModelSection("gpt2", num_layers=1, d_model=16, num_heads=2, context_length=16),
        plan=plan.replace(**changes.pop("plan", {})),
        optim=OptimSection(lr=1e-2, warmup_steps=2),
        eval_every=4,
        eval_batches=2,
        save_every=3,
        device="cpu",
    )
    return dataclasses.replace(base, **changes)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("valid_loss")) for r in metrics(out)]


def weights(out):
    return read_checkpoint(checkpoints(out)[-1])["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.run.train.matmul_peak", lambda *_: 1e9)
        torch.set_num_threads(1)
        assert train(configure(corpus, out)) == 0
    return out


def test_a_run_writes_metrics_checkpoints_weights_and_what_going_on_needs(whole, corpus):
    records = metrics(whole)
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 9))
    assert [r["step"] for r in records if "valid_loss" in r] == [4, 8]
    assert all(r["perplexity"] == pytest.approx(math.exp(r["valid_loss"])) for r in records if "valid_loss" in r)
    assert all(r["tokens_per_second"] == pytest.approx(64 / r["seconds"]) for r in records if "loss" in r)
    assert [p.name for p in checkpoints(whole)] == ["step_00000006.pt", "step_00000008.pt"]  # the newest two
    assert (whole / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()
    assert load_config(str(whole / "config.json")) == configure(corpus, whole)
    assert {"model.safetensors", "config.json"} <= {p.name for p in whole.iterdir()}
    run = read_checkpoint(checkpoints(whole)[-1])["run"]
    assert run["step"] == 8
    assert {"random", "config", "model"} <= run.keys()


def test_the_same_configuration_gives_the_same_run(whole, corpus, tmp_path):
    train(configure(corpus, tmp_path))
    assert losses(tmp_path) == losses(whole)
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(("number", "stop_at"), [(signal.SIGINT, 1), (signal.SIGTERM, 5)])
def test_stopped_by_a_signal_and_resumed_equals_uninterrupted_bit_for_bit(
    whole, corpus, tmp_path, monkeypatch, capsys, number, stop_at
):
    real = trainer.run.train.Reporter.step

    def step(self, step, *args, **values):
        real(self, step, *args, **values)
        if step == stop_at:
            signal.raise_signal(number)

    before = signal.getsignal(number)  # a shell's background job ignores SIGINT
    with monkeypatch.context() as patch:
        patch.setattr(trainer.run.train.Reporter, "step", step)
        assert train(configure(corpus, tmp_path)) == 128 + number
    assert f"stopped by a signal after step {stop_at}; saved" in capsys.readouterr().out
    assert checkpoints(tmp_path)[-1].name == f"step_{stop_at:08d}.pt"
    assert signal.getsignal(number) is before
    assert train(configure(corpus, tmp_path, resume=True)) == 0
    assert losses(tmp_path) == losses(whole)
    assert same(weights(tmp_path), weights(whole))


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(corpus, tmp_path):
    """The real command, killed without warning at some step after its first save."""
    changes = {"steps": 120, "save_every": 2}
    config = configure(corpus, tmp_path / "killed", **changes)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    command = [sys.executable, "-m", "trainer", "train", "--config", str(tmp_path / "c.json")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not checkpoints(config.out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert train(dataclasses.replace(config, resume=True)) == 0
    train(configure(corpus, tmp_path / "whole", **changes))
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_records_after_the_checkpoint_and_cut_lines_are_dropped_on_resume(whole, corpus, tmp_path):
    train(configure(corpus, tmp_path))
    checkpoints(tmp_path)[-1].unlink()  # as if killed between step 8's record and its checkpoint
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')
    train(configure(corpus, tmp_path, resume=True))
    assert losses(tmp_path) == losses(whole)


def test_resuming_a_finished_run_does_nothing(corpus, tmp_path):
    train(configure(corpus, tmp_path))
    before = losses(tmp_path)
    assert train(configure(corpus, tmp_path, resume=True)) == 0
    assert losses(tmp_path) == before


@pytest.mark.parametrize(
    "plan",
    [
        {"optimizer_impl": "loop"},
        {"optimizer_impl": "foreach"},
        {"optimizer_impl": "fused"},
        {"attention": "naive"},
        {"checkpointing": "block"},
        {"checkpointing": "selective"},
        {"attention": "naive-fp32"},
        {"attention": "sdpa-math"},
        {"attention": "sdpa-flash"},
        {"loss": "torch"},
        {"loss": "torch-fp32"},
        {"loss": "chunked"},
    ],
    ids=lambda plan: "-".join(plan.values()),
)
def test_other_ways_to_run_a_step_give_the_same_losses(whole, corpus, tmp_path, plan):
    train(configure(corpus, tmp_path, plan=plan))
    for a, b in zip(losses(tmp_path), losses(whole), strict=True):
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None], rel=2e-3)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_a_sliding_window_trains(whole, corpus, tmp_path, attention):
    section = ModelSection("gpt2", num_layers=1, d_model=16, num_heads=2, context_length=16, sliding_window=4)
    train(configure(corpus, tmp_path, model=section, plan={"attention": attention}))
    valid = [loss for *_, loss in losses(tmp_path) if loss]
    assert valid[-1] < valid[0]
    assert valid != [loss for *_, loss in losses(whole) if loss]


def test_dropout_trains_and_evaluates_without(whole, corpus, tmp_path):
    train(configure(corpus, tmp_path, plan={"dropout": 0.2}))
    mine, theirs = losses(tmp_path), losses(whole)
    assert mine[0][1] != theirs[0][1]  # of a training step: some elements are dropped
    valid = [loss for *_, loss in mine if loss]
    assert valid[-1] < valid[0]
    again = trainer.run.train.build_model(ModelConfig("gpt2", 1, 16, 2, 257, 16), Plan(dropout=0.2)).eval()
    ids = torch.arange(16)[None]
    assert torch.equal(again(ids), again(ids))


@pytest.mark.parametrize(
    "precision",
    [
        {"precision": "bf16-mixed"},
        {"precision": "fp16-mixed"},
        {"precision": "bf16-master"},
        {"precision": "bf16-master", "fp32_gradients": True},
        {"precision": "bf16"},
        {"precision": "bf16-mixed", "loss": "chunked"},
        {"precision": "fp16-mixed", "loss": "chunked"},
    ],
    ids=lambda plan: "-".join(map(str, plan.values())),
)
def test_half_precision_agrees_with_float32(whole, corpus, tmp_path, precision):
    """Within 1 %: 8 bits of mantissa are 0.4 % a product, and the losses are means of many."""
    train(configure(corpus, tmp_path, plan=precision))
    first = [(a[1], b[1]) for a, b in zip(losses(tmp_path), losses(whole), strict=True) if a[1]]
    assert all(a == pytest.approx(b, rel=0.01) for a, b in first)
    assert first[0][0] != first[0][1]  # it did compute in half precision


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler imports what torch deprecates
def test_torch_compile_gives_the_same_losses(whole, corpus, tmp_path):
    train(configure(corpus, tmp_path, plan={"compile": True}))
    first = [(a[1], b[1]) for a, b in zip(losses(tmp_path), losses(whole), strict=True) if a[1]]
    assert all(a == pytest.approx(b, rel=1e-3) for a, b in first)
    assert weights(tmp_path).keys() == weights(whole).keys()  # no prefix of the compiled module's


def test_accumulated_micro_batches_have_the_gradient_of_one_large_batch(corpus, tmp_path):
    """At step 1, whose weights are the same: 2 batches of 4 rows, and their 8 rows computed at once."""
    config = configure(corpus, tmp_path, steps=1, optim=OptimSection(warmup_steps=0), plan={"grad_accumulation": 2})
    train(config)
    data = trainer.run.train.Dataset(corpus, 16, 4, seed=0)
    torch.manual_seed(0)
    model = trainer.run.train.build_model(config.model.config(257), config.plan)
    batches = [data.get_batch("train", i) for i in (0, 1)]
    inputs, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert losses(tmp_path)[0][1:3] == pytest.approx((loss.item(), norm.item()), rel=1e-5)


def test_weight_decay_is_for_matrices_and_every_parameter_is_in_one_group(corpus, tmp_path):
    config = configure(corpus, tmp_path)
    model = trainer.run.train.build_model(config.model.config(257), config.plan)
    optimizer = build_optimizer(Weights(model), config.plan, config.optim, "cpu")
    names = [name for group in optimizer.param_groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for group in optimizer.param_groups:
        assert all((p.ndim >= 2) == (group["weight_decay"] > 0) for p in group["params"])


def test_the_decaying_sgd_trains(corpus, tmp_path):
    plan = {"optimizer": "sgd", "optimizer_impl": "auto", "max_grad_norm": None}
    train(configure(corpus, tmp_path, plan=plan, optim=OptimSection(lr=0.5, min_lr=0.5, warmup_steps=0)))
    values = [r["loss"] for r in metrics(tmp_path) if "loss" in r]
    assert values[-1] < values[0]


IN_BACKWARD = {"update": "in-backward", "max_grad_norm": None}


@pytest.mark.parametrize(
    ("optimizer", "plan"), [*((name, {}) for name in sorted(OPTIMIZERS)), ("adamw-8bit", IN_BACKWARD)], ids=str
)
def test_every_optimizer_trains_and_resumes_bit_for_bit(corpus, tmp_path, optimizer, plan):
    changes = {"plan": {"optimizer": optimizer, "optimizer_impl": "auto", **plan}, "save_every": 3, "keep": 9}
    changes["optim"] = OptimSection(lr=1e-2, min_lr=1e-2, warmup_steps=0)
    train(configure(corpus, tmp_path, **changes))
    values = losses(tmp_path)
    first, last = (loss for *_, loss in values if loss)  # of validation, on the same batches
    assert last < first
    for path in checkpoints(tmp_path)[1:]:
        path.unlink()
    train(configure(corpus, tmp_path, resume=True, **changes))
    assert losses(tmp_path) == values


def test_a_non_finite_loss_stops_the_run_with_the_step_and_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    real = trainer.run.passes.loss_of
    calls = iter(range(100))
    monkeypatch.setattr(
        trainer.run.passes, "loss_of", lambda *args: real(*args) * (float("nan") if next(calls) == 6 else 1.0)
    )  # calls 0 to 3 and 6 are steps, 4 and 5 the validation after step 4
    with pytest.raises(
        TrainingError, match=r"step 5: the loss is nan.*the last good checkpoint is .*step_00000003\.pt"
    ):
        train(configure(corpus, tmp_path))
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_a_diverging_run_stops_before_its_weights_are_lost(corpus, tmp_path):
    optim = OptimSection(lr=1e18, min_lr=1e18, warmup_steps=0)
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        train(configure(corpus, tmp_path, optim=optim, steps=50, save_every=50, eval_every=50))
    assert not checkpoints(tmp_path)


def test_a_full_disk_ends_the_run_with_the_older_checkpoint_intact(corpus, tmp_path, capsys):
    train(configure(corpus, tmp_path, steps=3))
    before = checkpoints(tmp_path)[0].read_bytes()
    (tmp_path / "c.json").write_text(
        json.dumps(configure(corpus, tmp_path, steps=6, resume=True, changed=True).to_dict())
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        status = main(["train", "--config", str(tmp_path / "c.json")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    error = capsys.readouterr().err
    assert "step 6: the checkpoint cannot be written" in error
    assert "File too large" in error
    assert "step_00000003.pt" in error
    assert [p.read_bytes() for p in checkpoints(tmp_path)] == [before]
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_does_not_fit_is_refused_unless_forced(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("trainer.run.announce.available_memory", lambda _: 1000)
    with pytest.raises(ConfigError, match=r"plan.batch_size = 4: the step needs .* are free; .*--force"):
        train(configure(corpus, tmp_path))
    assert not checkpoints(tmp_path)
    assert train(configure(corpus, tmp_path, force=True, steps=2)) == 0
    assert "peak of live tensors" in capsys.readouterr().out


def test_the_estimate_is_said_before_the_first_step(corpus, tmp_path, capsys):
    train(configure(corpus, tmp_path, steps=2, log_every=1))
    out = capsys.readouterr().out
    order = [out.index(word) for word in ("parameters", "TFLOP in matrix products", "peak of live", "MFU", "step 1/2")]
    assert order == sorted(order)


def test_available_memory_and_matmul_peak_are_of_this_machine():
    assert 2**28 < available_memory(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1e8 < matmul_peak(torch.device("cpu"), torch.float32, 0.05) < 1e14


def test_an_occupied_folder_and_a_missing_checkpoint_are_refused(whole, corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"holds step_00000008.pt; --resume"):
        train(configure(corpus, whole))
    with pytest.raises(ConfigError, match="resume = True: there is no checkpoint"):
        train(configure(corpus, tmp_path, resume=True))


def test_resuming_with_another_model_is_refused_by_the_field(whole, corpus):
    model = dataclasses.replace(configure(corpus, whole).model, num_heads=4)  # the same shapes
    with pytest.raises(ConfigError, match="num_heads is 2, this run's is 4"):
        train(configure(corpus, whole, model=model, resume=True))


def test_resuming_with_other_settings_says_which_and_asks(corpus, tmp_path):
    config = configure(corpus, tmp_path, steps=3)
    train(config)
    other = dataclasses.replace(config, steps=5, seed=7, optim=OptimSection(lr=1e-3, warmup_steps=2), resume=True)
    with pytest.raises(ConfigError) as refused:
        train(other)
    for said in ("steps = 5 (there 3)", "seed = 7 (there 0)", "optim.lr = 0.001 (there 0.01)", "--changed"):
        assert said in str(refused.value)
    assert str(refused.value).count("(there") == 3
    assert train(dataclasses.replace(other, changed=True)) == 0
    assert checkpoints(tmp_path)[-1].name == "step_00000005.pt"


def test_two_runs_do_not_share_a_folder(corpus, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX); f.write('123'); f.flush();"
    hold += " print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="process 123 trains there"):
            train(configure(corpus, tmp_path))
        other.kill()  # however it ends, the lock goes with it
    assert train(configure(corpus, tmp_path, steps=2)) == 0


def test_weights_that_are_not_finite_are_no_good_checkpoint(corpus, tmp_path, monkeypatch):
    """The loss and the gradient of the last step are finite; what the update made is not."""

    def spoil(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.fill_(math.inf)

    config = configure(corpus, tmp_path, steps=6, save_every=3, eval_every=99)
    before = AdamW.step
    calls = []

    def step(self, *args):
        calls.append(1)
        return before(self, *args) if len(calls) < 6 else spoil(self)

    monkeypatch.setattr(AdamW, "step", step)
    monkeypatch.setattr("trainer.run.train.Training.validate", lambda _: 1.0)
    with pytest.raises(TrainingError, match=r"step 6: a weight is not finite; the last good checkpoint is .*00000003"):
        train(config)
    assert [p.name for p in checkpoints(tmp_path)] == ["step_00000003.pt"]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("step", "3", "run.step is a str, must be a int"),
        ("random", None, "run.random is a NoneType"),
        ("random", {"cpu": torch.zeros(3)}, "rows of bytes"),
        ("random", {"cpu": torch.zeros(3, dtype=torch.uint8)}, "a generator.s state has 5056"),
        ("model", [], "run.model is a list"),
        ("config", 1, "run.config is a int"),
    ],
)
def test_a_checkpoint_s_own_part_of_the_run_is_checked(corpus, tmp_path, field, value, said):
    config = configure(corpus, tmp_path, steps=2)
    train(config)
    path = checkpoints(tmp_path)[-1]
    content = read_checkpoint(path)
    content["run"][field] = value
    torch.save(content, path)
    with pytest.raises(ConfigError, match=said):
        train(dataclasses.replace(config, resume=True))


def spoiled(content, *at, value):
    """`content` with another value at a place; none: without it."""
    *way, last = at
    for key in way:
        content = content[key]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [
        # Of a shape that the kernel does not expect: it would read beyond the tensor's end.
        (("optimizer", "state", 0, "exp_avg"), torch.zeros(3), "exp_avg of parameter 0 has the shape .3,."),
        (("optimizer", "state", 0, "exp_avg"), None, "of parameter 1 it keeps exp_avg"),
        (("optimizer", "state", 0, "exp_avg"), [], "exp_avg of parameter 0 is a list"),
        (("optimizer", "state", 0, "step"), -1, "step of parameter 0 is -1"),
        (("optimizer", "state", 0, "step"), 1e308, "step of parameter 0 is 1e.308"),
        (("optimizer", "state", 0), torch.zeros(3), "that of parameter 0 is a Tensor"),
        (("optimizer", "state", 99), {}, "of more parameters"),
        (("optimizer", "param_groups", 0, "betas"), "x", "betas of group 0 is 'x'"),
        (("optimizer", "param_groups", 0, "params", 0), 7, "group 0 is not of the same parameters"),
        (("optimizer", "param_groups"), [], "it has 0 groups"),
        (("run", "model", "d_model"), torch.zeros(3), "run.model holds more than plain values"),
        (("run", "model", "depth"), 3, "run.model has a field 'depth'"),
        (("run", "model", "num_heads"), None, "run.model has no num_heads"),
        (("run",), 0, "run.step is a NoneType"),
        (("run", "random", "cuda"), True, "run.random must hold"),
        (("model", "final_norm.weight"), torch.full((16,), math.nan), "final_norm.weight is not finite"),
        (("model", "final_norm.weight"), torch.zeros(16, dtype=torch.int64), "final_norm.weight is int64"),
    ],
    ids=str,
)
def test_what_a_checkpoint_holds_is_looked_through_before_it_is_used(whole, corpus, tmp_path, at, value, said):
    """With the checksums of an honest file: each change is one sentence."""
    content = read_checkpoint(checkpoints(whole)[-1])
    spoiled(content, *at, value=value)
    torch.save(content, tmp_path / "step_00000008.pt")
    with pytest.raises(ConfigError, match=said) as refused:
        train(configure(corpus, tmp_path, steps=9, resume=True, changed=True))
    assert "\n" not in str(refused.value)


def test_changed_settings_of_the_optimizer_are_used(whole, corpus, tmp_path, monkeypatch):
    shutil.copy(checkpoints(whole)[-1], tmp_path)
    seen = []
    before = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self: (seen.append(self.param_groups[0]["betas"]), before(self))[1])
    optim = OptimSection(lr=1e-2, warmup_steps=2, betas=(0.5, 0.6))
    assert train(configure(corpus, tmp_path, steps=9, optim=optim, resume=True, changed=True)) == 0
    assert seen == [(0.5, 0.6)]


def test_leftovers_of_a_killed_save_are_removed(corpus, tmp_path):
    (tmp_path / "step_00000001.pt.part").touch()
    (tmp_path / "step_00000001.part").mkdir()
    train(configure(corpus, tmp_path, steps=2))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("size", "B", "n"), [(1, 3, 1), (2, 4, 1), (2, 4, 2), (4, 4, 2), (3, 5, 3), (2, 3, 4)])
def test_processes_share_every_row_of_every_batch_once(corpus, tmp_path, size, B, n):
    config = configure(corpus, tmp_path, plan={"batch_size": B, "grad_accumulation": n}, eval_batches=6)

    class Place:
        def __init__(self, rank):
            self.rank, self.size = rank, size

    rows, valid = [], []
    for rank in range(size):
        share = Share.of(config, Place(rank))
        for step in (0, 5):
            for i in range(share.plan.grad_accumulation):
                rows += [(share.index(step, i), row) for row in range(B)[share.rows]]
        valid += [(index, row) for index in share.batches(6) for row in range(B)[share.rows]]
        assert share.plan.batch_size * share.plan.grad_accumulation * size == B * n
    assert sorted(rows) == [(step * n + i, row) for step in (0, 5) for i in range(n) for row in range(B)]
    assert sorted(valid) == [(index, row) for index in range(6) for row in range(B)]


def test_what_cannot_be_shared_is_refused(corpus, tmp_path):
    with pytest.raises(ConfigError, match=r"plan\.batch_size = 4: must be divisible by the 3 processes"):
        Share.of(configure(corpus, tmp_path), type("Place", (), {"rank": 0, "size": 3}))


def test_options_override_the_file_which_overrides_the_defaults(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("steps = 500\n[model]\nd_model = 64\n[plan]\nbatch_size = 3\n[optim]\nlr = 1\nbetas = [0.8, 0.9]\n")
    config = parse_train(["--config", str(file), "--plan.batch-size", "7", "--model.num-layers", "2", "--resume"])
    assert (config.steps, config.model.d_model, config.plan.batch_size) == (500, 64, 7)
    assert (config.model.num_layers, config.resume, config.optim.betas, config.optim.lr) == (2, True, (0.8, 0.9), 1.0)
    assert config.model.context_length == TrainConfig().model.context_length


def test_every_bundled_configuration_loads_by_name():
    files = list(CONFIGS.glob("*.toml"))
    assert files
    for file in files:
        assert load_config(file.stem) == load_config(str(file))
        assert load_config(file.stem).steps == tomllib.loads(file.read_text())["steps"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepps = 3", "key = 'stepps': did you mean steps"),
        ("[plan]\nbatch = 3", "plan.key = 'batch'"),
        ("[plan]\nbatch_size = 0", "batch_size = 0"),
        ("[plan]\nprecision = 'fp31'", "precision = 'fp31'"),
        ("steps = '3'", "steps = '3': must be int"),
        ("steps = true", "steps = True: must be int"),
        ("plan = 3", "plan = 3: must be a table"),
        ("[optim]\nbetas = [1.0]", r"optim.betas = \[1.0\]"),
        ("steps = 0", "steps = 0: must be"),
        ("seed = -1", "seed = -1"),
        ("device = 'tpu'", "device = 'tpu'"),
        ("sharding = 'zero'", "sharding = 'zero'"),
        ("[plan]\ndata_parallel = 2", "torchrun says how many"),
        ("steps = 5", "optim.warmup_steps = 100: longer than the run"),
        ("steps = ", "not TOML"),
    ],
)
def test_bad_files_are_refused_with_the_field_the_value_and_what_is_allowed(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(str(tmp_path / "c.toml"))


def test_a_llama_gets_a_feed_forward_of_the_usual_size():
    assert ModelSection("llama", d_model=256).config(100).d_ff == 704
    assert ModelSection("llama", d_model=4096).config(100).d_ff == 10944
    with pytest.raises(ConfigError, match="vocab_size"):
        ModelSection().config(None)


@pytest.mark.parametrize(
    ("family", "weight"), [("qwen3", "attention.q_norm.weight"), ("mixtral", "ffn.experts.gate_up")]
)
def test_a_model_of_any_family_is_trained_from_its_configuration(family, weight, corpus, tmp_path, capsys):
    rows = (Path(__file__).parents[1] / "data/hf/tiny.jsonl").read_text().splitlines()
    given = next(row["config"] for row in map(json.loads, rows) if row["family"] == family)
    like = tmp_path / "config.json"
    like.write_text(json.dumps(given))
    config = configure(corpus, tmp_path / "run", model=ModelSection(context_length=16, like=str(like)))
    train(config)
    validation = [x for *_, x in losses(config.out) if x is not None]
    assert validation[-1] < validation[0]
    train(dataclasses.replace(config, steps=10, resume=True, changed=True))
    assert f"blocks.3.{weight}" in load_file(config.out / "model.safetensors")
    main(["generate", str(config.out), "--prompt", "def", "--max-new-tokens", "4"])
    assert "def" in capsys.readouterr().out


def test_what_a_configuration_says_is_not_said_twice():
    m = ModelSection(context_length=64, like="gpt2-xl").config(100)
    assert (m.num_layers, m.context_length, m.vocab_size) == (48, 64, 100)
    with pytest.raises(ConfigError, match=r"model.d_model = 32: model.like = 'gpt2-xl' says it already"):
        ModelSection(d_model=32, like="gpt2-xl").config(100)


def one_sentence(capsys):
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_the_command_line_reports_errors_in_one_sentence(whole, corpus, tmp_path, capsys):
    broken = tmp_path / "step_00000001.pt"
    broken.write_bytes(b"no")
    for arguments, message in (
        (["train", "--data", str(tmp_path)], "train.bin: no such file"),
        (["train", "--config", str(tmp_path / "missing.toml")], "missing.toml"),
        (["train", "--config", "smal"], "did you mean small"),
        (["train", "--data", str(corpus), "--out", str(whole)], "--resume"),
        (["train", "--data", str(corpus), "--out", str(tmp_path), "--resume"], "no checkpoint, or a truncated one"),
        (["prepare", str(tmp_path / "missing"), "--out", str(tmp_path)], "no such file"),
        (["generate", str(tmp_path / "missing.pt")], "missing.pt"),
        (["generate", str(corpus)], "no checkpoint in it"),
        (["curve", str(corpus)], "metrics.jsonl: no such file"),
        (["generate", str(broken)], "truncated"),
        (["generate", str(whole), "--temperature", "-1"], "temperature = -1.0"),
        (["export", str(whole), str(tmp_path / "no" / "where")], "where"),
    ):
        assert main(arguments) == 2, arguments
        assert message in one_sentence(capsys)


def test_the_command_line_has_help_and_refuses_what_it_does_not_know(capsys):
    assert main(["--help"]) == 0
    assert "prepare" in capsys.readouterr().out
    for arguments in ([], ["trian"]):
        assert main(arguments) == 2
    for command in ("prepare", "train", "curve", "generate", "export"):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--plan.batch-size", "0"])
    assert "batch_size = 0" in capsys.readouterr().err


def test_generated_text_continues_the_prompt(whole, tmp_path, capsys):
    assert main(["generate", str(whole), "--prompt", "import ", "--max-new-tokens", "20", "--seed", "3"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("import ")
    assert (
        main(["generate", str(checkpoints(whole)[-1]), "--prompt", "import ", "--max-new-tokens", "20", "--seed", "3"])
        == 0
    )
    assert capsys.readouterr().out == text
    assert main(["generate", str(whole), "--max-new-tokens", "5", "--samples", "2"]) == 0
    assert main(["export", str(whole), str(tmp_path / "w.safetensors")]) == 0
    assert same(load_file(tmp_path / "w.safetensors"), load_file(whole / "model.safetensors"))


def test_the_curve_shows_every_validation_and_the_unigram_loss(whole, corpus, tmp_path, capsys):
    assert main(["curve", str(whole)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", "seconds", "valid", "loss"]
    expected = [(str(r["step"]), r["valid_loss"]) for r in metrics(whole) if "valid_loss" in r]
    expected.append(("unigram", json.loads((corpus / "manifest.json").read_text())["unigram_loss"]))
    shown = [line.split() for line in lines]
    assert [(words[0], float(words[2])) for words in shown] == [(name, round(loss, 4)) for name, loss in expected]
    per_character = max(loss for _, loss in expected) / WIDTH
    assert [len(words[3]) for words in shown] == [round(loss / per_character) for _, loss in expected]

    (tmp_path / "config.json").write_bytes((whole / "config.json").read_bytes())
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "valid_loss": NaN}\n{"step": 2, "valid_lo')
    assert main(["curve", str(tmp_path)]) == 0  # not finite: no bar; cut short: not shown
    assert capsys.readouterr().out.splitlines()[1].split() == ["1", "0", "nan"]
    (tmp_path / "metrics.jsonl").write_text("")
    assert main(["curve", str(tmp_path)]) == 2
    assert "no validation in it yet" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("metrics.jsonl", "x\n", "metrics.jsonl, line 1: not JSON"),
        ("metrics.jsonl", '{"step": 1, "valid_loss": "x"}\n', "must be an object of numbers"),
        ("metrics.jsonl", '{"valid_loss": 1}\n', "a validation without its step"),
        ("config.json", "{", "config.json: not JSON"),
        ("config.json", '{"data": 3}', "data = 3: must be a folder"),
    ],
)
def test_a_curve_of_altered_files_is_one_sentence(whole, tmp_path, capsys, file, content, said):
    for name in ("metrics.jsonl", "config.json"):
        shutil.copy(whole / name, tmp_path)
    (tmp_path / file).write_text(content)
    assert main(["curve", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--samples", "0"], "samples = 0"),
        (["--seed", str(2**70)], f"seed = {2**70}"),
        (["--prompt", "\udcff"], "must be text in UTF-8"),
    ],
)
def test_what_cannot_be_generated_is_one_sentence(whole, capsys, options, said):
    with pytest.raises(SystemExit):
        main(["generate", str(whole), *options])
    assert said in capsys.readouterr().err


def test_a_broken_tokenizer_is_one_sentence(whole, tmp_path, capsys):
    shutil.copy(checkpoints(whole)[-1], tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert main(["generate", str(tmp_path)]) == 2
    assert "tokenizer.json: no tokenizer" in capsys.readouterr().err


def test_tensorboard_is_an_extra(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"tensorboard = True: not installed; pip install"):
        train(configure(corpus, tmp_path, tensorboard=True))


def test_tensorboard_gets_what_the_metrics_get(corpus, tmp_path, monkeypatch):
    class Writer:
        def __init__(self, folder, purge_step):
            self.scalars = []
            written.append(self)
            assert folder == tmp_path / "tensorboard"
            assert purge_step == 1

        def add_scalar(self, name, value, step):
            self.scalars.append((step, name, value))

        def close(self):
            self.scalars.sort()

    written = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer}))
    train(configure(corpus, tmp_path, tensorboard=True))
    records = metrics(tmp_path)
    assert written[0].scalars == sorted((r["step"], k, v) for r in records for k, v in r.items() if k != "step")


def test_on_a_terminal_one_line_is_redrawn(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "trainer.run.progress.Console", lambda **options: Console(force_terminal=True, width=160, **options)
    )
    train(configure(corpus, tmp_path))
    out = capsys.readouterr().out
    assert "\x1b[2K" in out  # erases a line
    assert "step 8/8" in out
    assert "tokens/s" in out
    assert "left" in out


def test_durations_read_as_clocks_do():
    assert [duration(s) for s in (0.4, 59.6, 3661, 360_000)] == ["0:00:00", "0:01:00", "1:01:01", "100:00:00"]


def test_a_small_run_ends_well_under_the_unigram_loss_and_writes_text(corpus, tmp_path, capsys):
    """The real thing: real text, some seconds of training, far from what token frequencies alone can do."""
    model = ModelSection("llama", num_layers=2, d_model=64, num_heads=2, context_length=64)
    optim = OptimSection(lr=3e-3, min_lr=3e-4, warmup_steps=10)
    train(configure(corpus, tmp_path, model=model, optim=optim, steps=150, eval_every=150, plan={"batch_size": 8}))
    unigram = json.loads((corpus / "manifest.json").read_text())["unigram_loss"]
    valid = metrics(tmp_path)[-1]["valid_loss"]
    assert unigram > 3
    assert valid < 0.85 * unigram
    assert main(["generate", str(tmp_path), "--prompt", "def ", "--max-new-tokens", "40"]) == 0
    assert len(capsys.readouterr().out) > 40


def test_adapters_train_beside_a_finished_runs_weights(whole, corpus, tmp_path):
    plan = {"adapter": "lora", "adapter_rank": 2}
    run = {"plan": plan, "weights": whole / "model.safetensors"}
    assert train(configure(corpus, tmp_path / "a", **run)) == 0
    first = next(r["loss"] for r in metrics(tmp_path / "a") if "loss" in r)
    assert first < metrics(whole)[0]["loss"]  # it starts from what that run has learned
    files = {p.name for p in (tmp_path / "a").iterdir()}
    assert "adapters.safetensors" in files
    assert "model.safetensors" not in files
    before, after = weights(whole), weights(tmp_path / "a")
    frozen = [name for name in after if not name.endswith((".a.weight", ".b.weight"))]
    assert all(torch.equal(after[name], before[name.replace(".base.", ".")]) for name in frozen)
    moved = [name for name in after if name.endswith(".b.weight")]
    assert len(moved) == 4
    assert all(after[name].abs().sum() > 0 for name in moved)


@pytest.mark.parametrize("parts", [{"trained": "norms"}, {"frozen": "embedding"}], ids=str)
def test_what_is_frozen_stays(corpus, tmp_path, parts):
    train(configure(corpus, tmp_path / "a", plan=parts))
    torch.manual_seed(0)
    start = trainer.run.train.build_model(configure(corpus, tmp_path).model.config(257), Plan(**parts)).state_dict()
    for name, x in weights(tmp_path / "a").items():
        held = "norm" not in name if "trained" in parts else name.startswith(("embedding", "positions", "head"))
        assert torch.equal(x, start[name]) == held, name


class Full(io.StringIO):
    def write(self, _):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("stdout", "status", "said"), [(Full(), 1, "No space left on device"), (None, 0, "")])
def test_output_that_cannot_be_written_is_one_line_or_none(whole, monkeypatch, capsys, stdout, status, said):
    """To a full device, and to a closed descriptor, which Python makes None."""
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["curve", str(whole)]) == status
    sys.stdout.close()  # of a closed one that of nobody
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == bool(said)
