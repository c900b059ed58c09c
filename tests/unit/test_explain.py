"""Out-of-memory messages: every version's read, and an answer that agrees with the estimate's own step."""

import json
from pathlib import Path

import pytest

import estimator as est
from estimator.answers.explanation import asked_of_device, explain
from estimator.answers.messages import read_message
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.show.commands import main
from estimator.show.explain import lines

GIB, MIB = 2**30, 2**20
TEXTS = json.loads((Path(__file__).parents[1] / "data" / "oom_messages.json").read_text())
# Of messages that users have pasted into public threads, one for each form; the figures are theirs.
FIGURES = {
    "1.8": {"tried": 2.26 * GIB, "capacity": 6 * GIB, "allocated": 781.59 * MIB, "reserved": 1.24 * GIB},
    "2.0": {"tried": 264 * MIB, "capacity": 2 * GIB, "allocated": 788.51 * MIB, "reserved": 1.02 * GIB},
    "2.1": {"capacity": 23.69 * GIB, "allocated": 17.88 * GIB, "others": 256 * MIB, "unallocated": 0},
    "2.2": {"tried": 22 * MIB, "allocated": 22.9 * GIB, "beside": (23.6 - 22.9) * GIB - 194.87 * MIB},
    "of one process by number": {"in_use": 47.51 * GIB, "allocated": 47.14 * GIB, "others": None},
    "with graphs": {"capacity": 70 * GIB, "allocated": 68 * GIB, "unallocated": GIB},
    "without its process": {"tried": 27.12 * GIB, "free": 0, "in_use": None, "allocated": 16.16 * GIB},
}


@pytest.mark.parametrize("version", FIGURES)
def test_the_messages_of_every_version_are_read(version):
    found = read_message(f"Traceback (most recent call last):\n  x = f(y)\n{TEXTS[version]}\n[rank1]: more\n")
    for name, figure in FIGURES[version].items():
        assert getattr(found, name) == (None if figure is None else pytest.approx(figure, abs=2)), name


def test_the_summary_is_read_as_torch_writes_it(monkeypatch):
    torch = pytest.importorskip("torch")
    stats = {}
    for kind in ("allocated_bytes", "active_bytes", "requested_bytes", "reserved_bytes", "inactive_split_bytes"):
        for pool in ("all", "large_pool", "small_pool"):
            for what, number in (("current", 3), ("peak", 40), ("allocated", 500), ("freed", 497)):
                stats[f"{kind}.{pool}.{what}"] = number * GIB * (2 if kind == "reserved_bytes" else 1)
    for kind in ("allocation", "active", "segment", "inactive_split", "oversize_allocations", "oversize_segments"):
        for pool in ("all", "large_pool", "small_pool"):
            for what in ("current", "peak", "allocated", "freed"):
                stats[f"{kind}.{pool}.{what}"] = stats[f"{kind}.{what}"] = 1
    stats |= {"num_alloc_retries": 0, "num_ooms": 0}
    monkeypatch.setattr(torch.cuda.memory, "_get_device_index", lambda *_, **__: 0)
    monkeypatch.setattr(torch.cuda.memory, "memory_stats", lambda **_: stats)
    found = read_message(torch.cuda.memory_summary())
    assert (found.now, found.allocated, found.reserved) == (3 * GIB, 40 * GIB, 80 * GIB)
    assert found.tried is None


def message_of(e):
    """What torch 2.6 would have said of the first allocation that does not fit."""
    asked, alive = asked_of_device(e.expected.nbytes) / MIB, e.expected.before / GIB
    return TEXTS["template"].format(asked, e.capacity / GIB, e.capacity / GIB - 0.01, alive)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(precision="bf16", attention="sdpa", batch_size=24),
        Plan(precision="bf16-mixed", attention="sdpa", optimizer_impl="fused"),
    ],
    ids=["forward", "optimizer"],
)
def test_the_estimates_own_failure_is_found_and_every_change_fits(plan):
    r = est.estimate("gpt2-xl", plan, "rtx-4090")
    assert not r.fits
    first = explain(read_message(TEXTS["2.2"].replace("23.65 GiB", f"{r.memory.capacity / GIB:.6f} GiB")), r)
    found = explain(read_message(message_of(first)), r)
    assert (found.moment.where, found.moment.nbytes) == (first.expected.where, first.expected.nbytes)
    assert abs(found.more) <= 0.01 * GIB
    assert "In what is allocated they agree." in "\n".join(lines(found))
    assert found.fits
    assert all(c.fits for c in found.fits)
    assert [c.alters for c in found.fits] == sorted(c.alters for c in found.fits)


def test_what_the_estimate_does_not_know_counts_against_every_change():
    r = est.estimate("gpt2-xl", Plan(precision="bf16", attention="sdpa", batch_size=4), "rtx-4090")
    found = explain(read_message(TEXTS["unknown to the estimate"]), r)
    assert found.fragmented
    assert found.capacity == pytest.approx(19.65 * GIB, rel=1e-3)
    said = "\n".join(lines(found))
    assert "expandable_segments:True" in said
    assert "Other processes hold 4.00 GiB" in said
    assert "No allocation of the estimate's step asks the device for what was tried" in said


def test_other_text_gets_one_line(capsys, tmp_path):
    with pytest.raises(ConfigError, match=r"must be a message of torch\.OutOfMemoryError"):
        read_message("Segmentation fault")
    file = tmp_path / "log"
    file.write_text("nothing of it")
    assert main(["explain", "gpt2", "--message", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["explain", "gpt2", "--message", str(tmp_path / "absent")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    file.write_text(TEXTS["2.2"])
    assert main(["explain", "gpt2-xl", "--gpu", "rtx-4090", "--precision", "bf16", "--message", str(file)]) == 0
    assert "The message says" in capsys.readouterr().out
