"""`python -m trainer COMMAND`: prepare, train, curve, generate, export, lr-experiment."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path  # noqa: TC003  (tyro reads it from the annotations)
from typing import TYPE_CHECKING, Annotated

import torch
import tyro

from estimator.describe.checks import ConfigError, positive_int, shown
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.show.output import guarded
from trainer.files.checkpoint import checkpoints, export_safetensors, read_checkpoint
from trainer.files.contents import check_finite, check_model
from trainer.files.prepare import END_OF_TEXT, PrepareConfig, prepare
from trainer.model.decoder import build_model
from trainer.model.generate import generate
from trainer.parallel.distributed import Weights, World
from trainer.parallel.saved import RUN_FILE, load_run
from trainer.run.curve import curve
from trainer.run.help import describe
from trainer.run.lr_experiment import main as lr_experiment
from trainer.run.settings import ModelSection, OptimSection, TrainConfig, load_config
from trainer.run.train import TrainingError, train
from trainer.system.heap import keep_freed_memory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainer.model.decoder import Transformer

USAGE = """usage: python -m trainer COMMAND [OPTIONS]

prepare        text files -> tokens
train          tokens -> checkpoints
curve          a run's validation losses, drawn
generate       checkpoint -> text
export         checkpoint -> safetensors
lr-experiment  what three learning rates do to a toy

python -m trainer COMMAND --help lists the options of each."""


@dataclass(frozen=True, slots=True)
class CurveConfig:
    """Draw a run's validation losses.

    Attributes:
        run: the run's folder.
    """

    run: Annotated[Path, tyro.conf.Positional]


@dataclass(frozen=True, slots=True)
class GenerateConfig:
    """Continue a prompt.

    Attributes:
        checkpoint: a checkpoint, or a run's folder, whose newest is taken.
        prompt: text to continue; none starts a new text.
        max_new_tokens: the most tokens to append.
        temperature: below 1 likelier, above 1 wilder; 0 takes the likeliest token.
        top_k: sample among the k likeliest only.
        top_p: sample among the fewest likeliest with this probability together.
        samples: texts.
        seed: of the samples.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    prompt: str = ""
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        positive_int("samples", self.samples)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {shown(self.seed)}: must be from 0 to 2^63 - 1")
        if not self.prompt.isprintable() and any(0xD800 <= ord(x) < 0xE000 for x in self.prompt):
            raise ConfigError(f"prompt = {shown(self.prompt)}: must be text in UTF-8")


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """Write a checkpoint's weights as a safetensors file.

    Attributes:
        checkpoint: a checkpoint, or a run's folder, whose newest is taken.
        out: the file to write.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    out: Annotated[Path, tyro.conf.Positional]


def load_model(checkpoint: Path) -> tuple[Transformer, Path]:
    """The model of a checkpoint or of a run's newest one, and the run's folder.

    Raises:
        ConfigError: there is none, or it was not written by `train`.
    """
    path = checkpoint
    if path.is_dir() and not (path / RUN_FILE).exists():
        if not (found := checkpoints(path)):
            raise ConfigError(f"{path}: no checkpoint in it")
        path = found[-1]
    run = read_checkpoint(path / RUN_FILE if path.is_dir() else path).get("run", {})
    if not isinstance(run, dict) or "model" not in run:
        raise ConfigError(f"{path}: not written by `python -m trainer train`: it does not say which model it holds")
    check_model(run["model"], str(path))
    m = ModelConfig(**run["model"])
    model = build_model(m, Plan(attention="sdpa" if m.unfused is None else "naive"))
    load_run(World("cpu"), path, Weights(model), None)
    check_finite(model, str(path))
    return model.eval(), path.parent


def generate_text(config: GenerateConfig) -> None:
    """Print the continuations."""
    from tokenizers import Tokenizer  # noqa: PLC0415  (an extra)

    model, folder = load_model(config.checkpoint)
    file = folder / "tokenizer.json"
    if not file.exists():
        raise ConfigError(f"{file}: no such file; a run keeps its tokenizer there")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more particular
        raise ConfigError(f"{file}: no tokenizer ({error})") from error
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ConfigError(f"{file}: has no {END_OF_TEXT}; not made by `python -m trainer prepare`")
    # In training the end of a text is what stands before the next one's beginning.
    ids: list[int] = tokenizer.encode(config.prompt, add_special_tokens=False).ids or [end]
    texts = generate(
        model,
        torch.tensor([ids] * config.samples),
        config.max_new_tokens,
        config.temperature,
        config.top_k,
        config.top_p,
        end,
        generator=torch.Generator().manual_seed(config.seed),
    )
    for text in texts.tolist():
        print(tokenizer.decode(text))  # noqa: T201  (the output)


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """The configuration of a run: defaults, then the file that `--config` names, then the other options."""
    file = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    file.add_argument("--config")
    found, rest = file.parse_known_args(arguments)
    default = load_config(found.config) if found.config else TrainConfig()
    return tyro.cli(TrainConfig, default=default, args=rest, prog="python -m trainer train")


def run(command: str, arguments: Sequence[str]) -> int:
    """Do what `command` says; the exit status."""
    prog = f"python -m trainer {command}"
    match command:
        case "prepare":
            manifest = prepare(tyro.cli(PrepareConfig, args=arguments, prog=prog))
            print(json.dumps(manifest, indent=2, allow_nan=False))  # noqa: T201  (the output)
        case "train":
            keep_freed_memory()
            return train(parse_train(arguments))
        case "curve":
            print(curve(tyro.cli(CurveConfig, args=arguments, prog=prog).run))  # noqa: T201  (the output)
        case "generate":
            generate_text(tyro.cli(GenerateConfig, args=arguments, prog=prog))
        case "export":
            config = tyro.cli(ExportConfig, args=arguments, prog=prog)
            model, _ = load_model(config.checkpoint)
            export_safetensors(model, config.out, {"config": json.dumps(model.config.to_dict())})
        case "lr-experiment":
            lr_experiment()
        case "-h" | "--help":
            print(USAGE)  # noqa: T201  (the output)
        case _:
            print(USAGE, file=sys.stderr)  # noqa: T201  (the output)
            return 2
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 and one sentence on standard error."""
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    return guarded("python -m trainer", lambda: _answer(command, rest))


def _answer(command: str, rest: Sequence[str]) -> int:
    describe(PrepareConfig, TrainConfig, ModelSection, Plan, OptimSection, CurveConfig, GenerateConfig, ExportConfig)
    try:
        return run(command, rest)
    except (ConfigError, TrainingError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise  # the output's, not a file's
        print(f"error: {error}", file=sys.stderr)  # noqa: T201  (the output)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201  (the output)
        return 130
