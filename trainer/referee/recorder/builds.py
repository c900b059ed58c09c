"""A user's own code as a function that builds a step: FILE.py:build, or transformers' class of a config.json."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from estimator.describe.checks import ConfigError, shown
from trainer.referee.recorder.failures import said_by

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

LABELS = ("labels", "targets")  # what a module calls what its loss compares with
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")


def of_file(named: str, sizes: Mapping[str, int], device: str = "cpu") -> Callable[[], Any]:
    """The function that `FILE.py:name` names, with those of `sizes` and `device` that it takes. This runs the file.

    Raises:
        ConfigError: there is no such file or function, or it wants an argument that is not given.
    """
    path, _, name = named.rpartition(":")
    file = Path(path)
    if not path or not file.is_file():
        raise ConfigError(f"code = {shown(named)}: must be FILE.py:FUNCTION, of a file that is there")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"code = {shown(named)}: {file.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where its classes are looked for
    sys.path.insert(0, str(file.parent.resolve()))  # what lies beside it can be imported, as when it is run
    with said_by(file.name):
        spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        found = ", ".join(sorted(x for x, v in vars(module).items() if inspect.isfunction(v))) or "none"
        raise ConfigError(
            f"code = {shown(named)}: {file.name} has no function {shown(name)}; its functions are {found}"
        )
    return with_sizes(function, sizes, device)


_EMPTY = inspect.Parameter.empty
SIZES = {"batch_size": 1, "seq_len": 1024}  # of a function that wants them, where neither it nor anybody says
OFFERED = (*SIZES, "device")  # to every function, taken or not


def with_sizes(function: Callable[..., Any], sizes: Mapping[str, int], device: str = "cpu") -> Callable[[], Any]:
    """`function` with those of `sizes`, and `device`, that it has parameters for.

    Raises:
        ConfigError: a parameter without a default is not among them, or one of them is no parameter.
    """
    parameters = inspect.signature(function).parameters.values()
    own = {x.name: x.default for x in parameters}
    tokens = {name: sizes.get(name, own[name] if isinstance(own.get(name), int) else n) for name, n in SIZES.items()}
    sizes = {**sizes, **{name: n for name, n in SIZES.items() if name not in sizes and own.get(name) is _EMPTY}}
    anything = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters)
    given = {**sizes, "device": device}
    taken = given if anything else {x.name: given[x.name] for x in parameters if x.name in given}
    names = [x.name for x in parameters if x.kind is not x.VAR_POSITIONAL]
    for name in sizes.keys() - {*names, *OFFERED}:
        if not anything:
            raise ConfigError(f"set = {name!r}: {function.__name__} takes {', '.join(names) or 'no arguments'}")
    for x in parameters:
        if x.default is _EMPTY and x.name not in taken and x.kind not in (x.VAR_KEYWORD, x.VAR_POSITIONAL):
            raise ConfigError(f"{x.name}: {function.__name__} wants it; give it with --set {x.name}=NUMBER")

    def build() -> Any:
        built = function(**taken)
        if not isinstance(built, nn.Module):
            return built
        return built, loss_of_module, tokens_for(built, tokens["batch_size"], tokens["seq_len"])

    return build


def tokens_for(module: nn.Module, batch_size: int, seq_len: int) -> tuple[Tensor, ...]:
    """(B, T) token ids below the rows of the module's first embedding.

    Raises:
        ConfigError: it has none.
    """
    rows = next((m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)), None)
    if rows is None:
        raise ConfigError("build returned a module that embeds no tokens: return (module, loss, inputs)")
    return (torch.randint(rows, (batch_size, seq_len)),)


def loss_of_module(module: nn.Module, ids: Tensor) -> Tensor:
    """The loss of a module of tokens: what it returns for its labels, or else the cross entropy of its logits."""
    parameters = inspect.signature(module.forward).parameters
    name = next((x for x in LABELS if x in parameters), None)
    out = module(ids) if name is None else module(ids, **{name: ids})
    named = out if isinstance(out, Mapping) else getattr(out, "__dict__", {})
    if named.get("loss") is not None:
        return named["loss"]
    parts = out if isinstance(out, tuple) else (named.get("logits", out),)
    scalar = next((x for x in parts if isinstance(x, torch.Tensor) and x.ndim == 0), None)
    if scalar is not None:
        return scalar
    logits = parts[0] if parts else None
    if not isinstance(logits, torch.Tensor) or logits.shape[:-1] != ids.shape:
        said = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(out).__name__}"
        raise ConfigError(
            f"the module returns {said}: neither a loss nor logits of {tuple(ids.shape)} tokens; "
            "let build return (module, loss, inputs)"
        )
    return F.cross_entropy(logits.flatten(0, -2), ids.flatten())


def config_at(path: str | Path, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config.json, or of that in a folder, some of them given anew.

    Raises:
        ConfigError: there is no such file.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(f"hf = {shown(str(path))}: there is no such file")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {**found, **changes}


def of_config(path: str | Path, batch_size: int, seq_len: int, **changes: Any) -> Callable[[], Any]:
    """transformers' own class of a config.json, with random weights in float32, and a batch for it.

    The class is the one that the file's `architectures` names, or that of a language model.

    Raises:
        ConfigError: there is no such file, transformers is missing, or it has no such class.
    """
    try:
        import transformers  # noqa: PLC0415 - needed here alone
    except ModuleNotFoundError as error:
        raise ConfigError("transformers is missing: pip install transformers") from error
    plain = config_at(path, changes)
    kind: Any = plain.get("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(
            f"hf = {shown(str(path))}: transformers {transformers.__version__} has no model_type {kind!r}"
        )
    config = transformers.CONFIG_MAPPING[kind].from_dict(plain)
    names = plain.get("architectures") or []
    own: Any = next((getattr(transformers, name, None) for name in names), None)
    automatic: Any = transformers.AutoModelForCausalLM

    def build() -> Any:
        torch.manual_seed(0)
        mine = copy.deepcopy(config)  # a model changes its own
        mine.use_cache = False
        mine.dtype = torch.float32  # and not that of its published weights: the plan's precision says which
        module = own._from_config(mine) if own else automatic.from_config(mine)  # noqa: SLF001 - what it calls too
        module.train()
        return module, loss_with_labels, batch_of(module, batch_size, seq_len)

    return build


def loss_with_labels(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a class of transformers returns as its loss."""
    return module(**batch).loss


def batch_of(module: Any, batch_size: int, seq_len: int) -> tuple[dict[str, Tensor]]:
    """Inputs and labels that a class of transformers takes: tokens, an image or the features of speech."""
    config, B, T = module.config, batch_size, seq_len
    match module.main_input_name:
        case "pixel_values":
            side = config.image_size if isinstance(getattr(config, "image_size", None), int) else 224
            pixels = torch.rand(B, getattr(config, "num_channels", 3), side, side)
            return ({"pixel_values": pixels, "labels": torch.randint(config.num_labels, (B,))},)
        case "input_features":
            features = torch.rand(B, config.num_mel_bins, 2 * config.max_source_positions)
            return ({"input_features": features, "labels": torch.randint(config.vocab_size, (B, T))},)
        case _:
            vocabulary = config.get_text_config().vocab_size
            ids = torch.randint(min(2, vocabulary - 1), vocabulary, (B, T))
            return ({"input_ids": ids, "labels": ids},)
