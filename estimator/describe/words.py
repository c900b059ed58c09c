"""What a model is made of, in words: "8 of 128 experts a token, 3 dense layers first, grouped-query attention 4:1"."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from estimator.describe.model import ModelConfig
    from estimator.describe.parts import Layer

GATED = {"silu": "SwiGLU", "gelu": "GeGLU", "gelu_tanh": "GeGLU", "gelu_new": "GeGLU", "relu": "ReGLU"}
PLAIN = {
    "silu": "SiLU",
    "gelu": "GELU",
    "gelu_tanh": "GELU (tanh)",
    "gelu_new": "GELU (tanh, written out)",
    "relu": "ReLU",
    "relu2": "squared ReLU",
    "xielu": "xIELU",
    "clamped-swiglu": "clamped SwiGLU",
}
NORMS = {"rms": "RMSNorm", "layer": "LayerNorm"}
ORDERS = {
    "pre": "",
    "post": " after attention and feed-forward, before they are added",
    "sandwich": " before and after attention and feed-forward",
    "post-sum": " after attention and feed-forward are added",
    "parallel": ", attention and feed-forward side by side",
    "parallel-two": ", attention and feed-forward side by side with a norm each",
}
POSITIONS = {
    "learned": "learned positions",
    "rotary": "rotary positions",
    "alibi": "ALiBi",
    "sinusoidal": "sinusoidal positions",
    "none": "no positions",
}


def in_words(m: ModelConfig) -> str:
    """The parts of a model and the sizes that tell it from others, in one line."""
    return ", ".join(phrase for part in (_layers, _attention, _feed_forward, _ends) for phrase in part(m) if phrase)


def _of_layers(m: ModelConfig, holds: Callable[[Layer], bool]) -> str:
    """For which layers something holds: "in all layers", "in 5 of 6 layers", "in 7 of 61 layers"."""
    pattern = m.rotating_pattern
    cycle = pattern.cycle
    layers = cycle if not pattern.first and m.num_layers % len(cycle) == 0 else m.layers
    count = sum(map(holds, layers))
    return f"in {'all' if count == len(layers) else f'{count} of {len(layers)}'} layers"


def _attends(kind: str) -> Callable[[Layer], bool]:
    return lambda layer: layer.attention == kind


def _layers(m: ModelConfig) -> Iterator[str]:
    yield f"{m.num_layers:,} layer{'s' if m.num_layers > 1 else ''} of width {m.d_model:,}"
    part = m.made_of.experts
    if part is None:
        return
    shared = {"none": "", "plain": " and a shared one", "gated": " and a shared one behind a gate"}[part.shared]
    yield f"{m.experts_per_token:,} of {m.num_experts:,} experts a token{shared}"
    layers = m.layers
    dense = next((i for i, layer in enumerate(layers) if layer.sparse), 0)
    if all(layer.sparse for layer in layers[dense:]):
        yield f"{dense:,} dense layer{'s' if dense > 1 else ''} first" if dense else ""
    else:
        yield f"experts {_of_layers(m, lambda layer: layer.sparse)}"


def _attention(m: ModelConfig) -> Iterator[str]:
    a, h, k = m.made_of.attention, m.num_heads, m.kv_heads
    if a.experts:
        yield f"attention by experts of {k:,} heads"
    elif a.latent != "none":
        yield f"latent attention of {h:,} heads"
    elif k == h:
        yield f"multi-head attention of {h:,} heads"
    else:
        yield f"multi-query attention of {h:,} heads" if k == 1 else f"grouped-query attention {h // k:,}:1"
    yield "QK-norm" if a.qk_norm != "none" else ""
    for kind, size in (("window", m.sliding_window), ("chunk", m.attention_chunk)):
        if any(layer.attention == kind for layer in m.layers) and size is not None:
            yield f"{kind}s of {size:,} tokens {_of_layers(m, _attends(kind))}"
    yield "attention sinks" if a.sinks else ""
    yield "attention behind a gate" if a.out_gate else ""
    yield f"scores capped at {a.softcap:g}" if a.softcap is not None else ""
    yield f"queries, keys and values clamped to {a.clip:g}" if a.clip is not None else ""
    rotary = m.made_of.positions.kind == "rotary"
    yield POSITIONS[m.made_of.positions.kind] + (f" on {m.rotated:,} of {m.e:,} of a head" if m.rotary_dim else "")
    if rotary and not all(layer.rotates for layer in m.layers):
        yield f"no positions {_of_layers(m, lambda layer: not layer.rotates)}"


def _feed_forward(m: ModelConfig) -> Iterator[str]:
    part, experts = m.made_of.mlp, m.made_of.experts
    if any(not layer.sparse for layer in m.layers):
        named = GATED.get(part.activation, f"gated {PLAIN[part.activation]}") if part.gated else PLAIN[part.activation]
        yield f"{named} feed-forward of {m.f:,}"
    if experts is not None:
        named = GATED.get(experts.activation) or PLAIN[experts.activation]
        yield f"{named} experts of {m.d_expert:,}"


def _ends(m: ModelConfig) -> Iterator[str]:
    parts = m.made_of
    kind = f"{NORMS[parts.norm.kind]}{' without a weight' if parts.norm.weight == 'none' else ''}"
    yield kind + ORDERS[parts.order]
    a, mlp = parts.attention, parts.mlp
    biased = {"attention": a.bias and a.out_bias, "feed-forward": mlp.bias, "q, k and v": a.bias and not a.out_bias}
    found = [name for name, has in biased.items() if has]
    yield f"biases in {' and '.join(found)}" if found else ""
    yield f"logits capped at {parts.ends.logits_softcap:g}" if parts.ends.logits_softcap is not None else ""
    yield "a head whose rows are normalised in each step" if parts.ends.head_norm else ""
    yield "tied embeddings" if parts.ends.tied else ""
    yield f"{m.vocab_size:,} tokens in the vocabulary"
