"""Presets against the totals that their publishers state, configuration files against what transformers would build.

The files in tests/data/hf hold the values of the models' public config.json files.
"""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.presets import SIZE_LIMIT, from_hf, preset, presets, published_parameters

HF = Path(__file__).parents[1] / "data" / "hf"

# Totals of the safetensors files on the hub, written here a second time: the data file must not be its own judge.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "cs336-tinystories": 4 * (4 * 512**2 + 3 * 512 * 1344 + 2 * 512) + 2 * 10_000 * 512 + 512,
}


def parameters(m: ModelConfig) -> int:
    """Weights and biases, matrix by matrix."""
    L, d, h, k, e, f, V, C = m.num_layers, m.d_model, m.num_heads, m.kv_heads, m.e, m.f, m.vocab_size, m.context_length
    head = 0 if m.tie_embeddings else V * d
    if m.family == "gpt2":
        block = 2 * d + (d * 3 * d + 3 * d) + (d * d + d) + 2 * d + (d * f + f) + (f * d + d)
        return V * d + C * d + L * block + 2 * d + head
    q_k_v = d * h * e + 2 * d * k * e + ((h + 2 * k) * e if m.qkv_bias else 0)
    return V * d + L * (d + q_k_v + h * e * d + d + 3 * d * f) + d + head


@pytest.mark.parametrize("name", presets())
def test_parameters_are_the_published_total(name):
    assert parameters(preset(name)) == PUBLISHED[name]
    assert published_parameters(name) == (None if name == "cs336-tinystories" else PUBLISHED[name])


def test_tinystories_is_the_assignments_model():
    assert preset("cs336-tinystories") == ModelConfig(
        family="llama",
        num_layers=4,
        d_model=512,
        num_heads=16,
        d_ff=1344,
        vocab_size=10_000,
        context_length=256,
        tie_embeddings=False,
    )


@given(st.sampled_from(presets()), st.sampled_from(["-", "_", " ", ""]), st.booleans())
def test_a_preset_is_found_in_any_spelling(name, joint, upper):
    spelled = name.replace("-", joint)
    assert preset(spelled.upper() if upper else spelled) == preset(name)


@pytest.mark.parametrize(
    ("hub", "name"),
    [
        ("openai-community/gpt2-xl", "gpt2-xl"),
        ("GPT-2 XL", "gpt2-xl"),
        ("gpt2_small", "gpt2"),
        ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
        ("Llama-2-7b-chat-hf", "llama-2-7b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("meta-llama/Llama-3.2-1B", "llama-3.2-1b"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tinyllama-1.1b"),
        ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ("Qwen/Qwen2.5-0.5B", "qwen2.5-0.5b"),
    ],
)
def test_the_hubs_name_is_understood(hub, name):
    assert preset(hub) == preset(name)


def test_no_two_presets_share_a_spelling():
    from estimator.describe.catalogue import read_data, squash

    owner = {}
    for name, entry in read_data("presets").items():
        for full in (name, *entry.get("aliases", ()), *entry.get("hub", ())):
            for spelling in (full, full.split("/")[-1]):
                assert owner.setdefault(squash(spelling), name) == name


@pytest.mark.parametrize(
    ("wrong", "near"), [("gpt2-xxl", "gpt2-xl"), ("llama3-7b", "llama-3-8b"), ("mistral", "mistral-7b")]
)
def test_an_unknown_name_is_refused_with_the_nearest(wrong, near):
    with pytest.raises(
        ConfigError, match=rf"model = '{wrong}': did you mean .*{near}.*\? allowed are .*cs336-tinystories"
    ):
        preset(wrong)
    with pytest.raises(ConfigError, match="did you mean"):
        published_parameters(wrong)


def model_or_error(read, source):
    try:
        return read(source)
    except ConfigError as error:
        return str(error)


@given(st.text())
def test_any_text_is_a_preset_or_one_clear_error(text):
    result = model_or_error(preset, text)
    assert isinstance(result, ModelConfig) or result.startswith(f"model = {text!r}: ")


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
    sizes=st.tuples(*[st.integers(1, 10**6)] * 4),
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


def test_a_sliding_window_is_read_where_all_layers_have_it():
    v1 = from_hf(HF / "mistral-7b.json")
    assert (v1.sliding_window, preset("mistral-7b-v0.3").sliding_window) == (4096, None)
    for fields, window in (
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 512}, 512),
        ({"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"model_type": "mistral", "layer_types": ["sliding_attention"] * 32}, 4096),
        ({"model_type": "qwen2"}, None),
        ({"model_type": "qwen2", "sliding_window": 512}, None),
        ({"model_type": "qwen2", "use_sliding_window": True}, None),  # the lowest 28 layers have none
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, 4096),
    ):
        assert from_hf(fields).sliding_window == window, fields
    with pytest.raises(ConfigError, match="use_sliding_window = 'yes': must be true or false"):
        from_hf({"model_type": "qwen2", "use_sliding_window": "yes"})
    with pytest.raises(ConfigError, match="sliding_window = 0: must be an integer of at least 1"):
        from_hf({"model_type": "mistral", "sliding_window": 0})


def test_gpt2_takes_the_general_names_too():
    general = {"hidden_size": 1600, "num_hidden_layers": 48, "num_attention_heads": 25, "max_position_embeddings": 1024}
    assert from_hf({"model_type": "gpt2", **general}) == preset("gpt2-xl")
    assert from_hf({"model_type": "gpt2", "n_inner": 100}).d_ff == 100
    with pytest.raises(ConfigError, match=r"hidden_size = 1600: must be n_embd, which is 768"):
        from_hf({"model_type": "gpt2", "n_embd": 768, "hidden_size": 1600})


def test_a_nested_text_config_is_the_model():
    inner = json.loads((HF / "llama-3.2-1b.json").read_text())
    assert from_hf({"model_type": "llava", "text_config": inner}) == preset("llama-3.2-1b")
    untied = from_hf({"model_type": "llava", "text_config": inner, "tie_word_embeddings": False})
    assert not untied.tie_embeddings
    with pytest.raises(ConfigError, match="model_type = 'gemma3_text'"):
        from_hf({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mixtral", {}, r"model_type = 'mixtral': .*allowed are gpt2, llama, mistral, qwen2"),
        ("Llama", {}, "did you mean llama"),
        (None, {}, r"model_type = None: allowed are gpt2, llama, mistral, qwen2"),
        (["llama"], {}, "model_type"),
        ("llama", {"attention_bias": True}, "attention_bias = True: .*output projection"),
        ("mistral", {"attention_bias": True}, "attention_bias = True"),
        ("llama", {"mlp_bias": True}, "mlp_bias = True: .*allowed is false"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("qwen2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor = 0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu': .*allowed are silu"),
        ("gpt2", {"activation_function": "relu"}, "activation_function = 'relu': .*allowed are gelu_new"),
        ("gpt2", {"activation_function": None}, "activation_function = None"),
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


@given(st.dictionaries(st.sampled_from(FIELDS), json_values), st.sampled_from(["gpt2", "llama", "mistral", "qwen2"]))
def test_any_object_is_a_model_or_one_clear_error(raw, kind):
    for config in (raw, {**raw, "model_type": kind}):
        result = model_or_error(from_hf, config)
        assert isinstance(result, ModelConfig) or result.startswith("config: ")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_model_or_one_clear_error(content):
    with pytest.raises(ConfigError, match=r"^config: "):
        from_hf(content)
