"""The assignment's own account. The figures are worked out by hand from its text, not from the code."""

from __future__ import annotations

import re

import pytest

import estimator as est
from estimator.describe.checks import ConfigError
from estimator.eager.letters import SYMBOLS
from estimator.show import commands
from estimator.show.course import parts
from estimator.studies.assignment import textbook


def test_gpt2_xl_parts_a_to_d():
    t = est.textbook("gpt2-xl")
    L, d, h, T, V = 48, 1600, 25, 1024, 50257
    assert t.parameters == L * (12 * d * d + 2 * d) + d + V * d == 1_555_126_400
    assert t.static_bytes == 16 * t.parameters
    assert t.activation_bytes == 4 * (L * (16 * T * d + 2 * h * T * T) + T * d + 2 * T * V)
    assert t.max_batch_size(80e9) == 3
    assert t.memory_bytes(3) <= 80e9 < t.memory_bytes(4)
    assert t.forward_flops == L * (24 * T * d * d + 4 * T * T * d) + 2 * T * d * V == 3_506_703_564_800
    assert t.days() == pytest.approx(5_115, abs=1)
    assert t.days() / 365.25 == pytest.approx(14.0, abs=0.05)


def test_formulas_are_in_the_legends_letters():
    t = est.textbook("gpt2")
    values = {SYMBOLS["L"]: 12, SYMBOLS["d"]: 768, SYMBOLS["h"]: 12, SYMBOLS["T"]: 1024, SYMBOLS["V"]: 50257}
    for name, formula in t.formulas.items():
        assert formula.subs(values) == getattr(t, name)


def test_what_the_seed_notes_got_wrong():
    """Three copies in place of four; a forward count that belongs to a context of 16,384; 400 x 100 steps."""
    t = est.textbook("gpt2-xl")
    notes_static, notes_forward, notes_hours = 18.72e9, 133_004_351_504_384, 454.74
    assert 3 * 4 * t.parameters == pytest.approx(notes_static, rel=0.005)
    T = 16_384
    long_forward = 48 * (24 * T * 1600**2 + 4 * T * T * 1600) + 2 * T * 1600 * 50257
    assert long_forward == pytest.approx(notes_forward, rel=0.005)
    step = 3 * notes_forward + 25.5e9
    assert 400 * 100 * step / (0.5 * 19.5e12) / 3600 == pytest.approx(notes_hours, rel=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="mfu = 0"):
        est.textbook("gpt2").days(mfu=0)
    with pytest.raises(ConfigError, match="peak_flops = -1"):
        est.textbook("gpt2").days(peak_flops=-1)


def test_the_worked_lines_are_the_librarys_and_follow_from_each_other(capsys):
    """The figures of the lines, read back: (80 - 24.88) / 15.52 = 3.55, 3 of them; PyTorch's own batch fits."""
    lines = {part.key: part for part in parts()}
    t = textbook("gpt2-xl")
    convention = " ".join(line for part in parts() for line in part.convention)
    assert "16 x 1,555,126,400 = 24.88 GB" in convention
    assert "(80 - 24.88) / 15.52 = 3.55" in convention
    assert f"the largest batch is {t.max_batch_size()}" in lines["batch"].convention
    assert t.static_bytes / 1e9 == pytest.approx(24.88, abs=0.005)
    assert t.activation_bytes / 1e9 == pytest.approx(15.52, abs=0.005)
    assert "122,765 hours = 14.0 years" in lines["hours"].convention[-1]
    largest = est.max_batch_size("gpt2-xl", est.Plan(), "a100-80gb-sxm")
    assert f"the largest batch is {largest}" in lines["batch"].pytorch
    # The straight line of the peak, at another batch than those that it was drawn through.
    held, each = (float(x) for x in re.findall(r"([\d.]+) GB", lines["memory"].pytorch[-1]))
    five = est.estimate("gpt2-xl", est.Plan(batch_size=5), "a100-80gb-sxm").memory.peak
    assert held + 5 * each == pytest.approx(five / 1e9, abs=0.05)
    for part in parts():
        assert all(len(answers) >= 2 for answers in (part.notes, part.convention, part.pytorch))
    assert commands.main(["course", "batch"]) == 0
    assert "3.55" in capsys.readouterr().out
