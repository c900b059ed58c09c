"""Random decoders and recipes: every part with every other, small and odd-sized, edges of 1 among the sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from random_plans import random_plan

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.parts import (
    ACTIVATIONS,
    LATENTS,
    MLP,
    ORDERS,
    QK_NORMS,
    SCORES,
    Attention,
    Ends,
    Experts,
    Layer,
    Norm,
    Parts,
    Pattern,
    Positions,
)

if TYPE_CHECKING:
    from random import Random

    from estimator.describe.plan import Plan


def norm(rng: Random) -> Norm:
    """Any norm."""
    kind, weight = rng.choice(("rms", "rms", "layer")), rng.choice(("plain", "plain", "plus-one", "none"))
    return Norm(kind, weight, bias=kind == "layer" and weight != "none" and rng.random() < 0.6)


def maybe(rng: Random, value: Any, share: float = 0.25) -> Any:
    """The value, or seldom; else None."""
    return value if rng.random() < share else None


def attention(rng: Random, experts: bool) -> Attention:
    """Any attention."""
    common = {
        "scale": maybe(rng, 0.3),
        "softcap": maybe(rng, 20.0, 0.15),
        "query_scaling": rng.choice(("none", "none", "none", "all", "unrotated")),
    }
    if experts and rng.random() < 0.15:
        return Attention(experts=True, **common)
    latent = rng.choice(LATENTS) if rng.random() < 0.3 else "none"
    if latent != "none":
        return Attention(latent=latent, bias=rng.random() < 0.3, out_bias=rng.random() < 0.3, **common)
    qk_norm = rng.choice((*QK_NORMS, "none", "none"))
    return Attention(
        fused=rng.random() < 0.4,
        bias=rng.random() < 0.4,
        out_bias=rng.random() < 0.4,
        clip=maybe(rng, 2.0, 0.15),
        qk_norm=qk_norm,
        qk_norm_kind=norm(rng) if qk_norm != "none" else Norm(),
        qk_norm_late=qk_norm.startswith("head") and rng.random() < 0.3,
        sinks=rng.random() < 0.15,
        out_norm=rng.random() < 0.15,
        out_gate=rng.random() < 0.2,
        **common,
    )


def mlp(rng: Random) -> MLP:
    """Any feed-forward."""
    gated = rng.random() < 0.6
    return MLP(
        gated,
        rng.choice(tuple(ACTIVATIONS)),
        bias=rng.random() < 0.4,
        fused=gated and rng.random() < 0.4,
        down_norm=rng.random() < 0.15,
    )


def experts(rng: Random) -> Experts:
    """Any mixture."""
    score, shared = rng.choice(tuple(SCORES)), rng.choice(("none", "plain", "gated"))
    return Experts(
        score,
        normalised=rng.random() < 0.5,
        correction=rng.choice(("none", "none", "buffer", "parameter")),
        grouped=rng.random() < 0.3,
        scaling=maybe(rng, 2.5),
        router_bias=rng.random() < 0.3,
        bias=rng.random() < 0.3,
        out_bias=rng.random() < 0.3,
        out_norm=rng.random() < 0.2,
        activation=rng.choice((*(name for name in ACTIVATIONS if name != "xielu"), "clamped-swiglu")),
        shared=shared,
        shared_fused=shared != "none" and rng.random() < 0.4,
        averaged=shared != "none" and rng.random() < 0.3,
    )


def pattern(rng: Random, sparse: bool) -> Pattern:
    """Up to three blocks before a cycle of up to six."""

    def layer() -> Layer:
        return Layer(
            rng.choice(("full", "full", "window", "chunk")),
            rotates=rng.random() < 0.8,
            sparse=sparse and rng.random() < 0.6,
        )

    first = tuple(layer() for _ in range(rng.choice((0, 0, 0, 1, 2, 3))))
    return Pattern(first, tuple(layer() for _ in range(rng.choice((1, 1, 2, 3, 6)))))


def model(rng: Random) -> ModelConfig:
    """Any decoder; raises ConfigError where the draw does not combine."""
    mixture = experts(rng) if rng.random() < 0.45 else None
    layers = pattern(rng, mixture is not None)
    parts = Parts(
        norm=norm(rng),
        order=rng.choice(tuple(ORDERS)),
        residual_scale=maybe(rng, 0.3),
        attention=attention(rng, mixture is not None),
        positions=Positions(
            rng.choice(("rotary", "rotary", "rotary", "learned", "alibi", "sinusoidal", "none")),
            rng.choice(("halves", "neighbours")),
            rng.choice((0, 2)),
        ),
        mlp=mlp(rng),
        experts=mixture,
        ends=Ends(
            tied=rng.random() < 0.5,
            head_bias=rng.random() < 0.2,
            embedding_norm=rng.random() < 0.2,
            embedding_scale=maybe(rng, 3.0),
            final_norm=rng.random() < 0.8,
            logits_scale=maybe(rng, 0.5),
            logits_softcap=maybe(rng, 30.0, 0.15),
            head_norm=rng.random() < 0.15,
        ),
    )
    kinds = {x.attention for x in layers.kinds}
    heads = rng.choice((1, 2, 4))
    sizes: dict[str, Any] = {
        "num_layers": rng.randint(1, 9),
        "d_model": rng.choice((7, 8, 16, 20)),
        "num_heads": heads,
        "vocab_size": rng.choice((1, 17, 101)),
        "context_length": rng.choice((1, 6, 13)),
        "sliding_window": rng.choice((1, 3, 5)) if "window" in kinds else None,
        "attention_chunk": rng.choice((1, 3, 5)) if "chunk" in kinds else None,
        "d_ff": rng.randint(1, 30) if any(not x.sparse for x in layers.kinds) else None,
        "embedding_dim": maybe(rng, 12, 0.2),
    }
    picks = 2 if mixture is not None and mixture.score == "sparse-mixer" else rng.choice((1, 2, 3))
    if parts.attention.latent != "none":
        sizes |= {
            "kv_rank": rng.choice((1, 6)),
            "rope_dim": rng.choice((2, 4)),
            "nope_dim": rng.choice((1, 6)),
            "value_dim": rng.choice((None, 4, 10)),
            "query_rank": rng.choice((1, 10)) if parts.attention.latent == "keys-and-queries" else None,
        }
    else:
        sizes["head_dim"] = rng.choice((2, 4, 8))
        sizes["num_kv_heads"] = rng.choice([k for k in (1, 2, 4) if heads % k == 0])
        if parts.attention.experts:
            sizes["num_heads"] = sizes["num_kv_heads"] * picks
        if parts.positions.kind == "rotary":
            sizes["rotary_dim"] = rng.choice((None, None, 2, 4))
    if mixture is not None:
        groups = rng.choice((1, 2, 4))
        sizes |= {
            "num_experts": groups * rng.choice((1, 2, 3)),
            "experts_per_token": picks,
            "d_expert": rng.choice((1, 6, 11)),
            "d_shared": rng.choice((1, 7)) if mixture.shared != "none" else None,
            "expert_groups": groups if mixture.grouped else None,
            "groups_per_token": rng.randint(1, groups) if mixture.grouped else None,
        }
    return ModelConfig("drawn", **sizes, parts=parts, pattern=layers)


def draw(rng: Random) -> tuple[ModelConfig, Plan]:
    """A model and a plan that go together."""
    while True:
        try:
            m = model(rng)
            tokens = rng.randint(1, m.context_length) if rng.random() < 0.4 else None
            balance = 0.0 if m.num_experts is None else rng.choice((0.0, 0.01))
            p = random_plan(rng, m, seq_len=tokens, balance=balance)
        except ConfigError:
            continue
        return m, p
