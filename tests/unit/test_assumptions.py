"""What a predicted time rests on: each other value, taken, changes the time by what was said."""

from __future__ import annotations

import pytest

import estimator as est


def asked(**run):
    p = est.Plan(attention="sdpa", precision="bf16-mixed", data_parallel=64)
    return est.estimate("gpt2-xl", p, "h100-80gb-sxm", **run)


def test_each_other_choice_changes_the_time_by_what_is_said():
    r = asked()
    said = {x.name: x for x in r.assumptions}
    assert (said["network between nodes"].value, said["network between nodes"].origin) == (
        "12.5 GB/s an accelerator",
        "assumed",
    )
    for name, other, run in [
        ("network between nodes", "6.25 GB/s", {"network": 6.25e9}),
        ("network between nodes", "25 GB/s", {"network": 25e9}),
        ("attention kernel", "flash-3", {"attention_kernel": "flash-3"}),
        ("gradients are summed", "when backward is over", {"overlap": False}),
        ("computed in fp32", "norm and rotation", {"wide": ("norm", "rotation")}),
        ("clock", "1,647 MHz", {"clock": 1647}),
    ]:
        taken = asked(**run)
        change = taken.time.seconds_per_step / r.time.seconds_per_step - 1
        assert said[name].others[other] == pytest.approx(change, abs=1e-9), name
        assert next(x for x in taken.assumptions if x.name == name).value.startswith(other)
    assert said["network between nodes"].others["25 GB/s"] < 0 < said["network between nodes"].others["6.25 GB/s"]


def test_an_old_pytorch_has_the_first_flash_attention():
    old, older = asked(torch_version="2.1.0+cu121"), asked(torch_version="1.13")
    first = asked(attention_kernel="flash-1").time.seconds
    assert old.time.seconds == older.time.seconds == first > asked(torch_version="2.2").time.seconds
    assert asked(torch_version="2.10").time.seconds == asked().time.seconds
    kernel = next(x for x in old.assumptions if x.name == "attention kernel")
    assert (kernel.value, kernel.origin) == ("flash-1", "as PyTorch 2.1 picks")
    for wrong in ("two", "2", 2.1, ""):
        with pytest.raises(est.ConfigError, match="torch_version"):
            asked(torch_version=wrong)


def test_a_lower_clock_slows_what_waits_for_arithmetic_and_no_message():
    usual, slow = asked().time.parts, asked(clock=915).time.parts
    assert slow["matmul"] / usual["matmul"] == pytest.approx(2, rel=0.02)
    assert slow["optimizer"] == pytest.approx(usual["optimizer"])
    with pytest.raises(est.ConfigError, match="clock"):
        asked(clock=1)


def test_they_are_sentences_that_say_what_would_change():
    line = next(str(x) for x in asked().assumptions if x.name == "network between nodes")
    assert line.startswith("network between nodes: 12.5 GB/s an accelerator (assumed; ")
    assert "% less with 25 GB/s" in line


def test_a_time_that_was_given_rests_on_nothing_else():
    assert asked(mfu=0.5).assumptions == ()
    assert asked(mfu=0.5).to_dict()["assumptions"] == []
