"""Step times out of logs as trainers write them, and the factor that they give."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import estimator as est
from estimator.answers.logs import PER_ACCELERATOR, SECONDS, explanation, load, logged, read_log, save
from estimator.describe.catalogue import read_data
from estimator.describe.checks import ConfigError
from estimator.show import commands
from estimator.studies import nearness, published
from estimator.timing.roofline import PARTS
from estimator.timing.stack import NINE_OF_TEN, Logged, Shape, StackFactor, covariance, most_telling

COLUMN = "0.52\n0.50\n0.51\n"
TABLE = "step,step_time\n1,0.52\n2,0.50\n3,0.51\n"
METRICS = "".join(
    json.dumps({"step": i, "loss": 5.0, "lr": 1e-4, "tokens_per_second": rate, "mfu": 0.4}) + "\n"
    for i, rate in enumerate((15753.8, 16384.0, 16062.7), 1)
)
STATE = json.dumps(
    {
        "global_step": 3,
        "log_history": [
            {"epoch": 0.1, "loss": 3.2, "step": i, "train_tokens_per_second": rate}
            for i, rate in enumerate((15753.8, 16384.0, 16062.7), 1)
        ],
    }
)
RUNTIME = json.dumps(
    {
        "log_history": [
            {"loss": 3.0, "step": i, "train_runtime": t} for i, t in ((10, 9.0), (20, 14.2), (30, 19.2), (40, 24.3))
        ]
    }
)
STAMP = "2025-11-26 07:00:00,000 - root - INFO - "
TITAN = "".join(
    f"[rank0]:{STAMP}\x1b[31mstep:  {i}  \x1b[32mloss:  8.1  \x1b[34mmemory: 47.46GiB(49.95%)  \x1b[36mtps: {rate}  "
    "\x1b[35mtflops: 312.10  mfu: 31.56%\x1b[39m\n"
    for i, rate in enumerate(("15,754", "16,384", "16,063"), 1)
)
MEGATRON = "".join(
    f" [2025-11-26 07:00:0{i}] iteration        {i}/     100 | consumed samples: 64 | "
    f"elapsed time per iteration (ms): {ms} | throughput per GPU (TFLOP/s/GPU): 190.1 | global batch size:     8 |\n"
    for i, ms in enumerate(("520.0", "500.0", "510.0"), 1)
)
NANOGPT = "".join(
    f"iter {i}: loss 10.9, time {ms}ms, mfu 37.1%\n" for i, ms in enumerate(("520.00", "500.00", "510.00"))
)
LOGS = {
    "a column": COLUMN,
    "a table": TABLE,
    "metrics.jsonl": METRICS,
    "transformers": STATE,
    "torchtitan": TITAN,
    "Megatron-LM": MEGATRON,
    "nanoGPT": NANOGPT,
}


def written(tmp_path, text):
    path = tmp_path / "log"
    path.write_text(text)
    return path


@pytest.mark.parametrize("format_", LOGS)
def test_three_lines_of_each_format_give_the_same_seconds(tmp_path, format_):
    log = read_log(written(tmp_path, LOGS[format_]))
    assert log.format == format_
    assert log.seconds(8192, 1) == pytest.approx((0.52, 0.50, 0.51), rel=1e-3)


def test_transformers_times_between_its_lines_are_divided_by_the_steps(tmp_path):
    log = read_log(written(tmp_path, RUNTIME))
    assert (log.format, log.what) == ("transformers", SECONDS)
    assert log.values == pytest.approx((0.52, 0.50, 0.51))


def test_a_plain_trainer_state_has_the_mean_of_all_steps_in_its_last_line(tmp_path):
    lines = [{"epoch": 0.1 * i, "grad_norm": 1.0, "learning_rate": 5e-5, "loss": 3.0, "step": i} for i in (10, 20, 30)]
    last = {"epoch": 0.3, "step": 30, "total_flos": 1e12, "train_loss": 3.0, "train_runtime": 15.3}
    last |= {"train_samples_per_second": 15.7, "train_steps_per_second": 1.961}
    log = read_log(written(tmp_path, json.dumps({"global_step": 30, "log_history": [*lines, last]})))
    assert (log.format, log.what, log.steps) == ("transformers", SECONDS, 30)
    assert log.seconds(1, 1) == pytest.approx((0.51,), rel=1e-3)
    found = logged(log, est.estimate("gpt2"), "mine")
    assert (found.measured, found.spread, found.steps) == (pytest.approx(0.51, rel=1e-3), 0, 30)


def test_tokens_of_one_accelerator_are_not_those_of_the_job(tmp_path):
    log = read_log(written(tmp_path, TITAN))
    assert log.what == PER_ACCELERATOR
    assert log.seconds(8 * 8192, 8) == pytest.approx((0.52, 0.50, 0.51), rel=1e-3)


def test_what_is_no_log_is_refused_by_name(tmp_path):
    for text in ("", "hello\n", "{}", "1.0\n2.0\n", "a,b\n1,2\n1,2\n1,2\n", "0\n1\n2\n", "nan\n1\n2\n"):
        with pytest.raises(ConfigError, match="log"):
            read_log(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_log(tmp_path / "none")


def test_a_first_step_that_warms_up_is_left_out(tmp_path):
    log = read_log(written(tmp_path, "9.0\n0.5\n0.5\n0.5\n"))
    assert log.seconds(1, 1) == (0.5, 0.5, 0.5)


def test_the_factor_is_carried_into_the_prediction_and_its_interval(tmp_path):
    p = est.Plan(batch_size=8, precision="bf16", attention="sdpa")
    asked = est.estimate("gpt2", p, "a100-80gb-sxm")
    plain = asked.time
    log = read_log(written(tmp_path, "\n".join(str(x * plain.seconds_per_step) for x in (1.19, 1.2, 1.21))))
    found = StackFactor((logged(log, asked, "mine"),))
    assert found.runs[0].ratio == pytest.approx(1.2)
    save(found, tmp_path / "stack.toml")
    assert load(tmp_path / "stack.toml") == found
    calibrated = est.estimate("gpt2", p, "a100-80gb-sxm", stack_factor=found)
    again = calibrated.time
    assert again.seconds == pytest.approx(1.2 * plain.seconds, rel=0.002)  # the run of the log itself
    assert again.interval.high / again.seconds < 1.05 < plain.interval.high / plain.seconds
    assert sum(again.parts.values()) == pytest.approx(again.seconds)
    assert str(calibrated.assumptions[-1]).startswith("factor of your stack: 1.2")
    another = est.estimate("gpt2", p.replace(batch_size=16), "a100-80gb-sxm", stack_factor=found).time
    before = est.estimate("gpt2", p.replace(batch_size=16), "a100-80gb-sxm").time
    assert 1.05 < another.seconds / before.seconds < 1.2  # less sure of another run, and moved less
    assert another.interval.high / another.seconds > again.interval.high / again.seconds
    assert "matmul" in explanation(found, asked)
    for bad in ("factor = 1\n", "runs = 3\n", "runs = []\n", "[[runs]]\nmeasured = 1\n"):
        (tmp_path / "bad.toml").write_text(bad)
        with pytest.raises(ConfigError, match="calibrate --log"):
            load(tmp_path / "bad.toml")


SHAPE = Shape(8192, 1024, 8)


def run_of(measured, **seconds):
    parts = tuple(seconds.get(name, 0.0) for name in PARTS)
    return Logged(SHAPE, parts, measured, 0.0, 3, "made up")


def test_runs_of_different_make_tell_a_slow_network_from_slow_kernels():
    """A stack whose messages take twice as long; one of the two runs has hardly any."""
    alone = run_of(1.01, matmul=0.99, communication=0.01)
    waits = run_of(1.5, matmul=0.5, communication=0.5)
    factors = StackFactor((alone, waits)).factors()
    assert factors["matmul"][0] == pytest.approx(1, abs=0.05)
    assert factors["communication"][0] > 1.5
    assert factors["launch"][0] == pytest.approx(1)  # nothing is known of it, and nothing said
    assert factors["launch"][1] == pytest.approx(factors["launch"][2])
    assert factors["communication"][1] < factors["communication"][2]


def test_one_run_moves_every_part_a_little_and_leaves_other_runs_uncertain():
    slow = run_of(1.5, matmul=0.5, communication=0.5)
    stack = StackFactor((slow,))
    factors = stack.factors()
    assert 1 < factors["matmul"][0] < factors["communication"][0] < 2
    of_itself = stack.spread(dict(zip(PARTS, slow.parts, strict=True)), SHAPE)
    of_another = stack.spread(dict.fromkeys(PARTS, 0.0) | {"launch": 1.0}, SHAPE)
    assert of_itself[1] - of_itself[0] < 0.01
    assert of_another[1] > math.exp(NINE_OF_TEN * read_data("prior")["host"])


def test_a_factor_is_never_negative_however_far_a_log_is_off():
    for measured in (1e-3, 0.1, 10.0, 1e3):
        stack = StackFactor((run_of(measured, matmul=0.7, launch=0.3),))
        assert all(factor > 0 for factor, _, _ in stack.factors().values())
        parts = {name: np.array([x]) for name, x in zip(PARTS, stack.runs[0].parts, strict=True)}
        assert sum(x[0] for x in stack.calibrated(parts, SHAPE).values()) == pytest.approx(measured, rel=1e-6)


def test_a_log_says_more_of_runs_of_its_own_size():
    """And of one far away what all kernels of a stack share, still."""
    slow = run_of(1.2, matmul=1.0)
    factors = [StackFactor((slow,)).factors(SHAPE._replace(rows=8192 * 2**n))["matmul"] for n in (0, 1, 3, 40)]
    assert factors[0][0] > factors[1][0] > factors[2][0] > factors[3][0] > 1
    assert factors[0][1] < factors[1][1] < factors[2][1] < factors[3][1] < factors[3][2]
    wider = StackFactor((slow,)).factors(SHAPE._replace(width=2048))["matmul"]
    assert wider[0] < factors[1][0]  # two of a product's sizes go with the width
    more = StackFactor((run_of(1.2, communication=1.0),))
    assert more.factors()["communication"][0] > more.factors(SHAPE._replace(accelerators=64))["communication"][0]


def test_the_posterior_of_two_runs_is_that_of_a_normal_distribution():
    """By its own definition, over all factors of the two runs and of a third: conditioning a joint normal."""
    shapes = [SHAPE, SHAPE._replace(rows=16384), SHAPE._replace(width=4096)]
    runs = (run_of(1.02, matmul=1.0), replace(run_of(1.94, matmul=2.0), shape=shapes[1]))
    prior = read_data("prior")
    distance = np.array([[0, 1, 8**0.5], [1, 0, 3], [8**0.5, 3, 0]])
    joint = prior["kernels"] ** 2 + prior["each"] ** 2 * np.exp(-distance / prior["octaves"])
    known = joint[:2, :2] + prior["configuration"] ** 2 * np.eye(2)
    mean = joint[2, :2] @ np.linalg.solve(known, np.log([1.02, 0.97]))
    variance = joint[2, 2] - joint[2, :2] @ np.linalg.solve(known, joint[:2, 2])
    factor, now, before = StackFactor(runs).factors(shapes[2])["matmul"]
    assert np.log(factor) == pytest.approx(mean, rel=1e-6)
    assert now == pytest.approx(variance**0.5, rel=1e-6)
    assert before == pytest.approx(joint[2, 2] ** 0.5) == pytest.approx(covariance()[0, 0] ** 0.5)


def test_the_most_telling_runs_are_of_different_make():
    kernels, near, far = run_of(1, matmul=1.0), run_of(1, matmul=0.999, launch=0.001), run_of(1, communication=1.0)
    candidates = [(run.shape, run.parts) for run in (kernels, near, near, far)]
    assert most_telling(candidates, 2)[0] in (0, 1, 2, 3)
    assert 3 in most_telling(candidates, 2)
    assert sorted(most_telling(candidates, 9)) == [0, 1, 2, 3]
    assert most_telling(candidates, 1, [candidates[3]]) != [3]  # which is known already
    assert most_telling(candidates, 1, candidates[:3]) == [3]


def test_two_logs_of_one_run_know_no_more_of_its_stack_than_their_mean():
    once = StackFactor((run_of(1.2, matmul=1.0),)).factors()
    twice = StackFactor((run_of(1.2, matmul=1.0), run_of(1.2, matmul=1.0))).factors()
    assert twice["matmul"] == pytest.approx(once["matmul"])


def test_the_command_reads_a_log_explains_and_writes_the_factor(tmp_path, capsys):
    log, out = written(tmp_path, NANOGPT), tmp_path / "stack.toml"
    run = ["gpt2", "--gpu", "a100-80gb-sxm", "--batch-size", "12", "--precision", "bf16-mixed", "--attention", "sdpa"]
    assert commands.main(["calibrate", "--log", str(log), *run, "--out", str(out)]) == 0
    assert "Measured steps take" in capsys.readouterr().out
    assert commands.main([*run, "--stack-factor", str(out), "--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    assert r["time"]["seconds_per_step"] == pytest.approx(0.51, rel=0.02)  # steps differ by 2 %
    run[4] = "24"
    again = ["calibrate", "--log", str(log), *run, "--stack-factor", str(out), "--out", str(out)]
    assert commands.main(again) == 0
    said = capsys.readouterr().out
    assert "after 2 logged runs" in said
    assert "Of runs near this one, one with " in said
    assert [x.measured for x in load(out).runs] == pytest.approx([0.51, 0.51])


def test_three_rows_of_a_published_stack_calibrate_the_rest():
    found = published.calibrated().values()
    assert len(found) >= 5
    # Any three, the middle of 40 draws: what three happen to be taken decides little.
    assert sum(c.others[0] for c in found) / len(found) <= 0.04
    assert sum(c.others[0] <= 0.05 for c in found) >= 8
    assert all(c.others[0] < c.before + 0.02 for c in found)
    # Nine of ten were promised to lie within the interval.
    assert 0.83 <= sum(c.covered for c in found) / len(found) <= 0.97


def test_how_alike_errors_are_is_what_single_kernels_say():
    """The prior's octaves are those of the timings on file, and near kernels' errors are more alike than far ones'."""
    found = nearness.variograms()
    assert read_data("prior")["octaves"] == pytest.approx(
        np.median([nearness.octaves(x) for x in found.values()]), abs=0.05
    )
    for near in found.values():
        assert near[0].deviation < near[-1].deviation
    at = np.arange(64.0)[:, None]
    walk = np.cumsum(
        np.random.default_rng(0).normal(size=(64, 200)), axis=0
    )  # whose semivariogram is half the distance
    by_hand = nearness.variogram([(at, errors) for errors in walk.T])
    assert [x.deviation for x in by_hand] == pytest.approx([(x.octaves / 2) ** 0.5 for x in by_hand], rel=0.03)
