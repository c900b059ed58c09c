"""Measurements that others published, and the estimator's errors on the training runs among them.

Needs no torch. Every row is predicted with the parameters of its accelerator; what a source did differently from a
plain eager step is its recipe (`SOURCES`), the same for all of its rows.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.config import ModelConfig, Plan, choose
from estimator.hardware import accelerator
from estimator.kernels import Variant
from estimator.speed import Setup, step_times

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


ENOUGH = 20  # runs on an architecture whose 5th and 95th percentile mean something


@cache
def rows(name: str) -> tuple[dict[str, str], ...]:
    """The rows of `data/published/<name>.csv`, as they are in the file, each with the source that it was read in."""
    with resources.files("estimator").joinpath("data", "published", f"{name}.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


@dataclass(frozen=True)
class Run:
    """A measured training run and how to predict it.

    Attributes:
        source: name of the file.
        accelerator: id in the catalogue.
        model, plan: what was trained.
        setup: what of the source's recipe a plan does not say.
        measured: tokens per second of one accelerator.
        row: the row as published.
    """

    source: str
    accelerator: str
    model: ModelConfig
    plan: Plan
    setup: Setup
    measured: float
    row: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Judged:
    """A run beside its prediction, tokens per second of one accelerator."""

    run: Run
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.run.measured - 1


def _count(row: Mapping[str, str], name: str) -> int:
    return int(float(row[name]))


def _model(row: Mapping[str, str], family: str) -> ModelConfig:
    return ModelConfig(
        family,
        num_layers=_count(row, "layers"),
        d_model=_count(row, "d_model"),
        num_heads=_count(row, "heads"),
        num_kv_heads=_count(row, "kv_heads"),
        d_ff=_count(row, "d_ff"),
        vocab_size=_count(row, "vocab"),
        context_length=_count(row, "seq_len"),
        tie_embeddings=row["tied_emb"] in ("1", "1.0"),
    )


def _run(source: str, row: Mapping[str, str], accelerator: str, family: str, plan: Plan, setup: Setup) -> Run:
    return Run(source, accelerator, _model(row, family), plan, setup, float(row["tokens_per_s_per_gpu"]), row)


# MPT under Composer's FSDP: 16-bit everywhere but in the optimizer and the loss (low-precision LayerNorm, parameters
# gathered in bf16, gradients summed in fp32 unless mixed_precision is PURE), no biases, flash-attn's fused cross
# entropy. attn_impl=flash is flash-attn 1.0.3, which that version of the repository asks for, between unpadding and
# padding (llmfoundry/models/layers/attention.py); the table's label "flash-attn 2" is contradicted by that, and by its
# own long sequences, which run at half of the second generation's rate.
MPT = Variant(frozenset({"loss"}), half=True, without=frozenset({"sum"}), extra=frozenset({"unpadded"}))


def _llmfoundry(row: Mapping[str, str]) -> Run | None:
    plan = Plan(
        batch_size=_count(row, "micro_batch"),
        attention="sdpa",
        loss="torch",
        checkpointing="block" if row["checkpointing"] == "full" else "none",
        grad_accumulation=_count(row, "grad_accum"),
        data_parallel=_count(row, "gpus"),
        sharding="zero3",
    )
    pure = row["zero_or_sharding"].endswith("PURE")
    setup = Setup(MPT, attention="flash-1", parameter_width=2, gradient_width=2 if pure else 4)
    return _run("llmfoundry_a100_80gb", row, "a100-80gb-sxm", "gpt2", plan, setup)


# Megatron-DeepSpeed: fp16 everywhere but in the optimizer and the loss, its fused kernels (masked softmax, bias and
# GELU, LayerNorm), apex's fused Adam, dropout on the attention's weights (its default of 0.1), every block recomputed.
MEGATRON = Variant(frozenset({"model", "loss"}), half=True, extra=frozenset({"dropout"}))


def _vtrain(row: Mapping[str, str]) -> Run | None:
    gpus, micro_batch = _count(row, "gpus"), _count(row, "micro_batch")
    plan = Plan(
        batch_size=micro_batch,
        loss="torch",
        checkpointing="block",
        optimizer_impl="fused",
        grad_accumulation=_count(row, "global_batch_seqs") // (gpus * micro_batch),
        data_parallel=gpus,
    )
    setup = Setup(MEGATRON, dtype="fp16", parameter_width=2, gradient_width=2)
    return _run("vtrain_dp_a100", row, "a100-80gb-sxm", "gpt2", plan, setup)


# torchtune and torchao: bf16 everywhere, SDPA, and the techniques of the row. Left out is what no plan describes: LoRA,
# quantised optimizers and products (fp8, 8-bit Adam), offloading, padded data; and rows without a sequence length.
TUNED = {
    "cumulative technique +packed": (frozenset[str](), "none"),
    "cumulative technique +compile": (frozenset({"model", "loss"}), "none"),
    "cumulative technique +chunked CE": (frozenset({"model", "loss"}), "none"),
    "cumulative technique +activation ckpt": (frozenset({"model", "loss"}), "block"),
    "cumulative technique +optimizer in bwd": (frozenset({"model", "loss"}), "block"),
}
TUNED_GPUS = {"A100": "a100-80gb-sxm", "H100": "h100-80gb-sxm", "B200 (power limited)": "b200-180gb-sxm"}


def _torchtune(row: Mapping[str, str]) -> Run | None:
    if row["gpu"] not in TUNED_GPUS or not row["seq_len"]:
        return None
    if row["notes"] in TUNED:
        fused, checkpointing = TUNED[row["notes"]]
    elif row["dtype"] == "bf16" and row["gpus"] == "8" and row["checkpointing"].startswith("selective"):
        fused, checkpointing = frozenset({"model", "loss"}), "none"  # recomputes what is cheap, counted as nothing
    elif row["dtype"] == "bf16 eager" and row["checkpointing"] in ("none", "full"):
        fused, checkpointing = frozenset(), "block" if row["checkpointing"] == "full" else "none"
    else:
        return None
    gpus = _count(row, "gpus")
    plan = Plan(
        batch_size=_count(row, "micro_batch") if row["micro_batch"] else 1,
        attention="sdpa",
        loss="torch",
        checkpointing=checkpointing,
        optimizer_impl="fused",
        data_parallel=gpus,
        sharding="zero3" if gpus > 1 else "none",
    )
    setup = Setup(Variant(fused, half=True), parameter_width=2, gradient_width=4 if gpus > 1 else 2)
    return _run("torchtune_torchao", row, TUNED_GPUS[row["gpu"]], "llama", plan, setup)


SOURCES: dict[str, Callable[[Mapping[str, str]], Run | None]] = {
    "llmfoundry_a100_80gb": _llmfoundry,
    "vtrain_dp_a100": _vtrain,
    "torchtune_torchao": _torchtune,
}


def runs(source: str | None = None) -> tuple[Run, ...]:
    """The published training runs that a plan can describe, of one source or of all.

    Raises:
        ConfigError: unknown source.
    """
    names = list(SOURCES) if source is None else [choose("source", source, SOURCES)]
    return tuple(run for name in names for row in rows(name) if (run := SOURCES[name](row)) is not None)


@cache
def judged() -> tuple[Judged, ...]:
    """Every published run with its prediction."""
    return tuple(Judged(run, predict(run)) for run in runs())


def predict(run: Run) -> float:
    """Tokens per second of one accelerator."""
    seconds = sum(float(x[0]) for x in step_times(run.model, run.plan, run.accelerator, run.setup).values())
    return run.plan.batch_size * run.plan.tokens(run.model) * run.plan.grad_accumulation / seconds


@dataclass(frozen=True, slots=True)
class Summary:
    """Errors of a group of runs: absolute ones at the median and the 90th percentile, and the signed median."""

    group: str
    count: int
    median: float
    percentile_90: float
    bias: float


def summary(of: Iterable[Judged], group: str) -> Summary:
    """The errors of some runs together; there must be at least one."""
    errors = np.array([j.error for j in of])
    absolute = np.abs(errors)
    return Summary(
        group, len(errors), float(np.median(absolute)), float(np.quantile(absolute, 0.9)), float(np.median(errors))
    )


def summaries(by: Callable[[Judged], str], of: Sequence[Judged] | None = None) -> tuple[Summary, ...]:
    """One summary for each value of `by`, in the order of first appearance."""
    groups: dict[str, list[Judged]] = {}
    for j in judged() if of is None else of:
        groups.setdefault(by(j), []).append(j)
    return tuple(summary(members, name) for name, members in groups.items())


def size_of(j: Judged) -> str:
    """The class of a run's model by its number of parameters."""
    m = j.run.model
    matrices = (
        m.num_layers * m.d_model * (2 * m.width_of_heads + 2 * m.kv_heads * m.e + (2 + (m.family == "llama")) * m.f)
    )
    billions = (matrices + m.vocab_size * m.d_model * (1 if m.tie_embeddings else 2)) / 1e9
    for below, name in ((0.5, "under 0.5 B"), (2, "0.5 to 2 B"), (10, "2 to 10 B")):
        if billions < below:
            return name
    return "10 B and more"


BY: dict[str, Callable[[Judged], str]] = {
    "source": lambda j: j.run.source,
    "accelerator": lambda j: j.run.accelerator,
    "model size": size_of,
}


def worst(count: int = 5) -> tuple[Judged, ...]:
    """The runs that are predicted worst."""
    return tuple(sorted(judged(), key=lambda j: -abs(np.log1p(j.error)))[:count])


def residuals() -> str:
    """`data/residuals.toml`: between which factors on the predicted time nine published runs of ten lie.

    By architecture, where there are enough runs on it, and over all runs.
    """
    groups = {"all": list(judged())}
    for j in judged():
        groups.setdefault(accelerator(j.run.accelerator).architecture, []).append(j)
    lines = ["# Measured time over predicted, 5th and 95th percentile: written by `python -m estimator.published`."]
    for name, members in groups.items():
        if len(members) < ENOUGH:
            continue
        ratio = np.array([1 + j.error for j in members])  # of times, the inverse of that of tokens per second
        low, high = (float(np.quantile(ratio, q)) for q in (0.05, 0.95))
        files = Counter(j.run.source for j in members)
        said = "From the errors on " + ", ".join(f"{n} runs of {file}" for file, n in files.items()) + "."
        lines += ["", f"[{name}]", f"low = {low:.3f}", f"high = {high:.3f}", f"rows = {json.dumps(said)}"]
    return "\n".join(lines) + "\n"


def table() -> str:
    """The errors as a Markdown table."""
    lines = ["| by | group | runs | median error | 90th percentile | bias |", "|---|---|---:|---:|---:|---:|"]
    for name, by in BY.items():
        lines += [
            f"| {name} | {s.group} | {s.count} | {s.median:.1%} | {s.percentile_90:.1%} | {s.bias:+.1%} |"
            for s in summaries(by)
        ]
    return "\n".join(lines) + "\n"


def records() -> list[dict[str, Any]]:
    """One flat record a run, for a file or a plot."""
    return [
        {
            "source": j.run.row["source"],
            "file": j.run.source,
            "model": j.run.row["model"],
            "accelerator": j.run.accelerator,
            "seq_len": j.run.plan.tokens(j.run.model),
            "batch_size": j.run.plan.batch_size,
            "measured": j.run.measured,
            "predicted": j.predicted,
            "error": j.error,
        }
        for j in judged()
    ]


if __name__ == "__main__":
    sys.stdout.write(residuals())
