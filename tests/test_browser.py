"""The page in a real browser: Debian's chromium, driven by Playwright; skipped with its reason where there is none."""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",  # it is root's in a container
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app.py", "--server.headless=true"]
    command += [f"--server.port={port}", "--server.address=127.0.0.1", "--server.fileWatcherType=none"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{url}/_stcore/health", timeout=1).close()  # noqa: S310 - our own http address
                break
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail("the server did not answer within 30 s")
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    context = browser.new_context(viewport={"width": 1440, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(40_000)
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


def ready(page):
    """Wait until the figures are drawn and the server has nothing more to say."""
    page.get_by_test_id("stMetricValue").first.wait_for()
    page.wait_for_function("!document.querySelector('[data-test-script-state=running]')")


def metric(page, label):
    return page.get_by_test_id("stMetric").filter(has_text=label).get_by_test_id("stMetricValue").inner_text()


def select(page, label, option):
    box = page.get_by_role("combobox", name=label)
    box.click()
    box.fill(option)
    page.get_by_role("option", name=option, exact=False).first.click()


def test_a_change_of_model_changes_the_figures_and_the_link_carries_it(page, address, browser):
    page.goto(address)
    ready(page)
    first = metric(page, "Memory needed")
    assert first == "29.5 GiB"
    select(page, "Model", "gpt2-medium")
    page.wait_for_function("location.search.includes('model=gpt2-medium')")
    page.get_by_role("heading", name="gpt2-medium").wait_for()
    ready(page)
    second = metric(page, "Memory needed")
    assert second != first
    other = browser.new_context().new_page()
    other.set_default_timeout(40_000)
    other.goto(page.url)
    ready(other)
    assert metric(other, "Memory needed") == second
    other.context.close()
