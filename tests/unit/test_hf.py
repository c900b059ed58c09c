"""Configuration files against what transformers would build of them.

The files in tests/data/hf hold the values of the models' public config.json files.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError
from estimator.describe.families import FAMILIES
from estimator.describe.fields import class_defaults
from estimator.describe.hf import SIZE_LIMIT, TakenForAnother, from_hf
from estimator.describe.model import ModelConfig
from estimator.describe.parts import Layer, Pattern
from estimator.describe.presets import preset

HF = Path(__file__).parents[1] / "data" / "hf"


def model_or_error(read, source):
    try:
        return read(source)
    except ConfigError as error:
        return str(error)


@pytest.mark.parametrize("path", sorted(HF.glob("*.json")), ids=lambda path: path.stem)
def test_a_real_file_gives_its_preset_however_it_is_handed_over(path):
    expected = preset(path.stem)
    assert from_hf(path) == from_hf(str(path)) == expected
    assert from_hf(path.read_bytes()) == from_hf(json.loads(path.read_text())) == expected


def test_a_folder_is_read_by_its_config_json(tmp_path):
    (tmp_path / "config.json").write_bytes(
        b"\xef\xbb\xbf" + (HF / "gpt2-xl.json").read_bytes()
    )  # with a byte-order mark
    assert from_hf(tmp_path) == preset("gpt2-xl")


# What the classes of transformers take where a file is silent (configuration_gpt2.py and so on).
def test_class_defaults():
    assert from_hf({"model_type": "gpt2"}) == preset("gpt2")
    llama = from_hf({"model_type": "llama"})
    assert (llama.num_kv_heads, llama.d_ff, llama.vocab_size, llama.context_length) == (32, 11_008, 32_000, 2048)
    mistral = from_hf({"model_type": "mistral"})
    assert (mistral.num_kv_heads, mistral.d_ff, mistral.vocab_size, mistral.context_length) == (
        8,
        14_336,
        32_000,
        131_072,
    )
    qwen = from_hf({"model_type": "qwen2"})
    assert (qwen.num_kv_heads, qwen.d_ff, qwen.vocab_size, qwen.context_length) == (32, 22_016, 151_936, 32_768)
    assert [m.tie_embeddings for m in (llama, mistral, qwen)] == [False] * 3
    assert [m.qkv_bias for m in (llama, mistral, qwen)] == [False, False, True]


@given(st.sampled_from([1, 2, 4, 8, 12, 16]), st.sampled_from(["llama", "mistral", "qwen2"]))
def test_key_value_heads_that_are_null_mean_multi_head(heads, kind):
    m = from_hf(
        {"model_type": kind, "num_attention_heads": heads, "hidden_size": 64 * heads, "num_key_value_heads": None}
    )
    assert m.num_kv_heads == heads


def test_key_value_heads_that_are_absent_are_the_class_default():
    small = {"hidden_size": 256, "num_attention_heads": 4}
    assert from_hf({"model_type": "llama", **small}).num_kv_heads == 4
    with pytest.raises(ConfigError, match=r"num_kv_heads = 8: must divide .*silent on .*num_key_value_heads.*mistral"):
        from_hf({"model_type": "mistral", **small})


@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2"]),
    kv=st.integers(1, 4),
    groups=st.integers(1, 4),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    width=st.integers(1, 999),
    sizes=st.tuples(st.integers(1, 1000), *[st.integers(1, 10**6)] * 3),
    tied=st.booleans(),
    window=st.one_of(st.none(), st.integers(1, 4096)),
)
def test_every_size_of_a_file_arrives(*, kind, kv, groups, head_dim, width, sizes, tied, window):
    layers, ffn, vocab, positions = sizes
    m = from_hf(
        {
            "model_type": kind,
            "num_hidden_layers": layers,
            "hidden_size": width,
            "num_attention_heads": kv * groups,
            "num_key_value_heads": kv,
            "head_dim": head_dim,
            "intermediate_size": ffn,
            "vocab_size": vocab,
            "max_position_embeddings": positions,
            "tie_word_embeddings": tied,
            "sliding_window": window,
            "use_sliding_window": True,
            "max_window_layers": 0,
        }
    )
    assert m == ModelConfig(
        "llama",
        *(layers, width, kv * groups, vocab, positions, kv, head_dim, ffn, tied, kind == "qwen2"),
        sliding_window=None if kind == "llama" else window,
    )


WINDOW, FULL = Layer("window"), Layer()


@pytest.mark.parametrize(
    ("fields", "window", "pattern"),
    [
        ({"model_type": "mistral"}, 4096, None),
        ({"model_type": "mistral", "sliding_window": None}, None, None),
        ({"model_type": "mistral", "sliding_window": 512}, 512, None),
        ({"model_type": "mistral", "sliding_window": 131_072}, None, None),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 32}, 4096, None),
        (
            {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"] * 16},
            4096,
            Pattern(cycle=(WINDOW, FULL)),
        ),
        ({"model_type": "qwen2"}, None, None),
        ({"model_type": "qwen2", "sliding_window": 512}, None, None),
        ({"model_type": "qwen2", "use_sliding_window": True}, 4096, Pattern((FULL,) * 28, (WINDOW,))),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, 4096, None),
        ({"model_type": "qwen2_moe", "use_sliding_window": True, "max_window_layers": 3}, 4096, "first 3"),
        ({"model_type": "gemma3_text"}, 4096, Pattern(cycle=(WINDOW,) * 5 + (FULL,))),
        ({"model_type": "gemma3_text", "sliding_window": 131_072}, None, Pattern(cycle=(FULL,) * 6)),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2}, 4096, Pattern(cycle=(WINDOW, FULL))),
        ({"model_type": "cwm"}, 8192, Pattern(cycle=(FULL, WINDOW, WINDOW, WINDOW))),
        ({"model_type": "gpt_neo"}, 256, Pattern(cycle=(FULL, WINDOW))),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 24]]}, None, None),
        ({"model_type": "cohere2"}, 4096, Pattern(cycle=(WINDOW,) * 3 + (Layer(rotates=False),))),
        ({"model_type": "smollm3"}, None, Pattern(cycle=(FULL,) * 3 + (Layer(rotates=False),))),
        (
            {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8},
            8,
            Pattern(cycle=(FULL,) * 3 + (Layer("window", rotates=False),)),
        ),
        ({"model_type": "deepseek_v3"}, None, Pattern((FULL,) * 3, (Layer(sparse=True),))),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, None, Pattern(cycle=(FULL, Layer(sparse=True)))),
        ({"model_type": "qwen3_moe", "use_sliding_window": True}, 4096, None),
    ],
)
def test_the_kinds_of_layers_are_those_of_the_class(fields, window, pattern):
    m = from_hf(fields)
    assert m.sliding_window == window
    if pattern == "first 3":  # the first, third, ... of the layers below max_window_layers
        assert [layer.attention for layer in m.layers[:4]] == ["window", "full", "window", "full"]
    else:
        assert m.pattern == pattern


def test_llama_4_has_chunks_where_it_rotates():
    m = from_hf({"model_type": "llama4_text", "interleave_moe_layer_step": 2})
    chunk = Layer("chunk")
    assert m.attention_chunk == 8192
    assert m.layers[:4] == (chunk, replace(chunk, sparse=True), chunk, Layer(rotates=False, sparse=True))
    assert m.made_of.attention.query_scaling == "unrotated"
    assert (
        from_hf({"model_type": "llama4_text", "attn_temperature_tuning": False}).made_of.attention.query_scaling
        == "none"
    )


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"model_type": "gpt_neox"}, 24),  # a quarter of 96
        ({"model_type": "gpt_neox", "rotary_pct": 0.5}, 48),
        ({"model_type": "gpt_neox", "rotary_pct": 1.0}, None),
        ({"model_type": "phi", "hidden_size": 2560, "partial_rotary_factor": 0.4}, 32),
        ({"model_type": "phi3", "rope_parameters": {"partial_rotary_factor": 0.75}}, 72),
        ({"model_type": "glm4_moe", "head_dim": 128}, 64),
        ({"model_type": "minimax_m2", "rotary_dim": 64}, 64),
        ({"model_type": "minimax_m2"}, None),
        ({"model_type": "gptj"}, 64),
        ({"model_type": "stablelm"}, 20),
        ({"model_type": "llama"}, None),
    ],
)
def test_the_part_of_a_head_that_is_rotated(fields, part):
    assert from_hf(fields).rotary_dim == part


def test_null_and_absent_are_two_things():
    assert from_hf({"model_type": "deepseek_v2", "num_experts_per_tok": 6}).query_rank == 1536
    null = from_hf({"model_type": "deepseek_v2", "num_experts_per_tok": 6, "q_lora_rank": None})
    assert (null.query_rank, null.made_of.attention.latent) == (None, "keys")
    with pytest.raises(ConfigError, match="num_experts_per_tok = None: must be an integer of at least 1"):
        from_hf({"model_type": "deepseek_v2"})


def test_constants_of_a_family():
    gemma = from_hf({"model_type": "gemma2"}).made_of
    assert (gemma.attention.scale, gemma.attention.softcap, gemma.ends.logits_softcap) == (1 / 16, 50, 30)
    assert gemma.ends.embedding_scale == 48
    granite = from_hf({"model_type": "granite", "logits_scaling": 8, "residual_multiplier": 0.22}).made_of
    assert (granite.ends.logits_scale, granite.residual_scale, granite.attention.scale) == (0.125, 0.22, 1)
    assert from_hf({"model_type": "gpt_neo"}).made_of.attention.scale == 1
    yarn = {"factor": 40, "mscale_all_dim": 0.707}
    scale = from_hf({"model_type": "deepseek_v3", "rope_scaling": yarn}).made_of.attention.scale
    assert scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * math.log(40) + 1) ** 2)


def test_gpt2_takes_the_general_names_too():
    general = {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25, "max_position_embeddings": 1024}
    assert from_hf({"model_type": "gpt2", **general}) == preset("gpt2-xl")
    assert from_hf({"model_type": "gpt2", "n_inner": 100}).d_ff == 100
    with pytest.raises(ConfigError, match=r"hidden_size = 1600: must be n_embd, which is 768"):
        from_hf({"model_type": "gpt2", "n_embd": 768, "hidden_size": 1600})


def test_a_model_around_a_text_is_refused_and_says_how_to_ask_for_the_text():
    inner = json.loads((HF / "llama-3.2-1b.json").read_text())
    with pytest.raises(
        ConfigError, match=r"model_type = 'llava': .*text_config.*lost.*passing the object in text_config"
    ):
        from_hf({"model_type": "llava", "text_config": inner})
    with pytest.raises(ConfigError, match="a vision part beside the text"):
        from_hf({**inner, "vision_config": {"hidden_size": 8}})
    assert from_hf(inner) == preset("llama-3.2-1b")


def test_an_unknown_type_is_taken_for_the_family_of_its_class_and_that_is_said():
    inner = json.loads((HF / "llama-3.2-1b.json").read_text())
    for kind in ("own", None):
        with pytest.warns(TakenForAnother, match=f"model_type = {kind!r}: .* taken for llama, whose class LlamaFor"):
            m = from_hf({**inner, "model_type": kind, "architectures": ["LlamaForCausalLM"]})
        assert m == preset("llama-3.2-1b")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtrall", {}, r"model_type = 'mixtrall': allowed are the \d+ families that `estimate list fam"),
        ("Llama", {}, r"model_type = 'Llama': did you mean llama\? allowed are"),
        ("mimo", {}, "model_type = 'mimo': .* the nearest that can be asked is qwen2"),
        (
            "encoder-decoder",
            {"encoder": {"model_type": "bert"}, "decoder": {"model_type": "gpt2"}},
            "made of others .encoder: 'bert', decoder: 'gpt2'., which would be lost",
        ),
        ("llama", {"draft_model": {"model_type": "eagle"}}, "made of others .draft_model: 'eagle'"),
        ("diffllama", {"architectures": ["LlamaForCausalLM"]}, "its attention is the difference of two"),
        (
            "own",
            {"architectures": ["LlamaForCausalLM"], "auto_map": {"AutoModel": "x"}},
            "LlamaForCausalLM, the class of llama; .* give model_type",
        ),
        ("own", {"architectures": ["LlamaForCausalLM"], "mm_vision_tower": "x"}, "a vision part beside the text"),
        ("own", {"architectures": ["NoneForCausalLM"]}, "model_type = 'own': allowed are"),
        ("own", {"auto_map": {}, "is_encoder_decoder": True}, "model_type = 'own': an encoder-decoder"),
        (None, {}, r"model_type = None: .*allowed are the \d+ families that `estimate list fam"),
        (None, {"peft_type": "LORA", "r": 8}, "this is an adapter's configuration; ask about the model that it adapts"),
        (None, {"dim": 4096, "n_layers": 32}, "this is Meta's or Mistral's own params.json"),
        (None, {"n_layer": 12, "n_head": 12, "n_embd": 768}, 'a gpt2; if it is one, give model_type "gpt2"'),
        (None, {"temperature": 0.6}, "this is a file that says how text is generated; config.json lies beside it"),
        ("llama", {"num_local_experts": 8}, "num_local_experts = 8: llama's class does not read it, so experts would"),
        ("llama", {"qk_layernorm": True}, "qk_layernorm = True: .* norms on queries and keys would be lost"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0: .*a soft cap on logits would be"),
        ("mixtral", {"first_k_dense_replace": 2}, "first_k_dense_replace = 2: .* dense layers before those with"),
        ("mixtral", {"n_shared_experts": 1}, "n_shared_experts = 1: .* a shared expert would be lost; allowed is 0"),
        ("qwen2", {"kv_lora_rank": 512}, "kv_lora_rank = 512: .* latent attention would be lost"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "ForSequenceClassification has a head of its"),
        ("granitemoehybrid", {}, "layer_types: a file of the family without it means mamba layers throughout"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, "a hybrid, with mamba layers beside attention"),
        ("kimi_k2", {}, 'a deepseek_v3 under a name of its own; give model_type "deepseek_v3"'),
        ("chatglm", {"position_encoding_2d": True}, "the first ChatGLM has positions of two kinds"),
        ("minicpm", {"num_experts": 8}, "num_experts = 8: it would be MiniCPM-MoE"),
        ("hf_olmo", {"layer_norm_type": "amd_compatible"}, "layer_norm_type = 'amd_compatible': allowed are default"),
        ("hf_olmo", {"layer_norm_type": []}, r"layer_norm_type = \[\]: allowed are default"),
        ("hf_olmo", {"mlp_hidden_size": 3}, "mlp_hidden_size = 3: gate and up share its rows; must be even"),
        (["llama"], {}, "model_type"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("phi3", {"lm_head_bias": True}, "lm_head_bias = True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"layer_types": ["sliding_attention"] * 32}, "layer_types: the family's layers are all alike"),
        (
            "gemma2",
            {"layer_types": ["full_attention"]},
            "layer_types: must be a list with one entry for each of the 26",
        ),
        ("gemma2", {"layer_types": ["linear_attention"] * 26}, "model_type = 'gemma2': a hybrid, with linear att"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"hidden_act": "mish"}, "hidden_act = 'mish': .*allowed are silu"),
        ("gpt2", {"activation_function": None}, "activation_function = None"),
        ("gpt_neox", {"head_dim": 5}, "head_dim = 5: gpt_neox's class has heads of d / h"),
        ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi = False: .* allowed is true"),
        ("gpt_neo", {"attention_types": [[["up"], 24]]}, "attention_types = .*: must be pairs of kinds"),
        ("smollm3", {"no_rope_layers": [2] * 36}, "no_rope_layers: 2 is none of 0, 1"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000: must be at most 1,000"),
        ("qwen2", {"use_sliding_window": "yes"}, "use_sliding_window = 'yes': must be true or false"),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be an integer of at least 1"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2}}, "moe_normalize_expert_weights = 2"),
        ("hunyuan_v1_moe", {"num_experts": [2, 3]}, r"num_experts = \[2, 3\]: must be an integer"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn = True"),
        ("llama", {"hidden_size": "4096"}, "hidden_size = '4096': must be an integer of at least 1"),
        ("llama", {"hidden_size": 4096.0}, "hidden_size = 4096.0"),
        ("llama", {"hidden_size": None}, "hidden_size = None"),
        ("llama", {"vocab_size": 0}, "vocab_size = 0"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers = True"),
        ("gpt2", {"n_head": -1}, "n_head = -1"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': must be true or false"),
        ("llama", {"head_dim": 127}, "head_dim = 127: rotary"),
        (
            "llama",
            {"hidden_size": 100, "num_attention_heads": 3},
            r"d_model = 100: must be divisible by num_heads \(3\)",
        ),
    ],
)
def test_what_cannot_be_represented_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        from_hf({"model_type": kind, **change})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\x80\x02}q\x00.", "must be JSON in UTF-8"),
        ("{}".encode("utf-16"), "must be JSON in UTF-8"),
        (b"[1, 2]", "must be a JSON object, not list"),
        (b'"llama"', "must be a JSON object, not str"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b" " * (SIZE_LIMIT + 1), "larger than 5,000,000 bytes"),
        (b"__import__('os').system('true')", "is not JSON"),
    ],
    ids=["empty", "cut", "pickle", "utf-16", "list", "string", "deep", "digits", "large", "code"],
)
def test_a_broken_file_is_one_clear_error(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ConfigError, match=message):
            from_hf(source)


@pytest.mark.parametrize("source", ["no/such/file.json", "meta-llama/Llama-2-7b-hf", "a\0b", "x" * 5000, "/dev/zero"])
def test_a_path_that_cannot_be_read_is_one_clear_error(source):
    with pytest.raises(ConfigError, match=r"config file .*: (cannot be read|must be a regular file)"):
        from_hf(source)


def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="must be a regular file"):
        from_hf(tmp_path)


@pytest.mark.parametrize("source", [None, 3, ["llama"]])
def test_something_that_is_no_source_is_refused(source):
    with pytest.raises(ConfigError, match="must be a path, the bytes of a file or a dict"):
        from_hf(source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
FIELDS = [
    "model_type",
    "hidden_size",
    "n_embd",
    "num_attention_heads",
    "num_key_value_heads",
    "text_config",
    "head_dim",
]
FIELDS += ["tie_word_embeddings", "hidden_act", "activation_function", "rope_parameters", "mlp_bias", "vocab_size"]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_object_is_a_model_or_one_clear_error(raw):
    result = model_or_error(from_hf, raw)
    assert isinstance(result, ModelConfig) or result.startswith("config: ")


@given(st.data(), st.sampled_from(tuple(FAMILIES)))
def test_any_values_of_a_familys_fields_are_a_model_or_one_clear_error(data, kind):
    known = [*class_defaults()[kind]["defaults"], *class_defaults()[kind]["also"], "layer_types", "rope_scaling"]
    raw = data.draw(st.dictionaries(st.sampled_from(known), json_values, max_size=3))
    result = model_or_error(from_hf, {**raw, "model_type": kind})
    assert isinstance(result, ModelConfig) or result.startswith("config: ")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_model_or_one_clear_error(content):
    with pytest.raises(ConfigError, match=r"^config: "):
        from_hf(content)
