"""One server and one browser for all tests that look at the page as a person does."""

import pytest


@pytest.fixture(scope="session")
def address():
    from page_server import page_server

    with page_server() as (url, _):
        yield url


@pytest.fixture(scope="session")
def browser():
    from page_browser import CHROMIUM, FLAGS

    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[dev]'")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield browser
        browser.close()
