"""The page as a person has it: Debian's chromium, driven by Playwright. What is waited for is a state, never a time."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from page_server import ROOT

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",  # it is root's in a container
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]
SHOTS = ROOT / "screenshots"
PAGES = ("Estimate", "Plan", "Layouts", "Formulas", "Sweep", "Compare", "Validate", "Course")
# Opened at a page's own address, Streamlit's client asks below it first where its server is, and is told 404.
PROBES = tuple(f"/{page.lower()}/_stcore/{probe}" for page in PAGES for probe in ("health", "host-config"))
PATIENCE = 150_000  # ms until a state that does not come is an error: on a busy machine advice takes its time


@contextmanager
def visitor(browser, url, *, width=1440, height=1000, dark=False):
    """A page in a context of its own, that must not have said an error in its console by the end."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors = []

    def heard(message):
        if message.type == "error" and not message.location["url"].endswith(PROBES):
            errors.append(f"{message.text} {message.location}")

    page.on("console", heard)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    drawn(page)
    yield page
    context.close()
    assert not errors, errors


def drawn(page):
    """Wait until the foot of the page is drawn, its parts' code is loaded, and the server has nothing more to say.

    It says nothing of a change that was made just before and has not reached the server: wait for what the change does.
    """
    page.get_by_text("The page's address holds everything").wait_for()
    page.wait_for_function(
        "document.querySelector('[data-testid=stApp]').dataset.testScriptState === 'notRunning'"
        " && !document.querySelector('[data-stale=true], [data-testid=stSkeleton]')"
    )


def metric(page, label):
    """The value of a metric, as it stands."""
    return page.get_by_test_id("stMetric").filter(has_text=label).get_by_test_id("stMetricValue").inner_text()


def metric_becomes(page, label, value):
    """Wait until a metric has a value."""
    page.get_by_test_id("stMetric").filter(has_text=label).get_by_text(value, exact=True).wait_for()


def select(page, label, option):
    """Choose an option of a box."""
    box = page.get_by_role("combobox", name=label)
    box.click()
    box.fill(option)
    page.get_by_role("option", name=option, exact=True).first.click()


def shoot(page, name):
    """The whole page as a picture: the window grows to what there is to see."""
    SHOTS.mkdir(exist_ok=True)
    size = page.viewport_size
    height = page.evaluate("document.querySelector('[data-testid=stMainBlockContainer]').scrollHeight")
    page.set_viewport_size({"width": size["width"], "height": min(height + 120, 8000)})
    page.wait_for_timeout(400)  # charts are drawn when they come into view
    page.screenshot(path=SHOTS / f"{name}.png")
    page.set_viewport_size(size)


def violations(page, *, without=()):
    """What axe, the accessibility checker, has against a page: headings, labels, contrast, names, roles."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: pip install -e '.[dev]'")
    found = axe.Axe().run(page).response["violations"]
    return [(v["id"], node["html"][:200]) for v in found if v["id"] not in without for node in v["nodes"]]
