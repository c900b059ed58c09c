"""Step times out of logs as trainers write them, and the factor that they give."""

import json

import pytest

import estimator as est
from estimator.answers.logs import PER_ACCELERATOR, SECONDS, explanation, load, read_log, save, stack_factor
from estimator.describe.checks import ConfigError
from estimator.show import commands
from estimator.studies import published

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
    plain = est.estimate("gpt2", p, "a100-80gb-sxm").time
    log = read_log(written(tmp_path, "\n".join(str(x * plain.seconds_per_step) for x in (1.19, 1.2, 1.25))))
    found = stack_factor(log, plain, plain.tokens_per_second * plain.seconds_per_step, "mine")
    assert found.factor == pytest.approx(1.2)
    assert found.low <= 1.19
    assert found.high >= 1.25
    save(found, tmp_path / "stack.toml")
    assert load(tmp_path / "stack.toml") == found
    again = est.estimate("gpt2", p, "a100-80gb-sxm", stack_factor=found).time
    assert again.seconds == pytest.approx(1.2 * plain.seconds)
    assert again.interval.low == pytest.approx(found.low * plain.seconds)
    assert again.interval.high == pytest.approx(found.high * plain.seconds)
    assert sum(again.parts.values()) == pytest.approx(again.seconds)
    assert "1.200 from mine" in again.assumptions["stack factor"]
    assert "matmul" in explanation(found, plain)
    (tmp_path / "bad.toml").write_text("factor = 1\n")
    with pytest.raises(ConfigError, match="calibrate --log"):
        load(tmp_path / "bad.toml")


def test_the_command_reads_a_log_explains_and_writes_the_factor(tmp_path, capsys):
    log, out = written(tmp_path, NANOGPT), tmp_path / "stack.toml"
    run = ["gpt2", "--gpu", "a100-80gb-sxm", "--batch-size", "12", "--precision", "bf16-mixed", "--attention", "sdpa"]
    assert commands.main(["calibrate", "--log", str(log), *run, "--out", str(out)]) == 0
    assert "Measured steps take" in capsys.readouterr().out
    assert commands.main([*run, "--stack-factor", str(out), "--json"]) == 0
    r = json.loads(capsys.readouterr().out)
    assert r["time"]["seconds_per_step"] == pytest.approx(0.51, rel=1e-6)


def test_three_rows_of_a_published_stack_calibrate_the_rest():
    found = published.calibrated()
    assert len(found) >= 4
    medians = [s.median for s, _ in found.values()]
    assert sum(medians) / len(medians) <= 0.06
