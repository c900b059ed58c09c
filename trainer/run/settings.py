"""What a training run is made of: dataclasses, filled from a TOML file and the command line."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from estimator.describe.catalogue import number
from estimator.describe.checks import ConfigError, choose, positive_int
from estimator.describe.hf import from_hf
from estimator.describe.model import ModelConfig
from estimator.describe.parts import FAMILIES
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from estimator.describe.settings import checked

DEVICES = ("auto", "cpu", "cuda")
CONFIGS = Path(__file__).parent / "configs"

T = TypeVar("T")

# What a training script should do, where `Plan`'s own defaults are what a bare one does.
PLAN = Plan(batch_size=16, attention="sdpa", optimizer_impl="bundled", max_grad_norm=1.0)


@dataclass(frozen=True, slots=True)
class ModelSection:
    """A `ModelConfig` still without what follows from the rest of it.

    Attributes:
        family: "gpt2" or "llama".
        num_layers: L, blocks.
        d_model: d, width.
        num_heads: h, query heads.
        context_length: C, positions.
        vocab_size: V; None takes the tokenizer's.
        num_kv_heads: k, key/value heads; None means num_heads.
        head_dim: e; None means d_model / num_heads.
        d_ff: f; None means 4 d_model, and where it is gated 8/3 d_model rounded up to a multiple of 64.
        tie_embeddings: None means the family's habit.
        qkv_bias: None means the family's habit.
        sliding_window: tokens that one sees, itself included; None means all before it.
        like: a preset's name or the path of a config.json: the model is that one, of any family, with this section's
            context_length and vocab_size; nothing else may be given beside it.
    """

    family: str = "gpt2"
    num_layers: int = 4
    d_model: int = 256
    num_heads: int = 4
    context_length: int = 256
    vocab_size: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    tie_embeddings: bool | None = None
    qkv_bias: bool | None = None
    sliding_window: int | None = None
    like: str | None = None

    def config(self, vocab_size: int | None) -> ModelConfig:
        """The model, with the tokenizer's vocabulary where none is given.

        Raises:
            ConfigError: there is neither, or a field is out of its range.
        """
        if self.vocab_size is None and vocab_size is None:
            raise ConfigError("model.vocab_size = None: the corpus has no manifest to take it from; give a number")
        size = self.vocab_size or vocab_size
        if self.like is not None:
            return self.named(self.like).replace(vocab_size=size, context_length=self.context_length)
        values = asdict(self) | {"vocab_size": size}
        del values["like"]
        if self.d_ff is None and self.family in FAMILIES and FAMILIES[self.family].mlp.gated:
            # Three matrices of width 8/3 d hold what two of 4 d do (Touvron et al. 2023, section 2.2).
            values["d_ff"] = 64 * math.ceil(8 * self.d_model / 3 / 64)
        return ModelConfig(**values)

    def named(self, like: str) -> ModelConfig:
        """The model that `like` names.

        Raises:
            ConfigError: there is none, or a field that it says itself is given too.
        """
        for f in fields(self):
            if f.name not in ("like", "context_length", "vocab_size") and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"model.{f.name} = {getattr(self, f.name)!r}: model.like = {like!r} says it already; allowed "
                    "beside it are context_length and vocab_size"
                )
        return from_hf(Path(like)) if like.endswith(".json") or Path(like).is_dir() else preset(like)


@dataclass(frozen=True, slots=True)
class OptimSection:
    """The optimizer's hyper-parameters and the learning rate's schedule.

    Attributes:
        lr: at the end of the warm-up.
        min_lr: at the end of the run.
        warmup_steps: of linear increase; half a cosine follows, down to min_lr at the last step.
        weight_decay: of matrices, for the optimizers that have it; biases and norms have none.
        betas: decay of the two moments of adamw, adam and lion.
        eps: of adamw and adam.
    """

    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        number("optim.min_lr", self.min_lr)
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps = {self.warmup_steps}: must be at least 0")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """Train a language model. `--config FILE` (TOML or JSON, or the name of a bundled one) is read before the rest.

    Attributes:
        data: folder that `python -m trainer prepare` made.
        out: folder for checkpoints, metrics and the weights.
        steps: optimizer steps in all.
        model: what is trained.
        plan: how a step is run; batch_size x grad_accumulation sequences a step, shared among the processes.
        optim: the optimizer.
        eval_every: steps between validations.
        eval_batches: batches of a validation, the same ones each time.
        save_every: steps between checkpoints.
        keep: checkpoints that are kept.
        log_every: steps between lines where the output is no terminal.
        seed: of the weights and of the order of the data.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        sharding: with several processes, what they do not replicate: as the plan's, "none" (DDP), "zero1", "zero2",
            "zero3" or "fsdp".
        weights: a model.safetensors, of the same model, that the run starts from; None draws the weights.
        tensorboard: write TensorBoard's files too.
        resume: go on from the newest checkpoint in `out`.
        force: start even if the estimate does not fit the machine.
        changed: go on even if settings differ from those that the checkpoint was made with.
    """

    data: Path = Path("data/stdlib")
    out: Path = Path("runs/stdlib")
    steps: int = 1000
    model: ModelSection = ModelSection()
    plan: Plan = PLAN
    optim: OptimSection = OptimSection()
    eval_every: int = 200
    eval_batches: int = 16
    save_every: int = 200
    keep: int = 2
    log_every: int = 20
    seed: int = 0
    device: str = "auto"
    sharding: str = "none"
    weights: Path | None = None
    tensorboard: bool = False
    resume: bool = False
    force: bool = False
    changed: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "eval_batches", "save_every", "keep", "log_every"):
            positive_int(name, getattr(self, name))
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}: must be from 0 to 2^63 - 1")
        choose("device", self.device, DEVICES)
        object.__setattr__(self, "sharding", checked(Plan, "sharding", self.sharding))
        if self.plan.data_parallel != 1 or self.plan.sharding != "none":
            given = f"plan.data_parallel = {self.plan.data_parallel}, plan.sharding = {self.plan.sharding!r}"
            raise ConfigError(f"{given}: torchrun says how many processes there are, and --sharding what they share")
        if self.plan.float8 != "none":
            raise ConfigError(f"plan.float8 = {self.plan.float8!r}: no run multiplies in 8 bits; allowed is none")
        if self.optim.warmup_steps > self.steps:
            raise ConfigError(
                f"optim.warmup_steps = {self.optim.warmup_steps}: longer than the run (steps = {self.steps})"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values: what JSON and a checkpoint can hold."""
        values: dict[str, Any] = _plain(asdict(self))
        return values


def load_config(file: str) -> TrainConfig:
    """The configuration in a TOML or JSON file, or in the bundled one of that name; defaults for what it leaves out.

    Raises:
        ConfigError: no such file, not TOML or JSON, or a key or value that cannot be.
        OSError: it cannot be read.
    """
    path = Path(file)
    if not path.suffix:
        path = CONFIGS / f"{choose('config', file, sorted(p.stem for p in CONFIGS.glob('*.toml')))}.toml"
    try:
        text = path.read_text(encoding="utf-8")
        table = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not {'JSON' if path.suffix == '.json' else 'TOML'} ({error})") from error
    return overlay(TrainConfig(), table, f"{path}: ")


def overlay(base: T, table: Any, where: str) -> T:
    """A copy of the dataclass `base` with the values of `table`, whose keys are its fields, nested alike.

    Raises:
        ConfigError: an unknown key, or a value of another type, named with its path.
    """
    if not isinstance(table, dict):
        raise ConfigError(f"{where.rstrip('.')} = {table!r}: must be a table")
    hints = get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in table.items():
        choose(f"{where}key", key, hints)
        old = getattr(base, key)
        nested = is_dataclass(old) and not isinstance(old, type)
        changes[key] = overlay(old, value, f"{where}{key}.") if nested else _typed(hints[key], value, f"{where}{key}")
    return replace(base, **changes)  # type: ignore[type-var]  # is a dataclass: its fields have just been read


def _typed(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type that `hint` names; text becomes a path, a list a tuple, an integer a float."""
    options = get_args(hint) or (hint,)
    if hint == tuple[float, float]:
        if isinstance(value, list) and len(value) == 2:
            return tuple(_typed(float, item, name) for item in value)
    elif Path in options and isinstance(value, str):
        return Path(value)
    elif float in options and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) in options:
        return value
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ConfigError(f"{name} = {value!r}: must be {wanted}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
