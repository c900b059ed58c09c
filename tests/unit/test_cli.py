"""The command line: what it prints, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields

import pytest

import estimator as est
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.show import cli, commands
from estimator.show.formatting import dollars, duration, prefixed


def run(capsys, *argv):
    try:
        status = commands.main(argv)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    return status, out.out, out.err


def test_json_is_the_librarys_answer(capsys):
    status, out, _ = run(
        capsys, "gpt2-xl", "--gpu", "a100-80gb-sxm", "--batch-size", "4", "--attention", "sdpa", "--json"
    )
    r = est.estimate("gpt2-xl", Plan(batch_size=4, attention="sdpa"), "a100-80gb-sxm")
    assert status == 0
    assert json.loads(out) == json.loads(json.dumps(r.to_dict()))


def test_the_tables_say_the_verdict_and_the_figures(capsys):
    status, out, _ = run(capsys, "gpt2-xl", "--batch-size", "1", "--mfu", "0.5", "--steps", "400000")
    assert status == 0
    flat = " ".join(out.split())
    for words in (
        "Fits: needs",
        "1,557,611,200",
        "3,506,703,564,800",
        "the largest micro-batch is",
        "The peak is in the",
    ):
        assert words in flat
    _, out, _ = run(capsys, "llama-2-70b")
    assert "Does not fit" in " ".join(out.split())
    assert "not even one sequence fits" in " ".join(out.split())


def test_the_answer_is_in_a_line_before_all_else(capsys):
    """With tokens: the steps that they take, and the dollars and kilowatt-hours of the run."""
    argv = ["gpt2", "--batch-size", "8", "--count", "8", "--global-batch-size", "64", "--tokens", "1e9"]
    _, out, _ = run(capsys, *argv, "--json")
    steps = json.loads(out)["time"]["steps"]
    assert steps == -(-(10**9) // (64 * 1024))
    _, out, _ = run(capsys, *argv)
    r = est.estimate("gpt2", Plan(batch_size=8), count=8, global_batch_size=64, steps=steps)
    spent = est.cost(r.accelerator, r.time.seconds, 8)
    lines = " ".join(out.split())
    glance = lines[lines.index("fits: ") :].split(" Fits: ")[0]
    assert f"| {dollars(spent.dollars.median)} |" in glance
    assert prefixed(spent.kilowatt_hours * 1e3, "Wh") in glance
    assert duration(r.time.seconds) in glance
    _, out, _ = run(capsys, *argv, "--price", "0.5")
    assert f"| {dollars(r.time.hours * 8 * 0.5)} |" in " ".join(out.split())
    status, _, error = run(capsys, *argv, "--steps", "3")
    assert status == 2
    assert "tokens = 1e+09: steps = 3 is given too" in error
    _, out, _ = run(capsys, "llama-2-70b", "--steps", "3")
    assert "if it fitted" in " ".join(out.split())


def test_formulas_and_largest_batch(capsys):
    _, out, _ = run(capsys, "gpt2", "--formulas", "--batch-size", "2")
    assert "peak_bytes = the greatest of" in out
    assert "d: d_model" in out
    _, out, _ = run(capsys, "gpt2-xl", "--max-batch")
    assert int(out) == est.max_batch_size("gpt2-xl", Plan(), "a100-80gb-sxm")


def test_sizes_can_be_changed_and_files_read(capsys, tmp_path):
    _, out, _ = run(capsys, "gpt2", "--num-layers", "3", "--no-tie-embeddings", "--json")
    assert json.loads(out)["model"]["num_layers"] == 3
    assert json.loads(out)["model"]["tie_embeddings"] is False
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2}))
    _, out, _ = run(capsys, str(path), "--json")
    assert json.loads(out)["model"]["num_layers"] == 2


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["gpt2xl-huge"], "model = 'gpt2xl-huge'"),
        (["gpt2", "--gpu", "H100"], "H100"),
        (["gpt2", "--batch-size", "0"], "batch_size = 0: must be an integer of at least 1"),
        (["gpt2", "--attention", "flsh"], "attention = 'flsh'"),
        (["gpt2", "--seq-len", "4096"], "the model holds 1024 positions"),
        (["gpt2", "--num-heads", "7"], "must be divisible by num_heads (7)"),
        (["gpt2", "--mfu", "2"], "mfu = 2.0"),
        (["gpt2", "--batch-size", "three"], "--batch-size"),
        (["gpt2", "--unknown"], "--unknown"),
        ([], "model"),
        (["no/such/config.json"], "config.json"),
    ],
)
def test_bad_input_is_one_clear_error_and_status_2(capsys, argv, words):
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert words in err
    assert "Traceback" not in err + out


def test_every_field_is_an_option_with_help():
    text = cli.parser().format_help()
    for f in (*fields(Plan), *fields(ModelConfig)):
        if f.name not in ("family", "parts", "pattern"):
            assert f"--{f.name.replace('_', '-')}" in text
    assert all(action.help for action in cli.parser()._actions)


def test_names_can_be_listed(capsys):
    _, out, _ = run(capsys, "--list")
    assert "gpt2-xl" in out
    assert "a100-80gb-sxm" in out


def loaded_by(code, *modules):
    code += f"; import sys; print([m for m in {modules} if m in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_library_is_light():
    assert loaded_by("import estimator", "torch", "streamlit", "pandas", "sympy") == "[]"
    code = "import estimator as e; e.estimate('gpt2', e.Plan(), 'a100-80gb-sxm', mfu=0.5); e.textbook('gpt2')"
    assert loaded_by(code, "torch", "streamlit", "pandas") == "[]"


def test_public_names_resolve():
    assert set(est.__all__) <= set(dir(est)) | set(est._HOME)
    for name in est.__all__:
        assert getattr(est, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        est.nothing  # noqa: B018 - the access is what is tested
