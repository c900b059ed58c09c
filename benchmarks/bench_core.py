"""Speed of the library: medians of one run on this machine, each beside its aim."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import numpy as np

SIZES = {"T": 1024, "L": 48, "d": 1600, "h": 25, "V": 50257, "n": 1}


def median_seconds(run, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def shell(*command):
    return lambda: subprocess.run(command, check=True, capture_output=True)


def fresh_account():
    from estimator import accounts, trace

    for cached in (accounts._account, trace.trace):  # noqa: SLF001 - from nothing
        cached.cache_clear()
    return accounts


def sweep(est, m, p):
    from estimator.eager.sizes import sizes_of
    from estimator.speed import times

    count = 10_000
    rng = np.random.default_rng(0)
    points = {"B": rng.integers(2, 64, count), "T": rng.integers(64, 1024, count), "L": rng.integers(3, 96, count)}
    a, on, sizes = est.account(m, p), est.accelerator("a100-80gb-sxm"), sizes_of(m, 4, 1024, "cuda", 1)
    peak = a.lambdify()

    def run():
        peak(**SIZES | points)
        times(a, sizes | points, p, on)

    print(f"{f'sweep of {count:,}: peak and predicted time':54} {median_seconds(run, 5):10.2f} s    aim      2.0 s")


def main():
    import estimator as est

    m, p = est.preset("gpt2-xl"), est.Plan(batch_size=4)
    rows = []
    python = median_seconds(shell(sys.executable, "-c", "pass"), 5)
    imported = median_seconds(shell(sys.executable, "-c", "import estimator"), 5)
    used = median_seconds(shell(sys.executable, "-c", "import estimator; estimator.account"), 5)
    rows.append(("import estimator", imported - python, 0.6))
    rows.append(("import estimator and all that account needs (sympy)", used - python, 0.6))
    rows.append(("account from nothing", median_seconds(lambda: fresh_account().account(m, p), 7), 2.0))
    a = est.account(m, p)
    a.evaluate(m, p)
    rows.append(("estimate on a known account", median_seconds(lambda: est.estimate(m, p, mfu=0.5), 201), 1e-3))
    rows.append(("the same with its time predicted", median_seconds(lambda: est.estimate(m, p), 201), 5e-3))
    command = shell(sys.executable, "-m", "estimator.cli", "gpt2-xl")
    rows.append(("estimate gpt2-xl from the shell", median_seconds(command, 5), 1.5))
    for what, seconds, aim in rows:
        print(f"{what:54} {seconds * 1e3:10.2f} ms   aim {aim * 1e3:8.1f} ms")
    sweep(est, m, p)
    f = a.lambdify()
    count = 1_000_000
    rng = np.random.default_rng(0)
    batches = rng.integers(1, 64, count)
    h, e = rng.integers(2, 64, count), 2 * rng.integers(4, 64, count)
    everything = {
        "B": batches, "T": rng.integers(64, 8192, count), "L": rng.integers(3, 96, count), "h": h, "d": h * e,
        "f": rng.integers(64, 50_000, count), "V": rng.integers(100, 200_000, count), "n": 1,
    }  # fmt: skip
    for what, letters in (("batch", {**SIZES, "B": batches}), ("every size", everything)):
        f(**letters)
        rate = count / median_seconds(lambda letters=letters: f(**letters), 5)
        print(f"lambdify, {what} varied{'':{35 - len(what)}} {rate / 1e6:8.2f} M configurations/s   aim 1 M")


if __name__ == "__main__":
    main()
