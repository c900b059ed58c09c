"""What is too much is refused in a sentence and at once; what is allowed is answered in seconds; output that ends."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import estimator as est
from estimator.answers.estimates import max_batch_size
from estimator.answers.request import Request
from estimator.answers.sweeps import spaced, sweep
from estimator.describe.checks import BLOCKS, POINTS, ConfigError, TooLargeError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.settings import choices, limits
from estimator.show import commands

ROOT = Path(__file__).parents[2]
LONG = "x" * 5000
DRAWS = int(os.environ.get("FUZZ_DRAWS", "200"))  # random command lines; 2,000 by hand


@pytest.fixture(autouse=True)
def imported():
    """What is timed here is the answer, not the first import of sympy."""
    est.account(est.preset("gpt2"), Plan())


def run(capsys, *argv):
    try:
        status = commands.main(argv)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--d-model", "1000000000000"], "d_model = 1000000000000: must be at most 1,000,000"),
        (["--num-layers", "1000000000"], "num_layers = 1000000000: must be at most 1,000"),
        (["--batch-size", "9" * 30], f"batch_size = {'9' * 30}: must be at most 1,000,000,000"),
        (["--batch-size", "9" * 5000], "--batch-size: '99999"),
        (["--num-layers", "1000", "--checkpointing", "block", "--checkpoint-every", "60"], "checkpoint_every = 60: of"),
        (["--context-length", "1000000000"], "seq_len = 1000000000: with the other sizes"),
        (["--context-length", "1000000000", "--batch-size", "1000000000"], "batch_size = 1000000000: with the other"),
        (["--attention", LONG], "attention = 'xxx"),
        (["--gpu", LONG], "accelerator = 'xxx"),
        (["--gpu", f"{LONG}.toml"], "profile 'xxx"),
        ([f"--{LONG}"], "unrecognized arguments: --xxx"),
        (["--mfu", "inf"], "mfu = inf: must be a finite number"),
        (["--mfu", "nan"], "mfu = nan: must be a finite number"),
        (["--mfu", "1e-300"], "mfu = 1e-300: must be a finite number of at least 1e-06 and at most 1"),
        (["--dropout", "inf"], "dropout = inf: must be a finite number of at least 0 and below 1"),
        (["--dropout", "nan"], "dropout = nan"),
        (["--max-grad-norm", "inf"], "max_grad_norm = inf: must be a finite number above 0 and at most 1e+38"),
        (["--max-grad-norm", "nan"], "max_grad_norm = nan"),
        (["--steps", "9" * 20], f"steps = {'9' * 20}: must be at most 1,000,000,000,000"),
        (["--count", "9" * 20], f"count = {'9' * 20}: must be at most 1,000,000,000"),
    ],
)
def test_too_much_is_one_short_sentence_at_once(capsys, argv, words):
    start = time.perf_counter()
    status, _, err = run(capsys, "gpt2", *argv)
    assert time.perf_counter() - start < 1
    assert status == 2
    error = err.splitlines()[-1]
    assert error.startswith("estimate: error: ")
    assert words in error
    assert "x" * 251 not in err
    assert "9" * 61 not in err


def test_long_names_are_echoed_shortened(capsys):
    for name in (LONG, f"{LONG}.json"):
        status, _, err = run(capsys, name)
        assert status == 2
        assert "xxx..." in err
        assert "x" * 251 not in err


def test_the_limits_themselves_are_answered():
    """Each size at its limit, the others a toy's: an answer, or that the figures take more than 64 bits."""
    toy = {"family": "llama", "num_layers": 2, "d_model": 8, "num_heads": 2, "vocab_size": 16, "context_length": 8}
    toy |= {"d_ff": 8, "head_dim": 4, "num_kv_heads": 2}
    for f in fields(ModelConfig):
        if f.name in limits(ModelConfig) and f.name in (*toy, "sliding_window"):
            most = limits(ModelConfig)[f.name]
            others = {"num_kv_heads": 2} if f.name == "num_heads" else {"num_heads": most, "num_kv_heads": most}
            m = ModelConfig(**toy | (others if f.name in ("num_heads", "num_kv_heads") else {}) | {f.name: most})
            if f.name == "num_layers":
                assert est.account(m, Plan()).evaluate(m, Plan()).peak_bytes > 0
                continue
            r = est.estimate(m, Plan(seq_len=8))
            assert 0 < r.memory.peak < 2**63
            with pytest.raises(ConfigError, match=f"{f.name} = {most + 1}: must be at most {most:,}"):
                m.replace(**{f.name: most + 1})


def test_the_work_is_bounded_by_what_it_costs():
    m = est.preset("gpt2")
    p = Plan(checkpointing="block", checkpoint_every=BLOCKS // 4)
    est.account(m, p.replace(checkpoint_every=10**9))  # nothing repeats: the twelve blocks, and no more
    with pytest.raises(ConfigError, match="checkpoint_every = 60: of 500 layers 200 would be run one by one"):
        est.account(m.replace(num_layers=500), p.replace(checkpoint_every=60))
    peak = est.account(m, p.replace(checkpoint_every=3)).lambdify()
    with pytest.raises(ConfigError, match="blocks to be run one by one"):
        est.account(m, p.replace(checkpoint_every=12)).lambdify()(B=2, T=64, L=np.arange(1, 99), d=64, h=2, V=99)
    with pytest.raises(ConfigError, match="points = 10000000000: must be at most"):
        peak(B=np.ones((10**5, 1), int), T=np.ones(10**5, int), L=4, d=64, h=2, V=99)
    for letters, words in (
        ({"B": 10**30}, "B = 1000000000000000000000000000000: must be integers"),
        ({"B": float("inf")}, "B = inf: must be integers"),
        ({"L": 10**6}, "L = 1000000: must be at most 1,000"),
        ({"B": 10**9, "T": 10**9}, "with the other sizes peak_bytes would be"),
    ):
        with pytest.raises(ConfigError, match=words):
            peak(**{"B": 2, "T": 64, "L": 4, "d": 64, "h": 2, "V": 99} | letters)
    request = Request("gpt2", m, Plan(), "a100-80gb-sxm")
    for axes, words in (
        ({"batch_size": [10**30]}, "batch_size = "),
        ({"batch_size": [10**10]}, "batch_size = 10000000000: must be at most"),
        ({"batch_size": [0, 1]}, "batch_size = 0: must be an integer of at least 1"),
        ({"batch_size": np.arange(1, 10**3), "seq_len": np.arange(1, 10**3)}, "points = 998001: must be at most"),
    ):
        with pytest.raises(ConfigError, match=words):
            sweep(request, axes)
    with pytest.raises(ConfigError, match="points = 1000000000"):
        spaced(1, 10**9, 10**9)
    assert POINTS >= 64 * 64


def test_the_largest_micro_batch_of_next_to_nothing_is_the_limit():
    m = ModelConfig("gpt2", 1, 1, 1, 1, 1)
    assert max_batch_size(m, Plan(), 1e15) == limits(Plan)["batch_size"]
    for wrong in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="bytes = "):
            max_batch_size(m, Plan(), wrong)
    with pytest.raises(TooLargeError):
        max_batch_size(est.preset("gpt2").replace(context_length=10**9), Plan())


VALUES = ("0", "1", "2", "3", "7", "-1", "1e9", "1000000000", "10" * 9, "9" * 25, "nan", "inf", "1e400", "", "é", "[/]")
VALUES += ("naive", LONG, "\udcff", "0.5", "None", *(x for names in choices(Plan).values() for x in names))
CHOICES = choices(Plan) | {"gpu": ("h100", "rtx-4090-24gb", "nothing")}
NUMBERS = {"count": "2", "mfu": "0.4", "steps": "10", "global_batch_size": "64", "batch_size": "2", "seq_len": "33"}
NUMBERS |= {"num_layers": "5", "grad_accumulation": "3", "context_length": "2048", "vocab_size": "1001"}
FLAGS = ("--json", "--max-batch", "--formulas", "--compile", "--no-tie-embeddings", "--fp32-gradients", "--help")


def command_line(draw):
    """A model and some options: some mean something, few of them a recipe of its own (which takes long); others not."""
    meant = CHOICES | {name: (value,) for name, value in NUMBERS.items()}
    others = [f.name for cls in (Plan, ModelConfig) for f in fields(cls)]
    if draw.random() < 0.3:
        words = ["gpt2"]
        names = draw.sample(sorted(NUMBERS), draw.randint(0, 2)) + draw.sample(sorted(CHOICES), draw.random() < 0.2)
        options = [(name, draw.choice(meant[name])) for name in names]
    else:
        words = [draw.choice(("gpt2", "gpt2", "gpt2", "gpt3", *VALUES))]
        options = [
            (name, draw.choice(VALUES)) for name in draw.sample([*meant, *others, "nothing"], draw.randint(0, 3))
        ]
    words += [word for name, value in options for word in (f"--{name.replace('_', '-')}", value)]
    return [*words, draw.choice(("--json", "--json", "--json", *FLAGS))]


def test_any_command_line_is_answered_or_refused_in_a_sentence(capsys):
    """At random, always the same: status 0 or 2, no traceback, JSON that any reader reads, and none takes long."""
    draw, statuses = random.Random(1), []

    def refuse(word):
        raise AssertionError(f"{word} in JSON")

    for _ in range(DRAWS):
        argv = command_line(draw)
        start = time.process_time()
        status, out, err = run(capsys, *argv)
        assert time.process_time() - start < 5, argv
        statuses.append(status)
        assert status in (0, 2), argv
        assert "Traceback" not in out + err, argv
        assert (status == 2) == bool(err), argv
        assert "x" * 251 not in err
        if status == 0 and "--json" in argv and not {"--help", "--max-batch"} & set(argv):
            json.loads(out, parse_constant=refuse)
    assert 0.15 < statuses.count(0) / DRAWS < 0.85  # both are tried


def shell(line, **environment):
    """A command line, in which estimate is this one."""
    command = f"{sys.executable} -m estimator"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    line = line.replace("estimate", command)
    return subprocess.run(["bash", "-c", f"set -o pipefail; {line}"], env=env, capture_output=True, text=True)  # noqa: PLW1510


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("argv", ["gpt2", "gpt2 --json", "--help", "--list", "gpt2 --formulas"])
def test_output_that_cannot_be_written_is_one_line(argv):
    done = shell(f"estimate {argv} > /dev/full")
    assert done.returncode == 1
    assert done.stderr == "estimate: error: the output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("argv", ["gpt2", "gpt2 --json", "--help"])
@pytest.mark.parametrize("end", [">&-", "| head -c 5", "| true"])
def test_a_reader_that_has_gone_is_no_error(argv, end):
    done = shell(f"estimate {argv} {end}")
    assert (done.returncode, done.stderr) == (0, "")


def test_columns_of_nothing_are_a_terminals():
    for argv in ("gpt2", "--help"):
        assert shell(f"estimate {argv}", COLUMNS="0").stdout == shell(f"estimate {argv}", COLUMNS="80").stdout
