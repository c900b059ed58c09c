"""`get_batch` against the loop of slices that scripts write, and against itself on a corpus 100 times as long.

    python benchmarks/bench_data.py

Medians of interleaved repeats in one run; the page cache is warm, as after the first seconds of a training run.
"""

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from trainer.files.data import get_batch

B, T, REPEATS = 64, 1024, 200
SHORT, LONG = 1_000_000, 100_000_000


def loop_of_slices(dataset, batch_size, context_length):
    starts = np.random.default_rng().integers(len(dataset) - context_length, size=batch_size)
    inputs = torch.stack([torch.from_numpy(dataset[i : i + context_length].astype(np.int64)) for i in starts])
    targets = torch.stack([torch.from_numpy(dataset[i + 1 : i + 1 + context_length].astype(np.int64)) for i in starts])
    return inputs, targets


def main():
    with tempfile.TemporaryDirectory() as folder:
        corpora = {}
        for n in (SHORT, LONG):
            path = Path(folder) / f"{n}.bin"
            np.random.default_rng(0).integers(50257, size=n, dtype=np.uint16).tofile(path)
            corpora[n] = np.memmap(path, dtype=np.uint16, mode="r")
        subjects = {
            "loop of slices": lambda: loop_of_slices(corpora[LONG], B, T),
            f"get_batch, {LONG:,} tokens": lambda: get_batch(corpora[LONG], B, T, "cpu"),
            f"get_batch, {SHORT:,} tokens": lambda: get_batch(corpora[SHORT], B, T, "cpu"),
        }
        seconds = {name: [] for name in subjects}
        for _ in range(REPEATS):
            for name, run in subjects.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    loop, long, short = (statistics.median(s) for s in seconds.values())
    for name, s in seconds.items():
        print(f"{name:32} {1e6 * statistics.median(s):8.0f} us")
    print(
        f"loop / get_batch = {loop / long:.1f} (at least 3); long corpus / short = {long / short:.2f} (flat: about 1)"
    )


if __name__ == "__main__":
    main()
