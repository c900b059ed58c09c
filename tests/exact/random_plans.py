"""Small models and plans at random, every setting among them."""

from estimator.describe.model import ModelConfig
from estimator.describe.plan import ATTENTIONS, CHECKPOINTINGS, LOSSES, OPTIMIZERS, PRECISIONS, Plan

ON_CPU = [name for name in ATTENTIONS if name != "sdpa-efficient"]
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


def random_plan(rng, m, **fixed):
    optimizer = rng.choice(list(OPTIMIZERS))
    precision = rng.choice([x for x in PRECISIONS if x not in ("tf32", "bf16-fsdp")])  # the same bytes; for several
    checkpointing = rng.choice(CHECKPOINTINGS)
    drawn = {
        "batch_size": rng.randint(1, 3),
        "seq_len": rng.randint(1, m.context_length),
        "precision": precision,
        "fp32_gradients": precision == "bf16-master" and rng.random() < 0.5,
        "attention": rng.choice(ON_CPU),
        "dropout": rng.choice((0.0, 0.1)),
        "loss": rng.choice(LOSSES),
        "checkpointing": checkpointing,
        "checkpoint_every": rng.choice((1, 2)) if checkpointing != "none" else 1,
        "optimizer": optimizer,
        "optimizer_impl": rng.choice(OPTIMIZERS[optimizer]),
        "grad_accumulation": rng.randint(1, 2),
        "max_grad_norm": rng.choice((None, 1.0)),
    }
    return Plan(**(drawn | fixed))
