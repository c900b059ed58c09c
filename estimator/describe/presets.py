"""Published models by name, and models read from a Hugging Face `config.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from estimator.describe.catalogue import read_data, squash, unknown
from estimator.describe.checks import ConfigError, choose, positive_int
from estimator.describe.model import ModelConfig

SIZE_LIMIT = 5_000_000  # bytes; a config.json has a few thousand, so anything larger is another file
GPT2_NAMES = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
GPT2_NAMES |= {"max_position_embeddings": "n_positions", "n_ctx": "n_positions"}

# What each configuration class of transformers takes where a file is silent: configuration_<type>.py, read at commits
# 01ae98a (gpt2), 008e574 (llama, qwen2) and 001f85b (mistral). None for key/value heads means multi-head.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 50_257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
DEFAULTS["mistral"] = DEFAULTS["llama"] | {
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
DEFAULTS["qwen2"] = DEFAULTS["llama"] | {
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}

# Settings that change the step in a way that a ModelConfig cannot say: (field, the one value that is allowed, why).
REFUSED: dict[str, tuple[tuple[str, object, str], ...]] = {
    "gpt2": (
        ("add_cross_attention", False, "the model would have a second attention in each block"),
        ("scale_attn_weights", True, "the family scales its attention scores"),
        ("scale_attn_by_inverse_layer_idx", False, "the blocks would not be alike"),
        ("reorder_and_upcast_attn", False, "the scores would be cast"),
    ),
    "llama": (
        ("attention_bias", False, "it puts a bias on the output projection too, which the family does not have"),
        ("mlp_bias", False, "the family has no bias in its feed-forward"),
        ("partial_rotary_factor", 1, "the family turns whole heads"),
    ),
}
REFUSED["mistral"] = REFUSED["llama"]
REFUSED["qwen2"] = (("partial_rotary_factor", 1, "the family turns whole heads"),)

WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers")  # what `_sliding_window` reads

# Other spellings of the same function: the tanh approximation of GELU, and SiLU.
ACTIVATIONS = {"gpt2": ("gelu_new", "gelu_pytorch_tanh"), "llama": ("silu", "swish")}


def presets() -> tuple[str, ...]:
    """The names that `preset` knows, by family and size."""
    return tuple(read_data("presets"))


def preset(name: str) -> ModelConfig:
    """The published model `name`.

    Case, spaces, `-` and `_` do not matter ("GPT-2 XL" is "gpt2-xl"), and the hub's name ("meta-llama/Llama-2-7b-hf",
    with or without its organisation) is understood. The source of each shape stands in `data/presets.toml`.

    Raises:
        ConfigError: no such model; the nearest names come first.
    """
    entry = read_data("presets")[_find(name)]
    return ModelConfig(**{key: value for key, value in entry.items() if key not in ("hub", "aliases", "parameters")})


def published_parameters(name: str) -> int | None:
    """The total number of parameters that the model's publisher states; None where none is stated.

    Raises:
        ConfigError: no such model.
    """
    total: int | None = read_data("presets")[_find(name)].get("parameters")
    return total


def from_hf(source: str | Path | bytes | Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face configuration describes. The file is data: nothing in it is run.

    A field that the file leaves out has the default of its `model_type`'s class, as in transformers. Read from a nested
    `text_config` where there is one (the text part of a multimodal model, without the rest). Not part of a ModelConfig,
    and ignored, is what changes neither bytes nor FLOPs of a training step: how rotary angles are scaled and the norm's
    epsilon. Dropout is ignored too: the step is trained without. A sliding window is read where all layers have it;
    where only some do (`layer_types`, or qwen2's `max_window_layers` between none and all), all are taken without.

    Args:
        source: the path of a config.json or of its folder, the file's content (bytes), or the parsed object.

    Raises:
        ConfigError: not readable as a JSON object in UTF-8, larger than 5 MB, a `model_type` other than gpt2, llama,
            mistral or qwen2, or a value that the families cannot represent.
    """
    where, raw = _read(source)
    try:
        return _model(raw)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _model(raw: Mapping[str, Any]) -> ModelConfig:
    nested = raw.get("text_config")
    if isinstance(nested, Mapping) and raw.get("model_type") not in tuple(DEFAULTS):
        # The outer class ties the head, by its own setting; inside, that key is what the text part was exported with.
        outer = {key: raw[key] for key in ("tie_word_embeddings",) if key in raw}
        raw = {**nested, **outer}
    kind = choose("model_type", raw.get("model_type"), tuple(DEFAULTS))
    if kind == "gpt2":
        raw = _one_name_each(raw)
    rope = raw.get("rope_parameters")
    if isinstance(rope, Mapping) and "partial_rotary_factor" in rope:
        raw = {**raw, "partial_rotary_factor": rope["partial_rotary_factor"]}
    for field, allowed, why in REFUSED[kind]:
        if raw.get(field, allowed) not in (allowed, None):
            raise ConfigError(f"{field} = {raw[field]!r}: {why}; allowed is {json.dumps(allowed)}")
    silent = [field for field in DEFAULTS[kind] if field not in raw]
    values = DEFAULTS[kind] | {field: raw[field] for field in DEFAULTS[kind] if field in raw}
    family = "gpt2" if kind == "gpt2" else "llama"
    activation = "activation_function" if family == "gpt2" else "hidden_act"
    choose(activation, values[activation], ACTIVATIONS[family])
    if not isinstance(values["tie_word_embeddings"], bool):
        raise ConfigError(f"tie_word_embeddings = {values['tie_word_embeddings']!r}: must be true or false")
    window = _sliding_window(kind, raw.get("layer_types"), values)
    optional = ("n_inner", "num_key_value_heads", "head_dim")
    for field, value in values.items():
        if field not in (activation, "tie_word_embeddings", *WINDOW) and not (value is None and field in optional):
            positive_int(field, value)
    try:
        return _gpt2(values) if family == "gpt2" else _llama(values, window, qkv_bias=kind == "qwen2")
    except ConfigError as error:
        taken = f" (the file is silent on {', '.join(silent)}: {kind}'s own defaults)" if silent else ""
        raise ConfigError(f"{error}{taken}") from None


def _gpt2(v: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        num_layers=v["n_layer"],
        d_model=v["n_embd"],
        num_heads=v["n_head"],
        d_ff=v["n_inner"],
        vocab_size=v["vocab_size"],
        context_length=v["n_positions"],
        tie_embeddings=v["tie_word_embeddings"],
    )


def _sliding_window(kind: str, layer_types: object, v: Mapping[str, Any]) -> int | None:
    """The window that all layers have; None where no layer has one, or not all of them have.

    A qwen2's lowest `max_window_layers` have none, unless `layer_types` says otherwise (configuration_qwen2.py).
    """
    window, used = v.get("sliding_window"), v.get("use_sliding_window", True)
    if not isinstance(used, bool):
        raise ConfigError(f"use_sliding_window = {used!r}: must be true or false")
    if window is None or not used:
        return None
    if isinstance(layer_types, list) and layer_types:
        everywhere = all(name == "sliding_attention" for name in layer_types)
    else:
        everywhere = kind != "qwen2" or v["max_window_layers"] == 0
    return positive_int("sliding_window", window) if everywhere else None


def _llama(v: dict[str, Any], window: int | None, *, qkv_bias: bool) -> ModelConfig:
    return ModelConfig(
        family="llama",
        num_layers=v["num_hidden_layers"],
        d_model=v["hidden_size"],
        num_heads=v["num_attention_heads"],
        num_kv_heads=v["num_key_value_heads"],
        head_dim=v["head_dim"],
        d_ff=v["intermediate_size"],
        vocab_size=v["vocab_size"],
        context_length=v["max_position_embeddings"],
        tie_embeddings=v["tie_word_embeddings"],
        qkv_bias=qkv_bias,
        sliding_window=window,
    )


def _one_name_each(raw: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-2's sizes under GPT-2's own names; its class takes the general ones as well."""
    own = dict(raw)
    for general, name in GPT2_NAMES.items():
        if general in raw and own.setdefault(name, raw[general]) != raw[general]:
            raise ConfigError(f"{general} = {raw[general]!r}: must be {name}, which is {own[name]!r}, or be left out")
    return own


def _read(source: str | Path | bytes | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What to call the source in an error, and the JSON object in it."""
    if isinstance(source, Mapping):
        return "config", source
    if isinstance(source, bytes):
        where, content = "config", source
    elif isinstance(source, (str, Path)):
        where, content = f"config file {str(source)!r}", _content(Path(source))
    else:
        raise ConfigError(f"config = {source!r}: must be a path, the bytes of a file or a dict")
    if len(content) > SIZE_LIMIT:
        raise ConfigError(f"{where}: larger than {SIZE_LIMIT:,} bytes, so it is no config.json")
    try:
        raw = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError(f"{where}: must be JSON in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: is not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be a JSON object, not {type(raw).__name__}")
    return where, raw


def _content(path: Path) -> bytes:
    """At most one byte more than the limit of the file at `path`, or of config.json in the folder at `path`."""
    try:
        path = path / "config.json" if path.is_dir() else path
        if path.is_file() or not path.exists():  # a missing file gets the system's own words; a device is never opened
            with path.open("rb") as file:
                return file.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null byte in the name
        raise ConfigError(f"config file {str(path)!r}: cannot be read ({error})") from None
    raise ConfigError(f"config file {str(path)!r}: must be a regular file")


def _find(name: str) -> str:
    found = _spellings().get(squash(name)) if isinstance(name, str) else None
    if found is None:
        raise unknown("model", str(name), _spellings(), presets())
    return found


@cache
def _spellings() -> dict[str, str]:
    """Squashed preset name, alias or hub name, with and without its organisation -> preset name."""
    return {
        squash(spelling): name
        for name, entry in read_data("presets").items()
        for full in (name, *entry.get("aliases", ()), *entry.get("hub", ()))
        for spelling in (full, full.split("/")[-1])
    }
