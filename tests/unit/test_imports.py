"""An import points down the list of rooms, and no two files import each other."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parents[2]
# From the bottom: a room may import from itself and from those before it.
ROOMS = {
    "estimator": (
        ("data",),
        ("describe",),
        ("hardware",),
        ("eager",),
        ("optim",),
        ("parallel",),
        ("models",),
        ("accounting",),
        ("pricing",),
        ("memory", "timing"),
        ("studies",),
        ("answers",),
        ("show",),
    ),
    "trainer": (("system",), ("model", "optim"), ("files",), ("parallel",), ("referee",), ("run",)),
}


def imports(path, *, for_types):
    """(line, module) of each import in a file; with `for_types` those under `if TYPE_CHECKING:` too."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = set()
    for node in ast.walk(tree):
        if not for_types and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_file = (ROOT / (inner.replace(".", "/") + ".py")).exists()
                yield node.lineno, inner if is_file else node.module


def files(package):
    """module name -> path, of the files in the package's rooms."""
    paths = sorted((ROOT / package).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


@pytest.mark.parametrize("package", ROOMS)
def test_imports_point_down(package):
    rank = {room: i for i, rooms in enumerate(ROOMS[package]) for room in rooms}
    wrong = []
    for module, path in files(package).items():
        parts = module.split(".")
        if len(parts) < 3:  # the package's own __init__ and __main__ open all rooms
            continue
        assert parts[1] in rank, f"{path}: {parts[1]} is no room; rooms are {', '.join(rank)}"
        for line, target in imports(path, for_types=True):
            inner = target.split(".")
            if inner[0] == package and len(inner) > 1 and inner[1] in rank and rank[inner[1]] > rank[parts[1]]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}: {inner[1]} is above {parts[1]}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ROOMS)
def test_no_two_files_import_each_other(package):
    every = files(package)
    graph = {m: {t for _, t in imports(p, for_types=False) if t in every and t != m} for m, p in every.items()}
    done, path = set(), []

    def walk(module):
        if module in done:
            return
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        path.append(module)
        for target in sorted(graph[module]):
            walk(target)
        path.pop()
        done.add(module)

    for module in graph:
        walk(module)


def test_the_estimator_and_the_trainer_know_nothing_of_what_is_above_them():
    above = {"estimator": {"app_pages", "app", "trainer"}, "trainer": {"app_pages", "app"}}
    allowed = {"estimator/show/cli.py"}  # `estimate calibrate` measures, so it asks the trainer for it, there only
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for package, names in above.items()
        for path in files(package).values()
        for line, target in imports(path, for_types=True)
        if target.split(".")[0] in names and str(path.relative_to(ROOT)) not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_quick_tests_need_nothing_but_the_library():
    """`pytest -m quick` runs without torch and streamlit."""
    quick = [p for p in (ROOT / "tests").rglob("test_*.py") if "mark.quick" in p.read_text(encoding="utf-8")]
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in quick
        for line, target in imports(path, for_types=True)
        if target.split(".")[0] in {"torch", "trainer", "streamlit", "app_pages", "app"}
    ]
    assert len(quick) > 5
    assert not wrong, "\n".join(wrong)
