"""The library on every Python that is here, and on one that strips docstrings and asserts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import settings

ROOT = Path(__file__).parents[2]
COMMAND = ("-m", "estimator", "gpt2", "--json", "--checkpointing", "block", "--sharding", "zero3")
COMMAND += ("--count", "3")
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def run(python, *argv):
    """The command's output; estimator is imported from here, whatever is installed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    return subprocess.run([python, *argv], capture_output=True, text=True, env=environment, cwd=ROOT, check=True).stdout


def alike(found, expected):
    """Equal, save for the last digits of what is no integer: since 3.12 `sum` adds floats more exactly."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(alike(found[key], x) for key, x in expected.items())
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(alike, found, expected))
    close = isinstance(expected, float) and isinstance(found, float) and abs(found - expected) <= 1e-13 * abs(expected)
    return close or (type(found) is type(expected) and found == expected)


@pytest.fixture(scope="module")
def plain():
    return json.loads(run(sys.executable, *COMMAND))


@pytest.mark.parametrize("cls", [ModelConfig, Plan, Run])
def test_each_field_is_explained_once(cls):
    assert list(settings(cls)) == [f.name for f in fields(cls)]
    for setting in settings(cls).values():
        for said in (setting.meaning, *setting.choices.values(), setting.optional):
            assert said == " ".join(said.split())
        assert setting.meaning.endswith(".")


def test_without_docstrings_and_asserts_the_command_says_the_same(plain):
    assert json.loads(run(sys.executable, "-OO", *COMMAND)) == plain
    stripped, whole = (run(sys.executable, *flags, *COMMAND[:3], "--help", "all") for flags in (("-OO",), ()))
    assert stripped == whole
    assert "sequences in one micro-batch" in whole


def test_nothing_that_is_printed_is_a_docstring():
    """Docstrings are for readers of the code: 3.13 strips their indentation, and -OO the whole of them."""
    readers = [
        str(path.relative_to(ROOT))
        for folder in ("estimator", "trainer", "app_pages")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"__doc__|getdoc", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["trainer/run/help.py"]  # which puts them back


def test_without_docstrings_the_trainers_help_says_the_same():
    for command in ("prepare", "train", "curve", "generate", "export"):
        stripped, whole = (run(sys.executable, *flags, "-m", "trainer", command, "--help") for flags in (("-OO",), ()))
        assert stripped == whole
    assert "a checkpoint, or a run's folder, whose newest is taken" in whole


def interpreter(version):
    """A Python of that version with the core's dependencies, or why there is none."""
    folder = os.environ.get("ESTIMATOR_PYTHONS")  # where `uv venv DIR/3.12` or `python3.12 -m venv DIR/3.12` put them
    if f"{sys.version_info[0]}.{sys.version_info[1]}" == version:
        return sys.executable, ""
    own = Path(folder) / version / "bin" / "python" if folder else None
    found = str(own) if own and own.exists() else shutil.which(f"python{version}")
    if not found:
        return None, f"no python{version} on the path, nor {version}/bin/python in $ESTIMATOR_PYTHONS"
    imports = (
        "import sys, sympy, numpy, rich; sys.exit(sys.version_info[:2] != tuple(map(int, sys.argv[1].split('.'))))"
    )
    if subprocess.run([found, "-c", imports, version], capture_output=True, check=False).returncode:
        return None, f"{found} cannot import sympy, numpy and rich, or is another version"
    return found, ""


@pytest.mark.parametrize("flag", [(), ("-OO",)], ids=["plain", "OO"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_command_says_the_same_on_every_python(version, flag, plain):
    python, why = interpreter(version)
    if python is None:
        pytest.skip(why)
    assert alike(json.loads(run(python, *flag, *COMMAND)), plain)
    words = " ".join(run(python, *flag, *COMMAND[:3], "--help", "all").split())
    for f in (*fields(Plan), *fields(ModelConfig)):
        if f.name not in ("family", "parts", "pattern"):
            assert f"--{f.name.replace('_', '-')}" in words
            assert (settings(Plan) | settings(ModelConfig))[f.name].meaning[:12] in words
