"""The pages of docs/: tables that scripts make are those of today, links lead somewhere, README is short."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from estimator.describe.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])


def test_the_readme_knows_how_many_families_there_are():
    found = re.search(r"a decoder of any of (\d+) families", (ROOT / "README.md").read_text())
    assert int(found[1]) == len(FAMILIES)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_files_that_are_named_exist():
    """`estimator/...` and the like in the text of a page, save in the list of changes, which is of its time."""
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        text = page.read_text()
        for name in re.findall(
            r"`((?:estimator|trainer|tests|tools|docs|app_pages|benchmarks|validation)/[\w./-]+)`", text
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_the_table_of_recipes_is_that_of_today():
    """After a change of a recipe: python tools/recipe_table.py"""
    code = "import recipe_table, sys; sys.stdout.write(recipe_table.with_table(sys.stdin.read()))"
    page = (ROOT / "docs" / "recipes.md").read_text()
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = ['tools', '.']; {code}"]
    assert subprocess.run(command, cwd=ROOT, input=page, capture_output=True, text=True, check=True).stdout == page


def test_the_page_of_settings_is_that_of_today():
    """After a change of a declaration: python tools/settings_page.py"""
    command = [sys.executable, "-c", "import settings_page, sys; sys.stdout.write(settings_page.page())"]
    path = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{ROOT}"}
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=path).stdout
    assert made == (ROOT / "docs" / "settings.md").read_text()


def test_the_library_of_the_readme_runs():
    """Its lines, one after the other; the last ones are figures that the text promises."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert names["r"].fits
    assert names["a"].evaluate(names["m"], names["p"]).parameters == 1_557_611_200


def test_the_documents_say_how_many_families_are_read():
    for name in ("README.md", "CHANGELOG.md", "docs/guide.md"):
        assert f"any of {len(FAMILIES)} families" in (ROOT / name).read_text(), name
