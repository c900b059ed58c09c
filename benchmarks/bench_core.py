"""Speed of the library: medians of one run on this machine, each beside its aim.

    python benchmarks/bench_core.py [--recipes 200]

With --recipes it times nothing but the account from nothing of so many recipes drawn at random, and names the slowest.
"""

from __future__ import annotations

import argparse
import random
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


def forget():
    """Empty every cache of the library."""
    for name, module in list(sys.modules.items()):
        if name.startswith("estimator"):
            for cached in vars(module).values():
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()
    from estimator.accounting import accounts

    accounts._known._found.clear()  # noqa: SLF001 - from nothing


def account_from_nothing(est, m, p, device="cuda"):
    """Seconds that it takes."""
    forget()
    start = time.perf_counter()
    est.account(m, p, device)
    return time.perf_counter() - start


def recipes(est, count, seed=0):
    """Models, plans and devices at random; a micro-batch of 1, which takes the ledger of the general sizes as well."""
    from estimator.describe.plan import OPTIMIZERS
    from estimator.describe.settings import choices

    rng = random.Random(seed)  # noqa: S311 - recipes, not secrets
    while count:
        plan = {name: rng.choice(names) for name, names in choices(est.Plan).items()}
        plan["optimizer_impl"] = rng.choice(OPTIMIZERS[plan["optimizer"]])
        m, device = est.preset(rng.choice(("gpt2-xl", "llama-3-8b"))), rng.choice(("cpu", "cuda"))
        several = {"data_parallel": 8} if plan["sharding"] != "none" else {}
        try:
            p = est.Plan(**plan, **several, grad_accumulation=rng.choice((1, 2)), dropout=rng.choice((0.0, 0.1)))
            p.attention_kernel(device)
        except est.ConfigError:  # refused together
            continue
        count -= 1
        yield m, p, device


def slowest(est, count):
    def seconds(case):
        return account_from_nothing(est, *case)

    est.account(est.preset("gpt2"), est.Plan())  # imports
    timed = sorted(((seconds(case), case) for case in recipes(est, count)), key=lambda pair: -pair[0])
    again = [(statistics.median(seconds(case) for _ in range(3)), case) for _, case in timed[:5]]
    worst, (m, p, device) = max(again, key=lambda pair: pair[0])
    middle = statistics.median(took for took, _ in timed)
    print(f"account from nothing, {count} recipes: median {middle:.2f} s, slowest {worst:.2f} s    aim 3.0 s")
    changed = {name: value for name, value in p.to_dict().items() if value != est.Plan().to_dict()[name]}
    print(f"the slowest, the median of three more times: {m.family}, {device}, {changed}")


def sweep(est, m, p):
    from estimator.accounting.sizes import sizes_of
    from estimator.timing.speed import times

    count = 10_000
    rng = np.random.default_rng(0)
    points = {"B": rng.integers(2, 64, count), "T": rng.integers(64, 1024, count), "L": rng.integers(3, 96, count)}
    a, on, sizes = est.account(m, p), est.accelerator("a100-80gb-sxm"), sizes_of(m, 4, 1024, 1)
    peak = a.lambdify()

    def run():
        peak(**SIZES | points)
        times(a, sizes | points, p, on)

    print(f"{f'sweep of {count:,}: peak and predicted time':54} {median_seconds(run, 5):10.2f} s    aim      2.0 s")


def main():
    import estimator as est

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=int, metavar="N", help="time the accounts of N recipes instead")
    arguments = parser.parse_args()
    if arguments.recipes:
        slowest(est, arguments.recipes)
        return
    m, p = est.preset("gpt2-xl"), est.Plan(batch_size=4)
    rows = []
    python = median_seconds(shell(sys.executable, "-c", "pass"), 5)
    imported = median_seconds(shell(sys.executable, "-c", "import estimator"), 5)
    used = median_seconds(shell(sys.executable, "-c", "import estimator; estimator.account"), 5)
    rows.append(("import estimator", imported - python, 0.6))
    rows.append(("import estimator and all that account needs (sympy)", used - python, 0.6))
    a = est.account(m, p)  # imports
    rows.append(("account from nothing", statistics.median(account_from_nothing(est, m, p) for _ in range(7)), 0.3))
    a.evaluate(m, p)
    rows.append(("estimate on a known account", median_seconds(lambda: est.estimate(m, p, mfu=0.5), 201), 1e-3))
    rows.append(("the same with its time predicted", median_seconds(lambda: est.estimate(m, p), 201), 5e-3))
    command = shell(sys.executable, "-m", "estimator", "gpt2-xl")
    rows.append(("estimate gpt2-xl from the shell", median_seconds(command, 5), 1.3))
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
        print(f"lambdify, {what} varied{'':{35 - len(what)}} {rate / 1e6:8.2f} M configurations/s   aim 2 M")


if __name__ == "__main__":
    main()
