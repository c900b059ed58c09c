"""Models read from a Hugging Face `config.json`. The file is data: nothing in it is run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import PATH_SHOWN, ConfigError, shown
from estimator.describe.families import FAMILIES
from estimator.describe.fields import Fields
from estimator.describe.lost import nothing_lost
from estimator.describe.model import ModelConfig
from estimator.describe.parts import FAMILIES as NAMED
from estimator.describe.parts import MLP, Attention, Ends, Experts, Layer, Parts, Pattern, Positions
from estimator.describe.refusals import built_of, refusal
from estimator.describe.rules import Rule, size

if TYPE_CHECKING:
    from estimator.describe.family import Family


class TakenForAnother(UserWarning):
    """A file says another type than the family that it was read as."""


SIZE_LIMIT = 5_000_000  # bytes; a config.json has a few thousand, so anything larger is another file

# Settings that no class of a decoder is read with: (field, the one value that is allowed, why).
REFUSED = (
    ("is_encoder_decoder", False, "the model would be an encoder-decoder; read are decoders alone"),
    ("add_cross_attention", False, "the model would have a second attention in each block"),
    ("use_bidirectional_attention", False, "a token would see those after it"),
)


_OF_EXPERTS = ("num_experts", "experts_per_token", "d_expert", "d_shared", "expert_groups", "groups_per_token")


def _first(*names: str) -> Rule:
    """The size under the first of these names that the class has."""
    return lambda c: c.size(next(name for name in names if c.knows(name)))


# The sizes of a ModelConfig, where a family has no rule of its own.
SIZES: dict[str, Rule] = {
    "num_layers": lambda c: c.layers,
    "d_model": size("hidden_size"),
    "num_heads": size("num_attention_heads"),
    "vocab_size": size("vocab_size"),
    "context_length": size("max_position_embeddings"),
    "num_kv_heads": lambda c: c.size_or_none("num_key_value_heads") if c.knows("num_key_value_heads") else None,
    "d_ff": size("intermediate_size"),
    "num_experts": _first("num_experts", "num_local_experts", "n_routed_experts"),
    "experts_per_token": size("num_experts_per_tok"),
    "d_expert": _first("moe_intermediate_size", "intermediate_size"),
}


def _sizes(c: Fields, family: Family, *, sparse: bool, dense: bool) -> dict[str, Any]:
    heads: dict[str, Rule] = {"head_dim": lambda c: c.size_or_none("head_dim") if family.free_heads else None}
    wanted = {
        name: rule
        for name, rule in {**SIZES, **heads, **family.sizes}.items()
        if (sparse or name not in _OF_EXPERTS) and (dense or name != "d_ff")
    }
    return {name: rule(c) if callable(rule) else rule for name, rule in wanted.items()}


def from_hf(source: str | Path | bytes | Mapping[str, Any]) -> ModelConfig:
    """The model that a Hugging Face configuration describes. The file is data: nothing in it is run.

    What each family is made of stands in `estimator.describe.families`. A field that the file leaves out has the
    default of its `model_type`'s class, as in transformers. Not part of a ModelConfig, and ignored, is what changes
    neither bytes nor FLOPs of a training step: how rotary angles are scaled, the norm's epsilon, how the file's own
    weights are stored (`quantization_config`). Dropout is ignored too: the step is trained without. So are layers that
    predict further tokens (`num_nextn_predict_layers`), which transformers does not build. A `model_type` that is in no
    table is taken for the family whose class `architectures` names, and a warning says so.

    Args:
        source: the path of a config.json or of its folder, the file's content (bytes), or the parsed object.

    Raises:
        ConfigError: not readable as a JSON object in UTF-8, larger than 5 MB, a `model_type` that is not a decoder
            of the families (the message says what it is), another model within the file, or a value that the parts
            cannot represent.
    """
    where, raw = _read(source)
    try:
        return read_config(raw)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The model of a parsed config.json.

    Raises:
        ConfigError: as `from_hf`.
    """
    reason = refusal(raw, tuple(FAMILIES))
    if reason:
        raise ConfigError(reason)
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        taken = built_of(raw, tuple(FAMILIES))
        assert taken is not None
        cls, family = taken
        warnings.warn(
            f"model_type = {shown(kind)}: not a type that is read; taken for {family}, whose class {cls} architectures "
            "names",
            TakenForAnother,
            stacklevel=3,
        )
        kind = family
    return _model(kind, FAMILIES[kind], Fields.of(kind, raw))


def essential(source: bytes | Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json without those that the model is the same without: short enough for a link.

    Raises:
        ConfigError: as `from_hf`.
    """
    _, raw = _read(source)
    kept = dict(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TakenForAnother)
        model = read_config(raw)
        for field in raw:
            without = {name: value for name, value in kept.items() if name != field}
            with suppress(ConfigError):
                kept = without if read_config(without) == model else kept
    return kept


def _model(kind: str, family: Family, c: Fields) -> ModelConfig:
    for field, allowed, why in (*REFUSED, *family.refused):
        _refuse(c.raw, field, allowed, why)
    layers = _layers(family, c)
    sparse, dense = any(layer.sparse for layer in layers), not all(layer.sparse for layer in layers)
    parts = _parts(family, c, sparse=sparse, dense=dense)
    nothing_lost(kind, c, parts, layers)
    sizes = _sizes(c, family, sparse=sparse, dense=dense)
    for attention, name in (("window", "sliding_window"), ("chunk", "attention_chunk")):
        if any(layer.attention == attention for layer in layers):
            sizes[name] = c.size(family.window)
    sizes |= _rotated(family, c, sizes, parts)
    if not family.free_heads and c.raw.get("head_dim") not in (None, sizes["d_model"] // sizes["num_heads"]):
        raise ConfigError(f"head_dim = {shown(c.raw['head_dim'])}: {kind}'s class has heads of d / h; leave it out")
    alike = len(set(layers)) == 1 and layers[0].rotates and layers[0].attention != "chunk"
    named = _named(kind, parts)
    try:
        return ModelConfig(
            family=named or kind,
            **sizes,
            tie_embeddings=parts.ends.tied if named else None,
            qkv_bias=parts.attention.bias if named else None,
            parts=None if named else parts,
            pattern=None if alike else Pattern.of(layers),
        )
    except ConfigError as error:  # sizes that do not go together: some may be the class's
        silent = list(dict.fromkeys(name for name in c.silent if c.knows(name)))
        taken = f" (the file is silent on {', '.join(silent)}: {kind}'s own defaults)" if silent else ""
        raise ConfigError(f"{error}{taken}") from None


def _refuse(raw: Mapping[str, Any], field: str, allowed: Any, why: str) -> None:
    """Raise ConfigError if the file has another value than the one that is allowed in `field` (a.b is b within a)."""
    value: Any = raw
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) or value is raw else None
    if value not in (allowed, None):
        raise ConfigError(f"{field} = {shown(value)}: {why}; allowed is {json.dumps(allowed, allow_nan=False)}")


def _named(kind: str, parts: Parts) -> str | None:
    """The family whose name stands for these parts but for ties and biases on q, k and v; None if none does."""
    name = "gpt2" if FAMILIES[kind] is FAMILIES["gpt2"] else "llama"
    usual = NAMED[name]
    habits = replace(
        usual,
        ends=replace(usual.ends, tied=parts.ends.tied),
        attention=replace(usual.attention, bias=parts.attention.bias),
    )
    return name if parts == habits else None


def _layers(family: Family, c: Fields) -> tuple[Layer, ...]:
    """The kind of each layer, without windows where the file's window is null or not in use."""
    listed = c.layer_types()
    if family.kinds is None:
        if listed and set(listed) != {"full"}:
            raise ConfigError("layer_types: the family's layers are all alike; allowed is full_attention")
        listed = ["full"] * c.layers
    c.kinds = listed or family.kinds(c) if family.kinds else listed or []
    rotates = family.rotates(c)
    sparse = family.sparse(c) if family.experts is not None else [False] * c.layers
    unused = family.kinds is not None and (
        c(family.window) is None or (c.knows("use_sliding_window") and not c.flag("use_sliding_window"))
    )
    kinds = ["full"] * c.layers if unused else c.kinds
    return tuple(Layer(*one) for one in zip(kinds, rotates, sparse, strict=True))


def _parts(family: Family, c: Fields, *, sparse: bool, dense: bool) -> Parts:
    def value(rule: Any) -> Any:
        return rule(c) if callable(rule) else rule

    def settings(given: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value(rule) for name, rule in {**usual, **given}.items()}

    activation = (lambda c: c.activation("hidden_act")) if c.knows("hidden_act") else "silu"
    mlp = settings(family.mlp, {"activation": activation}) if dense else {}
    return Parts(
        norm=value(family.norm),
        order=value(family.order),
        residual_scale=value(family.residual_scale),
        attention=Attention(**settings(family.attention, {})),
        positions=Positions(**settings(family.positions, {})),
        mlp=MLP(**mlp),
        experts=Experts(**settings(family.experts or {}, {"activation": activation})) if sparse else None,
        ends=Ends(**settings(family.ends, {"tied": lambda c: c.flag("tie_word_embeddings")})),
    )


def _rotated(family: Family, c: Fields, sizes: Mapping[str, Any], parts: Parts) -> dict[str, int | None]:
    """The width of a head that is rotated, where it is a part."""
    if parts.positions.kind != "rotary" or parts.attention.latent != "none":
        return {}
    if c.knows("rotary_dim") and c("rotary_dim") is not None:
        return {"rotary_dim": c.size("rotary_dim")}
    part = c.rotated_part()
    if not family.partial:
        if part != 1:
            raise ConfigError(f"partial_rotary_factor = {part:g}: the family turns whole heads; allowed is 1")
        return {}
    whole = sizes["head_dim"] or sizes["d_model"] // sizes["num_heads"]
    return {"rotary_dim": int(whole * part) or None}


def _read(source: str | Path | bytes | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What to call the source in an error, and the JSON object in it."""
    if isinstance(source, Mapping):
        return "config", source
    if isinstance(source, bytes):
        where, content = "config", source
    elif isinstance(source, (str, Path)):
        where, content = f"config file {shown(str(source), PATH_SHOWN)}", _content(Path(source))
    else:
        raise ConfigError(f"config = {shown(source)}: must be a path, the bytes of a file or a dict")
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
        raise ConfigError(f"config file {shown(str(path), PATH_SHOWN)}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # a null byte in the name
        raise ConfigError(f"config file {shown(str(path), PATH_SHOWN)}: cannot be read ({error})") from None
    raise ConfigError(f"config file {shown(str(path), PATH_SHOWN)}: must be a regular file")
