"""Many visitors at once: each sees its own figures, and the server stays small."""

from concurrent.futures import ThreadPoolExecutor

import pytest

import estimator as est
from estimator.show.formatting import size

pytest.importorskip("streamlit", reason="the page needs the app extra: pip install -e '.[app]'")
from page_server import Session, page_server, resident

from app_pages import scenarios

VISITORS = 20
MEMORY = 600e6  # bytes
MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # one recipe, so that they share their accounts
GPU = "a100-80gb-sxm"
RUN = {name: scenarios.DEFAULTS[name] for name in ("steps", "global_batch_size")}  # the sidebar's


def visit(url, number):
    """One visitor's changes; (what was shown, what the library says) after each."""
    model, found = MODELS[number % len(MODELS)], []
    session = Session(url, f"model={model}&batch_size={2 + number}")
    for batch in (2 + number, 30 + number, 60 + number):
        session.change("Micro-batch", batch)
        r = est.estimate(model, est.Plan(batch_size=batch), GPU, **RUN)
        found.append((session.metric("Memory needed"), size(r.memory.needed)))
    assert session.exceptions == []
    session.close()
    return found


def test_twenty_sessions_that_change_things_at_once():
    with page_server() as (url, process):
        with ThreadPoolExecutor(VISITORS) as pool:
            found = list(pool.map(lambda number: visit(url, number), range(VISITORS)))
        used = resident(process)
    for visitor in found:
        for shown, right in visitor:
            assert shown == right
    assert len({shown for visitor in found for shown, _ in visitor}) > VISITORS  # they did differ
    assert used < MEMORY
