"""The page's speed: server start, first figures, a change of a size and of a recipe, and memory with 20 sessions.

    python benchmarks/bench_page.py

Sessions speak Streamlit's protocol as a browser does, so that what is timed is the server's work; a browser adds its
own drawing. "figures" is until the metrics are there, "all" until the last advice is.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "page"))
from page_server import Session, is_metric, page_server, resident

REPEATS = 7
VISITORS = 20
ENERGY = is_metric("Energy")  # the last of the figures


def main():
    start = time.perf_counter()
    with page_server() as (url, process):
        row("server answers the first request", time.perf_counter() - start, 3)
        start = time.perf_counter()
        session = Session(url, until=ENERGY)
        row("first figures of the first visitor", session.first, 2)
        print(f"{'  and everything':44} {time.perf_counter() - start:7.2f} s")
        sizes = [session.change("Micro-batch", 2 + i, ENERGY) for i in range(REPEATS)]
        row("a size changes: figures", statistics.median(sizes[1:]), 0.3)
        row(
            "a size changes: all", statistics.median(session.change("Micro-batch", 20 + i) for i in range(REPEATS)), 0.3
        )
        row("a recipe of the list of changes: figures", session.change("Attention", "sdpa", ENERGY), 2.5)
        session.change("Attention", "naive")
        other = Session(url, "model=llama-3.2-1b&attention=sdpa&checkpointing=block&optimizer=lion", until=ENERGY)
        row("a recipe and a family never seen: figures", other.first, 2.5)
        again = [session.change("Attention", name, ENERGY) for name in ("sdpa", "naive") * 3]
        row("a recipe changes, again: figures", statistics.median(again), 0.3)
        again = [session.change("Attention", name) for name in ("sdpa", "naive") * 3]
        row("a recipe changes, again: all", statistics.median(again), 0.3)
        start = time.perf_counter()
        with ThreadPoolExecutor(VISITORS) as pool:
            list(pool.map(lambda number: visit(url, number), range(VISITORS)))
        print(f"{f'{VISITORS} sessions at once, three runs each':44} {time.perf_counter() - start:7.2f} s")
        print(f"{f'memory after {VISITORS} sessions at once':44} {resident(process) / 1e6:7.0f} MB  (limit 600 MB)")


def visit(url, number):
    """A visitor who changes a size twice."""
    session = Session(url, f"batch_size={2 + number}&model={'gpt2-xl' if number % 2 else 'gpt2'}")
    session.change("Micro-batch", 30 + number)
    session.change("Micro-batch", 60 + number)
    session.close()


def row(what, seconds, limit):
    print(f"{what:44} {seconds:7.2f} s   (limit {limit} s)")


if __name__ == "__main__":
    main()
