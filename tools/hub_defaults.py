"""What the configuration classes of `estimator.describe.hub` take where a file is silent, from the files on the hub.

For `python tools/hf_defaults.py`. Each is the class of the configuration file that lies beside the weights.
"""

LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "rope_scaling": None,
}
OLD_FALCON = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_head_kv": None,
    "max_position_embeddings": 2048,
    "ffn_hidden_size": None,
    "multi_query": False,
    "alibi": False,
    "bias": False,
    "parallel_attn": False,
    "tie_word_embeddings": True,
}
OLD_FALCON_ALSO = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
LING = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "use_qkv_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "head_dim": 128,
    "rope_scaling": None,
}

# The class, the names that it takes for its own, and its defaults beside those of a llama or of another.
OF_THE_HUB = {
    "RefinedWeb": ("RW", OLD_FALCON_ALSO, OLD_FALCON),
    "RefinedWebModel": ("RW", OLD_FALCON_ALSO, OLD_FALCON),
    "Yi": ("Yi", {}, LLAMA | {"vocab_size": 64000, "max_position_embeddings": 4096}),
    "aquila": ("Aquila", {}, LLAMA | {"vocab_size": 100008}),
    "baichuan": (
        "Baichuan",
        {},
        {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
        | {"vocab_size": 64000, "max_position_embeddings": None, "model_max_length": 4096},
    ),
    "bailing_moe": (
        "BailingMoe",
        {},
        LING
        | {
            "vocab_size": 30592,
            "hidden_size": 1024,
            "intermediate_size": None,
            "num_hidden_layers": 24,
            "num_key_value_heads": 0,
            "max_position_embeddings": 16384,
            "num_experts": 16,
            "num_shared_experts": 0,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": None,
            "first_k_dense_replace": 0,
            "head_dim": None,
            "norm_head": False,
        },
    ),
    "bailing_moe_v2": (
        "BailingMoeV2",
        {},
        LING
        | {
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
        },
    ),
    "chatglm": (
        "ChatGLM",
        {"num_hidden_layers": "num_layers"},
        {
            "num_layers": 28,
            "padded_vocab_size": 65024,
            "hidden_size": 4096,
            "ffn_hidden_size": 13696,
            "kv_channels": 128,
            "num_attention_heads": 32,
            "seq_length": 2048,
            "rmsnorm": True,
            "post_layer_norm": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "multi_query_attention": False,
            "multi_query_group_num": 1,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": False,
        },
    ),
    "deepseek": (
        "Deepseek",
        {},
        LLAMA
        | {
            "vocab_size": 102400,
            "moe_intermediate_size": 1407,
            "n_shared_experts": None,
            "n_routed_experts": None,
            "num_experts_per_tok": None,
            "moe_layer_freq": 1,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "scoring_func": "softmax",
            "attention_bias": False,
        },
    ),
    "hf_olmo": (
        "OLMo",
        {"num_attention_heads": "n_heads", "num_hidden_layers": "n_layers", "hidden_size": "d_model"},
        {
            "d_model": 768,
            "n_heads": 12,
            "n_kv_heads": None,
            "n_layers": 12,
            "mlp_ratio": 4,
            "mlp_hidden_size": None,
            "activation_type": "swiglu",
            "alibi": False,
            "rope": False,
            "clip_qkv": None,
            "multi_query_attention": None,
            "layer_norm_type": "default",
            "layer_norm_with_affine": True,
            "bias_for_layer_norm": None,
            "include_bias": True,
            "max_sequence_length": 1024,
            "vocab_size": 50257,
            "embedding_size": 50304,
            "weight_tying": True,
            "rope_scaling": None,
        },
    ),
    "internlm": ("InternLM", {}, LLAMA | {"vocab_size": 103168, "bias": True}),
    "internlm2": ("InternLM2", {}, LLAMA | {"vocab_size": 103168, "bias": True}),
    "minicpm": (
        "MiniCPM",
        {},
        LLAMA
        | {
            "tie_word_embeddings": True,
            "attention_bias": False,
            "scale_emb": 1,
            "dim_model_base": 1,
            "scale_depth": 1,
        },
    ),
    "orion": (
        "Orion",
        {},
        LLAMA
        | {
            "vocab_size": 84608,
            "intermediate_size": 15360,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
            "max_position_embeddings": 4096,
            "attention_bias": False,
        },
    ),
    "skywork": ("Skywork", {}, LLAMA),
    "stablelm_epoch": (
        "StableLMEpoch",
        {"rope_pct": "partial_rotary_factor"},
        LLAMA
        | {
            "vocab_size": 50304,
            "intermediate_size": 6912,
            "hidden_size": 2560,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "use_qkv_bias": False,
            "partial_rotary_factor": 0.25,
        },
    ),
    "xverse": (
        "Xverse",
        {},
        LLAMA
        | {
            "vocab_size": 100278,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "max_position_embeddings": 8192,
        },
    ),
}
