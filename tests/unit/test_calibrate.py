"""A calibration that takes two seconds: not exact, but whole, and an accelerator like any other."""

import pytest
import torch

import estimator as est
from estimator.show import commands
from estimator.timing.roofline import efficiency
from trainer.referee import calibrate, validate_time


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    threads = torch.get_num_threads()
    path = tmp_path_factory.mktemp("calibration") / "machine.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "LINEAR", calibrate.LINEAR[:3])
        patch.setattr(calibrate, "BATCHED", calibrate.BATCHED[:1])
        patch.setattr(calibrate, "MOVED", calibrate.MOVED[:4])
        assert commands.main(["calibrate", "--out", str(path), "--budget", "0.002", "--threads", "1"]) == 0
    assert torch.get_num_threads() == threads
    return path


def test_a_profile_is_an_accelerator_like_any_other(profile):
    a = est.accelerator(profile)
    assert a.device == "cpu"
    assert set(a.peak) == {"fp32", "bf16"}
    assert "estimate calibrate" in efficiency(a).origin
    for precision in ("fp32", "bf16"):
        r = est.estimate("gpt2", est.Plan(precision=precision, seq_len=64, attention="sdpa"), a)
        assert r.time is not None, r.notes
        assert 0 < r.time.mfu <= 1
        assert sum(r.time.parts.values()) == pytest.approx(r.time.seconds_per_step)


def test_each_part_of_a_step_is_paid_for(profile):
    m, p = validate_time.CASES[0]
    parts = est.estimate(m, p, profile).time.parts
    assert all(parts[name] > 0 for name in ("matmul", "attention", "elementwise", "optimizer", "launch"))


def test_the_cases_are_those_that_were_promised():
    assert len(validate_time.CASES) >= 8
    assert {m.family for m, _ in validate_time.CASES} == {"gpt2", "llama"}
    assert {p.precision for _, p in validate_time.CASES} == {"fp32", "bf16"}
    for of, low, high in (
        (lambda m, _: m.d_model, 128, 1024),
        (lambda m, p: p.tokens(m), 64, 512),
        (lambda _, p: p.batch_size, 1, 16),
    ):
        found = [of(m, p) for m, p in validate_time.CASES]
        assert (min(found), max(found)) == (low, high)


def test_a_case_is_measured_against_its_prediction(profile):
    row = validate_time.measured(profile, "cpu", 0.01, (calibrate.LAUNCH, est.Plan()))
    assert row.predicted > 0
    assert row.measured > 0


def test_bad_arguments_are_refused(tmp_path, capsys):
    for words in (["--out", str(tmp_path / "x.json")], ["--out", str(tmp_path / "a.toml"), "--budget", "0"]):
        with pytest.raises(SystemExit) as stop:
            commands.main(["calibrate", *words])
        assert stop.value.code == 2
        assert "must" in capsys.readouterr().err
