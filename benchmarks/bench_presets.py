"""First figures of the 20 most named presets on a running page, cold and warm, alone; and of all at once.

    python benchmarks/bench_presets.py [--all | NAME ...]

Cold: no account of the model's recipe was ever built by the server. Warm: it was. Each visitor is a new session that
speaks Streamlit's protocol as a browser does; "figures" is until the last metric is there, before the advice. A visitor
alone leaves then; those who come all at once stay. With --all or names, of each of these presets one cold visit, alone.
"""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "page")]
from page_server import Session, is_metric, page_server, resident  # noqa: E402 - from the folder of tests

import estimator as est  # noqa: E402 - from the root

PRESETS = (
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "llama-2-7b", "llama-2-13b", "llama-2-70b", "llama-3-8b",
    "llama-3.1-8b", "llama-3.1-70b", "llama-3.2-1b", "llama-3.2-3b", "mistral-7b", "mixtral-8x7b", "qwen2.5-0.5b",
    "qwen2.5-7b", "qwen3-8b", "gemma-2-9b", "phi-3-mini", "deepseek-v3",
)  # fmt: skip
# What people run: autocast to bf16, fused attention and optimizer, PyTorch's own loss, clipped gradients.
RECIPE = {"gpu": "h100-80gb-sxm", "precision": "bf16-mixed", "attention": "sdpa", "loss": "torch"}
RECIPE |= {"optimizer_impl": "fused", "max_grad_norm": 1.0}
LONGEST = 2**17  # tokens: of ten million the FLOPs are beyond 64 bits
LAST = is_metric("Energy")  # the last of the figures
ALONE, CROWD, MEMORY = 4.0, 10.0, 600e6  # seconds, seconds, bytes: what is promised


def first(url, model, *, leaving=True):
    """Seconds until a new visitor has the figures of a model in the recipe that people run."""
    m = est.preset(model)
    asked = {"model": model, **RECIPE, "seq_len": min(m.context_length, LONGEST)}
    asked |= {"attention": "naive"} if m.unfused else {}  # no fused kernel has its soft caps
    session = Session(url, urlencode(asked), until=LAST, leaving=leaving)
    session.close()
    if session.first is None:
        raise SystemExit(f"{model}: the page drew no figures: {session.exceptions}")
    return session.first


def known():
    """Those of the 20 that are presets; the others are named."""
    missing = [name for name in PRESETS if name not in est.presets()]
    if missing:
        print(f"no presets: {', '.join(missing)}")
    return [name for name in PRESETS if name in est.presets()]


def one_by_one(models):
    """A cold visit of each."""
    with page_server() as (url, process):
        cold = {}
        for model in models:
            cold[model] = first(url, model)
            print(f"{model:24} {cold[model]:8.2f} s", flush=True)
        slowest = max(cold, key=cold.get)
        over = sum(seconds > 2 for seconds in cold.values())
        print(f"{len(cold)} presets, cold: slowest {slowest} {cold[slowest]:.2f} s, {over} above 2 s")
        print(f"median {statistics.median(cold.values()):.2f} s; memory {resident(process) / 1e6:.0f} MB")


def main():
    if sys.argv[1:]:
        one_by_one(est.presets() if sys.argv[1:] == ["--all"] else sys.argv[1:])
        return
    models = known()
    print(f"{'model':22} {'cold':>8} {'warm':>8}   seconds")
    with page_server() as (url, process):
        cold = {model: first(url, model) for model in models}
        warm = {model: statistics.median(first(url, model) for _ in range(3)) for model in models}
        for model in models:
            print(f"{model:22} {cold[model]:8.2f} {warm[model]:8.2f}")
        print(f"{'slowest':22} {max(cold.values()):8.2f} {max(warm.values()):8.2f}   (limit {ALONE:g} alone)")
        print(f"memory {resident(process) / 1e6:.0f} MB after {4 * len(models)} sessions")
    with page_server() as (url, process):
        start = time.perf_counter()
        with ThreadPoolExecutor(len(models)) as pool:
            crowd = list(pool.map(lambda model: first(url, model, leaving=False), models))
        print(f"{len(models)} visitors at once, a model each, cold: slowest {max(crowd):.2f} s   (limit {CROWD:g})")
        used = resident(process) / 1e6
        print(f"all of it {time.perf_counter() - start:.1f} s, memory {used:.0f} MB   (limit {MEMORY / 1e6:.0f})")


if __name__ == "__main__":
    main()
