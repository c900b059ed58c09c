"""`saved_on_host`: what autograd saves is copied to the host, as `torch.autograd.graph.save_on_cpu` does it.

On a CPU both memories are one: the bytes of accelerator and host together are those of the real step.
"""

import json
import random
from pathlib import Path

import pytest

import estimator as est
from estimator.accounting.accounts import account
from estimator.describe.checks import ConfigError
from estimator.describe.hf import from_hf
from estimator.describe.settings import drawn

TINY = Path(__file__).parents[1] / "data" / "hf" / "tiny.jsonl"
FAMILIES = ("gpt2", "llama", "opt", "gemma2", "falcon", "mixtral", "cohere", "phi3", "deepseek_v3")


def models():
    rows = [json.loads(line) for line in TINY.read_text().splitlines()]
    by_family = {row["family"]: row["config"] for row in rows}
    return [from_hf(by_family[name]) for name in FAMILIES if name in by_family]


def recipe(rng, m):
    while True:
        try:
            return drawn(
                est.Plan,
                rng,
                accepts=lambda p: account(m, p, "cpu"),  # adapters beside layers that the model has, too
                saved_on_host=True,
                data_parallel=1,
                sharding="none",
                base_precision="none",
                seq_len=rng.randint(1, min(20, m.context_length)),
            )
        except ConfigError:
            continue


@pytest.mark.parametrize("seed", range(12))
def test_random_recipes_are_exact(seed):
    torch = pytest.importorskip("torch")
    from trainer.referee.measure import build_step, nbytes, onednn, peak_growth

    rng = random.Random(seed)
    m = models()[seed % len(models())]
    p = recipe(rng, m)
    step = build_step(m, p)
    step()
    with onednn(enabled=False):
        step()
        real = nbytes(step.resident()) + peak_growth(step, "cpu")
    assert account(m, p, "cpu").evaluate(m, p, threads=torch.get_num_threads()).peak_bytes == real, p


def test_on_a_card_the_host_has_what_is_saved_and_its_link_takes_time():
    m = est.preset("llama-3.2-1b")
    p = est.Plan(precision="bf16", attention="sdpa", seq_len=2048, batch_size=4)
    here, there = (est.estimate(m, p.replace(saved_on_host=x), "a100-80gb-sxm") for x in (False, True))
    assert there.memory.needed < here.memory.needed
    assert there.memory.host >= here.values.activation_bytes  # a tensor that is saved twice is there twice
    # It goes and comes back at the link's 32 GB/s, while nothing else runs.
    longer = there.time.seconds_per_step - here.time.seconds_per_step
    assert longer == pytest.approx(2 * there.memory.host / 31.5e9, rel=0.05)
    assert any("The host keeps" in note for note in there.notes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sharding": "zero3", "data_parallel": 2}, "saved_on_host"),
        ({"tensor_parallel": 2}, "saved_on_host"),
        ({"adapter": "lora", "base_precision": "nf4"}, "saved_on_host"),
    ],
)
def test_what_it_is_not_known_with_is_refused(changes, says):
    with pytest.raises(ConfigError, match=says):
        est.Plan(saved_on_host=True, **changes)
