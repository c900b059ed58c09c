"""The weights of a model of transformers under the bundled decoder's names and layouts.

Sources: the modeling files of transformers 5.24. Where a family's code fuses, interleaves or transposes, it is undone
here; everything else is a change of names.
"""

from __future__ import annotations

import re

import torch

NORMS = {  # by the order of a block, what the norms are called; the first that is there
    "pre": {
        "attention_norm": r"input_layernorm|ln_1|self_attn_layer_norm|(norm_attn_norm\.)?norm_1|attention_layernorm"
        r"|layernorm1",
        "ffn_norm": r"post_attention_layernorm|ln_2|final_layer_norm|(norm_attn_norm\.)?norm_2"
        r"|feedforward_layernorm|layernorm2|pre_feedforward_layernorm",
    },
    "parallel": {"attention_norm": r"input_layernorm|ln_1"},
    "parallel-two": {"attention_norm": r"input_layernorm|ln_attn", "ffn_norm": r"post_attention_layernorm|ln_mlp"},
    "post": {"attention_post_norm": r"post_attention_layernorm", "ffn_post_norm": r"post_feedforward_layernorm"},
    "post-sum": {
        "attention_post_norm": r"ln_1|self_attn_layer_norm",
        "ffn_post_norm": r"ln_2|final_layer_norm",
    },
    "sandwich": {
        "attention_norm": r"input_layernorm",
        "attention_post_norm": r"post_attention_layernorm",
        "ffn_norm": r"pre_feedforward_layernorm",
        "ffn_post_norm": r"post_feedforward_layernorm",
    },
    "glm4": {
        "attention_norm": r"input_layernorm",
        "attention_post_norm": r"post_self_attn_layernorm",
        "ffn_norm": r"post_attention_layernorm",
        "ffn_post_norm": r"post_mlp_layernorm",
    },
    "afmoe": {
        "attention_norm": r"input_layernorm",
        "attention_post_norm": r"post_attention_layernorm",
        "ffn_norm": r"pre_mlp_layernorm",
        "ffn_post_norm": r"post_mlp_layernorm",
    },
    "hyperclovax": {
        "attention_norm": r"input_layernorm",
        "attention_post_norm": r"post_norm1",
        "ffn_norm": r"post_attention_layernorm",
        "ffn_post_norm": r"post_norm2",
    },
}
ATTENTION = r"(self_attn|self_attention|attn\.attention|norm_attn_norm\.attn|attention|attn|multi_head_attention)\."
MLP = r"(mlp|ffn|feed_forward|block_sparse_moe)\."
IN_A_BLOCK = {
    "attention.router.weight": r"self_attention\.experts\.router\.layer",
    "attention.queries": r"self_attention\.experts\.input_linear",
    "attention.outputs": r"self_attention\.experts\.output_linear",
    "attention.out_bias": r"self_attention\.experts",
    "attention.kv": ATTENTION + "kv_proj",
    "attention.qkv": ATTENTION + r"(query_key_value|c_attn|Wqkv|qkv_proj)",
    "attention.q": ATTENTION + r"(q_proj|Wq)",
    "attention.k": ATTENTION + r"(k_proj|Wk)",
    "attention.v": ATTENTION + r"(v_proj|Wv)",
    "attention.q_norm": ATTENTION + r"(q_norm|query_layernorm|q_layernorm|q_a_layernorm)",
    "attention.k_norm": ATTENTION + r"(k_norm|key_layernorm|k_layernorm)",
    "attention.q_down": ATTENTION + "q_a_proj",
    "attention.q_up": ATTENTION + "q_b_proj",
    "attention.kv_down": ATTENTION + "kv_a_proj_with_mqa",
    "attention.kv_norm": ATTENTION + "kv_a_layernorm",
    "attention.kv_up": ATTENTION + "kv_b_proj",
    "attention.out_norm": ATTENTION + "attn_sub_norm",
    "attention.out_gate": ATTENTION + "gate_proj",
    "attention.out": ATTENTION + r"(o_proj|out_proj|dense|c_proj)",
    "attention.sinks": ATTENTION + "sinks",
    "ffn.router.correction": MLP + r"(gate\.moe_statics\.e_score_correction_bias|expert_bias)",
    "ffn.out_norm": MLP + "post_mlp_layernorm",
    "ffn.router": MLP + r"(gate|router)(\.wg|\.layer|\.gate)?",
    "ffn.experts.gate_up": MLP + r"(experts\.gate_up_proj|input_linear)",
    "ffn.experts.gate_up_bias": MLP + r"experts\.gate_up_proj_bias",
    "ffn.experts.down": MLP + r"(experts\.down_proj|output_linear)",
    "ffn.experts.down_bias": MLP + r"experts\.down_proj_bias",
    "ffn.out_bias": "mlp",
    "ffn.shared_gate": MLP + "shared_expert_gate",
    "ffn.shared.gate_up": r"shared_mlp\.input_linear",
    "ffn.shared.gate": MLP + r"(shared_experts?|shared_mlp)\.gate_proj",
    "ffn.shared.up": MLP + r"(shared_experts?|shared_mlp)\.up_proj",
    "ffn.shared.down": rf"{MLP}(shared_experts?|shared_mlp)\.down_proj|shared_mlp\.output_linear",
    "ffn.gate_up": MLP + r"gate_up_proj|shared_mlp\.input_linear",
    "ffn.gate": MLP + "gate_proj",
    "ffn.up": rf"({MLP}(up_proj|c_fc|fc1|fc_in|dense_h_to_4h|0)|fc1)",
    "ffn.down": rf"({MLP}(down_proj|c_proj|fc2|fc_out|dense_4h_to_h|2)|fc2|shared_mlp\.output_linear)",
    "ffn.down_norm": MLP + "ffn_sub_norm",
    "ffn.activation.alpha_p": MLP + r"act_fn\.alpha_p",
    "ffn.activation.alpha_n": MLP + r"act_fn\.alpha_n",
}
OUTSIDE = {
    "embedding.weight": r".*(embed_tokens|wte|word_embeddings|embed_in|tokens_embed|transformer\.w)",
    "embedding_norm": r".*word_embeddings_layernorm",
    "positions.weight": r".*(wpe|embed_positions|positions_embed)",
    "project_in.weight": r".*project_in",
    "project_out.weight": r".*project_out",
    "final_norm": r".*\.(norm|ln_f|final_layer_norm|final_layernorm|norm_f|layer_norm|layernorm)",
    "head": r"lm_head",
}
TRANSPOSED = ("gpt2", "openai-gpt")  # their Conv1D holds [in, out]


INTERLEAVED = (
    "bloom",
    "gpt_neox",
    "falcon",
    "gpt_bigcode",
    "persimmon",
)  # of each head its query, key and value, unless there is one key


def renamed(name, order, own):
    """Ours of a parameter's name in transformers."""
    inside = re.search(r"\.(\d+)\.", name)
    table = {**NORMS[order], **IN_A_BLOCK} if inside else OUTSIDE
    start, rest = (f"blocks.{inside[1]}.", name[inside.end() :]) if inside else ("", name)
    stem = re.sub(r"\.(weight|bias)$", "", rest)
    for ours, theirs in table.items():
        if re.fullmatch(theirs, stem):
            full = start + ours
            found = next((one for one in (full + rest[len(stem) :], full) if one in own), None)
            if found is not None:
                return found
    raise KeyError(name)


def each_heads_norms(theirs):
    """StableLM's norms of single heads (h of e) as one of (h, e)."""
    joined, heads = {}, {}
    for name, x in theirs.items():
        if match := re.fullmatch(r"(.*)\.norms\.\d+(\.weight)", name):
            heads.setdefault(match[1] + match[2], []).append(x)
        else:
            joined[name] = x
    return joined | {name: torch.stack(xs) for name, xs in heads.items()}


def laid_out(name, x, m):
    """A parameter in our layout."""
    family = m.family
    if family in TRANSPOSED and x.ndim == 2 and name.endswith(("qkv.weight", "out.weight", "up.weight", "down.weight")):
        return x.T
    if ".qkv." in name and family in INTERLEAVED and not (family != "bloom" and m.kv_heads == 1):
        k, e, g = m.kv_heads, m.e, m.num_heads // m.kv_heads
        by_head = x.unflatten(0, (k, g + 2, e))
        return torch.cat([by_head[:, :g].flatten(0, 2), by_head[:, g].flatten(0, 1), by_head[:, g + 1].flatten(0, 1)])
    if ".qkv." in name and family == "codegen":  # four parts, each with its queries, values and keys
        q, v, k = x.unflatten(0, (4, 3, -1)).unbind(1)
        return torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])
    if name.endswith(("q.weight", "k.weight")) and family == "nanochat":  # it rotates the other way round
        return x.unflatten(0, (-1, 2, m.e // 2)).flip(1).flatten(0, 2)
    if family == "ernie4_5_moe" and name.endswith("correction"):
        return x[0]
    if family in ("aria_text", "gpt_oss", "llama4_text") and name.endswith(("experts.gate_up", "experts.down")):
        x = x.transpose(1, 2)
    if family == "gpt_oss" and "experts.gate_up" in name:
        return torch.cat([x[:, 0::2], x[:, 1::2]], 1)
    return x


def dbrx_experts(theirs, m):
    """Its three matrices of all experts in ours of two."""
    found = {}
    for i in range(m.num_layers):
        w1, v1, w2 = (
            theirs.pop(f"transformer.blocks.{i}.ffn.experts.mlp.{name}").unflatten(0, (m.num_experts, m.d_expert))
            for name in ("w1", "v1", "w2")
        )
        found[f"blocks.{i}.ffn.experts.gate_up"] = torch.cat([w1, v1], 1)
        found[f"blocks.{i}.ffn.experts.down"] = w2.transpose(1, 2)
    return found


def copy_weights(model, theirs, m):
    """Fill `model`, of the configuration `m`, with the named parameters of transformers' model: each of them once."""
    own, theirs = dict(model.named_parameters()), each_heads_norms(theirs)
    found = dbrx_experts(theirs, m) if m.family == "dbrx" else {}
    order = {"kolibri1": "glm4"}.get(m.family, m.family)
    order = order if order in NORMS else m.made_of.order
    for name, x in theirs.items():
        ours = renamed(name, order, own)
        assert ours not in found, (name, ours)
        found[ours] = laid_out(ours, x, m)
    assert found.keys() == own.keys(), found.keys() ^ own.keys()
    with torch.no_grad():
        for name, x in found.items():
            assert own[name].shape == x.shape, (name, own[name].shape, x.shape)
            own[name].copy_(x)
