"""No constant of the time model without its source, none from a training run; and what each part is worth."""

import ast
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from estimator.describe.catalogue import read_data
from estimator.hardware.accelerators import accelerator, accelerators
from estimator.studies import ablation, cards, published, published_report
from estimator.studies.runs import rows
from estimator.timing.roofline import Efficiency, Flash, efficiency, matmul_seconds

ROOT = Path(__file__).parents[2]
SQUARES = (1024, 2048, 4096, 8192, 10240)
KINDS = {"kernel", "message", "datasheet", "code", "host", "literature", "fleet", "assumed"}


def test_every_constant_has_a_source_that_is_no_training_run():
    listed = read_data("constants")
    assert {f.name for f in fields(Efficiency)} - {"origin"} == set(listed["efficiency"])
    assert {f.name for f in fields(Flash)} == set(listed["flash"])
    for data in ("networks", "prior", "residuals"):
        assert set(read_data(data)) == set(listed[data])
    for where, entries in listed.items():
        for name, entry in entries.items():
            assert entry["source"], (where, name)
            # The judge's are around a prediction, which they do not move.
            judges = where == "residuals" or (where, name) == ("prior", "configuration")
            assert entry["kind"] in ({"judge"} if judges else KINDS), (where, name)


def test_every_number_in_the_code_of_the_time_model_is_listed():
    listed = set(read_data("constants")["timing"])
    for path in (ROOT / "estimator" / "timing").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                continue
            numbers = [
                x for x in ast.walk(node.value) if isinstance(x, ast.Constant) and isinstance(x.value, int | float)
            ]
            if numbers and not any(isinstance(x.value, bool) for x in numbers):
                assert node.targets[0].id in listed, (path.name, node.targets[0].id)


def test_nothing_is_fitted_to_the_rows_that_judge():
    """The fit reads the tables of kernels and messages alone."""
    tree = ast.parse((ROOT / "tools" / "fit_efficiency.py").read_text())
    read = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "rows"
    }
    assert read == {"gemm_efficiency", "torch_mm", "attention_efficiency", "mamf", "collectives"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert not imported & {"runs", "judged", "predict", "step_times"}


@pytest.mark.parametrize("part", ablation.PARTS, ids=lambda part: part.name)
def test_each_part_changes_what_it_is_about(part):
    whole = {id(j.run.row): j.predicted for j in published.judged()}
    assert any(j.predicted != pytest.approx(whole[id(j.run.row)], rel=1e-6) for j in ablation.without(part))


def test_each_card_is_measured_or_carried_over_and_its_origin_says_which():
    for id_ in accelerators():
        if accelerator(id_).device != "cuda":
            continue
        origin = efficiency(accelerator(id_)).origin
        assert origin
        if not cards.measured(id_).fitted:
            # Nobody timed it: the text names the card that somebody did, or says that it is another's.
            assert any(word in origin for word in ("unmeasured", "'s efficiencies", "Fitted to", "scaled", "fitted to"))
    names = {row["gpu"] for name in ("gemm_efficiency", "attention_efficiency") for row in rows(name)}
    names |= {row["gpu_name"] for row in rows("liger_operators")}
    names |= {row["gpu"] for row in rows("torch_mm")}
    names |= {row["accelerator"] for row in rows("mamf") if row["dtype"] == "bf16"}
    assert {name for name in names if "not stated" not in name} <= set(cards.NAMES)
    assert cards.measured("b200-180gb-sxm").products > 500
    assert cards.measured("a10g-24gb").products == 5
    assert cards.measured("l40s-48gb").best == 1
    assert not cards.measured("l40-48gb").fitted


def seconds_of_squares(id_, sizes):
    a, n = accelerator(id_), np.array(sizes, float)
    e, peak = efficiency(a), a.peak.get("bf16", a.peak.get("fp16"))
    shape = {"b": np.ones(len(n)), "m": n, "n": n, "k": n, "nbytes": 6 * n * n}
    bandwidth = a.memory_bandwidth * e.memory[-1][1]
    return matmul_seconds(shape, e.clock * peak * e.matmul, bandwidth, a.sm_count, e, fixed=e.fixed) + e.gap


def test_products_on_cards_that_somebody_timed_take_as_long_as_he_says():
    """Where a card's products are at its own level, their sizes are predicted by tiles that another card's shapes gave.

    L4's are held down by 72 W, the longer they run the more; one of three RTX 5090 is a quarter slower than the others.
    """
    for row in rows("torch_mm"):
        id_ = cards.NAMES[row["gpu"]]
        timed = float(row["tflops"])
        if not row["size"]:
            best = max(2 * n**3 / s / 1e12 for n in SQUARES for s in seconds_of_squares(id_, [n]))
            assert best == pytest.approx(timed, rel=0.01)
        elif int(row["size"]) >= 2048 and id_ not in ("l4-24gb", "rtx-5090-32gb"):
            size = int(row["size"])
            assert 2 * size**3 / seconds_of_squares(id_, [size])[0] / 1e12 == pytest.approx(timed, rel=0.16), row
    own = [float(row["tflops"]) for row in rows("torch_mm") if row["gpu"].endswith("5090") and row["size"] == "8192"]
    assert 2 * 8192**3 / seconds_of_squares("rtx-5090-32gb", [8192])[0] / 1e12 == pytest.approx(
        np.median(own), rel=0.01
    )


def test_one_command_prints_the_errors_by_stack_and_what_each_part_is_worth(monkeypatch, capsys):
    monkeypatch.setattr(ablation, "PARTS", ablation.PARTS[:1])
    assert published_report.main(["--ablation"]) == 0
    said = capsys.readouterr().out
    assert "| mean over stacks |" in said
    assert f"| {ablation.PARTS[0].name} |" in said


def test_the_document_has_todays_tables():
    text = (ROOT / "docs" / "time.md").read_text()
    assert published_report.table() in text
    assert published_report.calibrated_table() in text
    assert cards.table() in text
