"""Small models and plans at random, every setting among them."""

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.settings import drawn

PARTS = ("embedding", "attention", "feed-forward", "norms", "head", "blocks")


def random_model(rng):
    heads, layers = rng.choice((1, 2, 4)), rng.randint(1, 9)
    vocabulary, context = rng.choice((1, 17, 101)), rng.choice((1, 6, 13))
    window = rng.choice((None, None, 3))
    if rng.random() < 0.4:
        width = heads * rng.choice((1, 3, 8))
        return ModelConfig(
            "gpt2", layers, width, heads, vocabulary, context, d_ff=rng.randint(1, 40), sliding_window=window
        )
    kv_heads = rng.choice([k for k in (1, 2, 4) if heads % k == 0])
    head_dim = rng.choice((2, 4, 6))
    width = rng.choice((heads * head_dim, 7, 24))
    tied, bias = rng.random() < 0.5, rng.random() < 0.5
    return ModelConfig(
        "llama", layers, width, heads, vocabulary, context, kv_heads, head_dim, rng.randint(1, 40), tied, bias, window
    )


def random_parts(rng, m):
    """One to three names of parts or ranges of layers."""
    found = []
    for _ in range(rng.randint(1, 3)):
        first = rng.randrange(m.num_layers)
        found.append(rng.choice((*PARTS, f"layers:{first}-{rng.randrange(first, m.num_layers)}")))
    return ",".join(found)


WHOLE_MODEL = {"trained": "all", "frozen": "", "adapter": "none", "sharding": "none"}


def on_a_cpu(p, m):
    """Raise ConfigError for what one process on a CPU does not run."""
    p.check_model(m)
    p.attention_kernel("cpu", m)
    if p.implementation != "bundled":
        raise ConfigError(f"implementation = {p.implementation!r}: not the trainer's")
    if p.precision == "tf32":
        raise ConfigError("precision = 'tf32': the bytes of fp32")


def random_plan(rng, m, **fixed):
    """Any recipe of the whole model; `fixed` is given."""
    fixed = {"seq_len": rng.randint(1, m.context_length)} | WHOLE_MODEL | fixed
    return drawn(Plan, rng, accepts=lambda p: on_a_cpu(p, m), **fixed)
