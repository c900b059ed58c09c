"""Generation with the key/value cache against generation without, at 512 new tokens.

    python benchmarks/bench_generate.py

Greedy, batch 1, medians of interleaved repeats in one run.
"""

import statistics
import time

import torch

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.model.decoder import build_model
from trainer.model.generate import generate

TOKENS, REPEATS = 512, 3


def main():
    for family in ("gpt2", "llama"):
        torch.manual_seed(0)
        m = ModelConfig(family, 6, 384, 6, vocab_size=4096, context_length=1024, d_ff=1536)
        model = build_model(m, Plan(attention="sdpa"))
        prompt = torch.randint(m.vocab_size, (1, 16))
        seconds = {True: [], False: []}
        for _ in range(REPEATS):
            for cached, times in seconds.items():
                start = time.perf_counter()
                generate(model, prompt, TOKENS, temperature=0, use_cache=cached)
                times.append(time.perf_counter() - start)
        with_cache, without = (statistics.median(s) for s in seconds.values())
        print(
            f"{family} 6 x 384, {TOKENS} tokens: {with_cache:.2f} s with the cache, {without:.2f} s without, "
            f"{without / with_cache:.1f} times faster (at least 5)"
        )


if __name__ == "__main__":
    main()
