"""The script that a person with a card runs, tried on the processor, and what is made of its file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import estimator as est
from estimator.describe.checks import ConfigError
from estimator.hardware.accelerators import accelerator
from estimator.studies import device
from estimator.studies.device_profile import profile
from estimator.timing.roofline import efficiency
from trainer.referee import validate

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    out = tmp_path_factory.mktemp("check") / "device.json"
    command = [sys.executable, "tools/device_check.py", "--device", "cpu", "--budget", "300", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "validate-estimates --import" in done.stdout
    return out


def test_the_file_has_every_section_and_takes_no_longer_than_it_may(path):
    found = device.read(path)
    assert found["device"] == "cpu"
    assert found["seconds"] < 300
    assert found["skipped"] == []
    for section in ("memory", "products", "attention", "operators", "steps"):
        assert found[section], section
    assert len({json.dumps(row["plan"]) for row in found["memory"]}) >= 20
    assert all("error" not in row for row in found["memory"])
    assert found["host"]["forward"] > 0


def test_its_bytes_are_those_estimated(path):
    rows = [r for r in device.differences(device.read(path), None) if r.section == "memory"]
    assert len(rows) >= 20
    assert all(r.error == 0 for r in rows)


def test_a_file_of_a_known_card_is_compared_in_seconds_too(path, tmp_path, capsys):
    found = device.read(path) | {"device": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    other = tmp_path / "h100.json"
    other.write_text(json.dumps(found))
    assert validate.main(["--import", str(other), "--out", str(tmp_path / "validation")]) == 0
    text = capsys.readouterr().out
    assert "Predicted as h100-80gb-sxm." in text
    for section in ("products", "attention", "operators", "host", "steps"):
        assert f"| {section} |" in text
    (rows,) = (tmp_path / "validation").glob("*.json")
    assert rows.name.endswith("device-nvidia-h100-80gb-hbm3.json")
    kept = json.loads(rows.read_text())["rows"]
    assert all(row["predicted"] > 0 for row in kept if row["section"] in ("products", "steps"))
    assert rows.with_suffix(".md").read_text() == text
    assert rows.with_suffix(".toml").exists()


def test_a_card_that_is_as_predicted_but_for_half_of_the_speed_gets_a_profile_that_says_so(path, tmp_path):
    found = device.read(path) | {"device": "cuda", "name": "NVIDIA H100 80GB HBM3"}
    a = accelerator("h100-80gb-sxm")
    rows = [replace(r, measured=2 * r.predicted) for r in device.differences(found, a) if r.predicted]
    own = tmp_path / "own.toml"
    own.write_text(profile(found, a, rows))
    before, after = efficiency(a), efficiency(accelerator(own))
    assert after.matmul == pytest.approx(before.matmul / 2)
    assert after.unaligned == pytest.approx(before.unaligned)
    assert after.memory[0][1] == pytest.approx(before.memory[0][1] / 2)
    assert after.flash["flash-2"].forward == pytest.approx([x / 2 for x in before.flash["flash-2"].forward])
    assert after.host == found["host"]["with_backward"]
    assert (after.within, after.latency) == (before.within, before.latency)
    p = est.Plan(batch_size=8, precision="bf16", attention="sdpa")
    slower, usual = (est.estimate("gpt2-xl", p, on).time.seconds for on in (own, "h100-80gb-sxm"))
    assert 1.7 * usual < slower < 2.1 * usual


def test_another_file_is_refused(tmp_path):
    for text in ("{}", "[", "[]"):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ConfigError, match="import"):
            device.read(tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        device.read(tmp_path / "none.json")
