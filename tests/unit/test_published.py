"""The predicted time against the training runs that others published, and what is written about it."""

import subprocess
import sys
import tomllib
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from estimator.describe.catalogue import read_data
from estimator.hardware.accelerators import accelerator, accelerators
from estimator.studies import published
from estimator.studies.runs import SOURCES, rows, runs
from estimator.timing.speed import spread

ROOT = Path(__file__).parents[2]
FILES = ("gemm_efficiency", "attention_efficiency", "mamf", "collectives", *SOURCES)


def of(source):
    return published.summary([j for j in published.judged() if j.run.source == source], source)


def test_errors_on_published_runs_are_within_their_targets():
    mpt, vtrain, llama = (of(source) for source in SOURCES)
    assert mpt.count == 61
    assert mpt.median <= 0.05
    assert mpt.percentile_90 <= 0.12
    assert vtrain.count == 60
    assert vtrain.median <= 0.12
    assert llama.count >= 10


@pytest.mark.parametrize("name", FILES)
def test_every_published_row_names_its_source(name):
    assert rows(name)
    assert all(row["source"].startswith("github:") and "@" in row["source"] for row in rows(name))


def test_each_row_becomes_the_run_that_it_describes():
    for run in runs():
        row = run.row
        tokens = run.plan.batch_size * run.plan.grad_accumulation * run.plan.data_parallel
        assert run.measured == float(row["tokens_per_s_per_gpu"])
        assert run.plan.tokens(run.model) == int(float(row["seq_len"]))
        if row["global_batch_seqs"]:
            assert tokens == int(float(row["global_batch_seqs"]))
        plain = {"checkpointing": "none", "checkpoint_every": 1}
        assert {p.replace(**plain) for p in run.plans} == {run.plan.replace(**plain)}


def test_the_groups_are_the_runs_and_the_table_says_so():
    total = len(published.judged())
    lines = [line.split("|") for line in published.table().splitlines()[2:]]
    for name in published.BY:
        assert sum(int(line[3]) for line in lines if line[1].strip() == name) == total
    assert len(published.worst(7)) == 7
    errors = [abs(j.error) for j in published.judged()]
    assert max(errors) in [abs(j.error) for j in published.worst(3)]


def test_the_plot_has_a_point_for_each_run():
    tree = ET.fromstring(published.plot())  # noqa: S314 - our own
    circles = tree.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(published.judged()) + len(published.NAMES)
    assert all(0 < float(c.get("cx")) < published.WIDTH and 0 < float(c.get("cy")) < published.HEIGHT for c in circles)


def test_the_residuals_on_file_are_those_of_the_rows():
    """After a change of the model: python -m estimator.studies.published --residuals > estimator/data/residuals.toml"""
    assert tomllib.loads(published.residuals()) == read_data("residuals")
    for name in accelerators():
        (low, high), said = spread(accelerator(name))
        assert 0.5 < low < 1 < high < 2
        assert said.startswith("Errors on published runs: 61 of llm-foundry")


def test_the_efficiencies_on_file_are_the_fits():
    """After a change of a kernel's model: python tools/fit_efficiency.py > estimator/data/efficiency.toml"""
    command = [sys.executable, "tools/fit_efficiency.py"]
    again = tomllib.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    kept = read_data("efficiency")
    assert again["accelerator"].keys() == kept["accelerator"].keys()
    for name, table in again["architecture"].items():
        for field, value in table.items():
            if isinstance(value, float):
                assert value == pytest.approx(kept["architecture"][name][field], rel=0.02), (name, field)


def test_the_command_needs_no_torch_and_writes_what_it_prints(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from trainer.referee.validate import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "--published", "--out", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "| source | llm-foundry, MPT, FSDP | 61 |" in done.stdout
    assert (tmp_path / "published.md").read_text() == done.stdout
    assert (tmp_path / "published.svg").read_text().startswith("<svg")
    assert (tmp_path / "rows.json").read_text().count('"predicted"') == len(published.judged())
    without = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert without.returncode == 2
    assert "need PyTorch" in without.stderr


def test_the_kept_report_and_the_readme_are_those_of_today():
    assert (ROOT / "validation" / "published.md").read_text() == published.report()
    assert (ROOT / "validation" / "published.svg").read_text() == published.plot()
    assert published.table() in (ROOT / "README.md").read_text()


def test_the_data_is_shipped():
    folder = resources.files("estimator").joinpath("data", "published")
    assert all(folder.joinpath(f"{name}.csv").is_file() for name in FILES)
    listed = folder.joinpath("README.md").read_text()
    for name in FILES:
        assert f"| `{name}.csv` | {len(rows(name)):,} |" in listed
