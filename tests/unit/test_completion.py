"""A shell completes what there is: commands, models, options, their choices."""

import shutil
import subprocess

import pytest

import estimator as est
from estimator.describe.plan import Plan
from estimator.describe.settings import settings
from estimator.show import commands, completion


def completed(script, *words):
    """What bash offers after `words`, the last of which is begun."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _estimate; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.fixture(scope="module")
def script():
    return completion.script("bash")


def test_bash_offers_commands_and_models_then_options_then_their_choices(script):
    assert {"plan", "layouts", "list", "gpt2-xl"} <= set(completed(script, "estimate", ""))
    assert completed(script, "estimate", "pl") == ["plan"]
    assert set(completed(script, "estimate", "gpt2", "--precision", "")) == set(settings(Plan)["precision"].choices)
    assert completed(script, "estimate", "gpt2", "--gpu", "h100-80gb-s") == ["h100-80gb-sxm"]
    assert {"--batch-size", "--json", "--compile", "--no-compile"} <= set(completed(script, "estimate", "gpt2", "--"))
    offered = set(completed(script, "estimate", "plan", "--"))
    assert "--budget" in offered
    assert "--precision" not in offered


def test_every_model_is_offered_and_every_option_that_is_offered_is_taken(script, capsys):
    assert set(est.presets()) <= set(completed(script, "estimate", ""))
    for option in completion.options_by_command()["*"]:
        with pytest.raises(SystemExit):
            commands.main(["estimate", "gpt2", option, "--no-such-option"])
        assert f"unrecognized arguments: {option}" not in capsys.readouterr().err


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_reads_its_script(shell, tmp_path, capsys):
    assert commands.main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "gpt2-xl" in text
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(text)
    assert subprocess.run([shell, "-n", str(file)], capture_output=True, text=True, check=False).stderr == ""


def test_another_shell_is_refused(capsys):
    assert commands.main(["completion", "cmd"]) == 2
    assert "allowed are bash, zsh, fish" in capsys.readouterr().err
