"""The sub-commands: each is there, says what it is for, and refuses alike."""

from __future__ import annotations

import importlib

import pytest

import estimator as est
from estimator.show import commands


def run(capsys, *argv):
    try:
        status = commands.main(argv)
    except SystemExit as stop:
        status = stop.code
    out = capsys.readouterr()
    return status, out.out, out.err


@pytest.mark.parametrize("command", commands.COMMANDS, ids=lambda command: command.name)
def test_each_command_is_a_function_with_help(capsys, command):
    module, _, name = command.function.partition(":")
    if module.startswith("trainer"):
        pytest.importorskip("torch", reason="the trainer measures")
    assert callable(getattr(importlib.import_module(module), name))
    status, out, _ = run(capsys, command.name, "--help")
    assert status == 0
    assert "usage: estimate" in out
    assert 10 < len(command.summary) < 90
    assert command.summary in run(capsys, "--help")[1]


def test_a_model_without_a_command_means_estimate(capsys):
    assert run(capsys, "estimate", "gpt2", "--max-batch") == run(capsys, "gpt2", "--max-batch")
    assert run(capsys, "--version") == (0, f"transformer-estimator {est.__version__}\n", "")
    assert run(capsys, "--list") == run(capsys, "list")
    assert run(capsys)[0] == 2


def test_the_help_of_a_topic_has_its_options_and_no_others(capsys):
    _, plan, _ = run(capsys, "gpt2", "--help", "plan")
    assert "--checkpointing" in plan
    assert "--json" not in plan
    status, _, error = run(capsys, "gpt2", "--help", "nothing")
    assert status == 2
    assert "topics are plan, model, run, output, all" in error


def test_the_short_help_names_only_options_that_there_are(capsys):
    _, short, _ = run(capsys, "gpt2", "--help")
    _, every, _ = run(capsys, "gpt2", "--help", "all")
    options = [word for word in short.split() if word.startswith("--")]
    assert len(options) > 10
    assert len(short.splitlines()) <= 24
    assert all(option in every for option in options)


def test_what_is_not_installed_is_one_sentence(capsys, monkeypatch):
    def missing(_):
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(commands, "_function", lambda _: missing)
    status, _, error = run(capsys, "calibrate")
    assert status == 2
    assert error == "estimate calibrate: error: torch is missing: pip install 'transformer-estimator[trainer]'\n"
