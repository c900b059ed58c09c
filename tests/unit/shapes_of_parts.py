"""The tensors of a model, shape by shape, enumerated from its parts without any code of the estimator's accounts."""

from math import prod


def _norm(norm, width):
    return [] if norm.weight == "none" else [(width,)] * (2 if norm.bias else 1)


def _linear(out, inputs, bias):
    return [(out, inputs)] + ([(out,)] if bias else [])


def _feed_forward(mlp, d, f):
    up = 2 if mlp.gated else 1
    shapes = _linear(up * f, d, mlp.bias) if mlp.fused else _linear(f, d, mlp.bias) * up
    shapes += _linear(d, f, mlp.bias)
    shapes += [(f,)] if mlp.down_norm else []
    return shapes + ([(1,), (1,)] if mlp.activation == "xielu" else [])


def _attention(m):
    a, d, h, k, e = m.parts.attention, m.d_model, m.num_heads, m.num_kv_heads, m.head_dim
    if a.experts:
        wide = k * e
        shapes = [(m.num_experts, wide, d), (m.num_experts, d, wide), (d,), (m.num_experts, d), (2 * wide, d)]
    elif a.latent != "none":
        shapes = [*_linear(m.kv_rank + m.rope_dim, d, a.bias), (m.kv_rank,)]
        shapes += [(h * (m.nope_dim + m.value_dim), m.kv_rank)]
        if a.latent == "keys-and-queries":
            shapes += [*_linear(m.query_rank, d, a.bias), (m.query_rank,), (h * e, m.query_rank)]
        else:
            shapes += [(h * e, d)]
        shapes += _linear(d, h * m.value_dim, a.out_bias)
    else:
        wide = [(h + 2 * k) * e] if a.fused else [h * e, k * e, k * e]
        shapes = [shape for width in wide for shape in _linear(width, d, a.bias)]
        shapes += _linear(d, h * e, a.out_bias)
    if a.qk_norm == "head":
        shapes += _norm(a.qk_norm_kind, e) * 2
    elif a.qk_norm == "width":
        shapes += _norm(a.qk_norm_kind, h * e) + _norm(a.qk_norm_kind, k * e)
    elif a.qk_norm == "head-own":
        shapes += [(h, e), (k, e)] * len(_norm(a.qk_norm_kind, e))
    shapes += [(h * e,)] if a.out_norm else []
    shapes += [(h * e, d)] if a.out_gate else []
    return shapes + ([(h,)] if a.sinks else [])


def _experts(m):
    x, d, n, f = m.parts.experts, m.d_model, m.num_experts, m.d_expert
    shapes = [(n, 2 * f, d), (n, d, f), *_linear(n, d, x.router_bias)]
    shapes += [(n, 2 * f), (n, d)] if x.bias else []
    shapes += [(d,)] if x.out_bias else []
    shapes += [(d,)] if x.out_norm else []
    shapes += [(n,)] if x.correction == "parameter" else []
    up = [(2 * m.d_shared, d)] if x.shared_fused else [(m.d_shared, d)] * 2 if m.d_shared else []
    shapes += [*up, (d, m.d_shared)] if x.shared != "none" else []
    return shapes + ([(1, d)] if x.shared == "gated" else [])


def _block(m, layer):
    norms = {"pre": 2, "post": 2, "post-sum": 2, "sandwich": 4, "parallel": 1, "parallel-two": 2}[m.parts.order]
    feed_forward = _experts(m) if layer.sparse else _feed_forward(m.parts.mlp, m.d_model, m.d_ff)
    return _norm(m.parts.norm, m.d_model) * norms + _attention(m) + feed_forward


def blocks(m):
    """The shapes of each block."""
    return [_block(m, layer) for layer in m.layers]


def around(m):
    """The shapes of what is before the first block and after the last."""
    p, d, V = m.parts, m.d_model, m.vocab_size
    wide = m.embedding_dim or d
    found = [(V, wide)]
    found += [(d, wide), (wide, d)] if wide != d else []
    found += [(m.context_length + p.positions.extra_rows, d)] if p.positions.kind == "learned" else []
    found += _norm(p.norm, d) if p.ends.embedding_norm else []
    found += _norm(p.norm, d) if p.ends.final_norm else []
    found += [] if p.ends.tied else [(V, wide)]
    return found + ([(V,)] if p.ends.head_bias else [])


def shapes(m):
    """The shape of every parameter, each once."""
    return around(m) + [shape for block in blocks(m) for shape in block]


def parameters(m):
    """Numbers in all of them; blocks that are alike are enumerated once."""
    kinds = {layer: sum(map(prod, _block(m, layer))) for layer in set(m.layers)}
    return sum(map(prod, around(m))) + sum(kinds[layer] for layer in m.layers)
