"""Training runs that others published, as models and plans.

Needs no torch. Every row is predicted with the parameters of its accelerator; what a source did differently from a
plain eager step is its recipe (`SOURCES`), the same for all of its rows.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import choose
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.timing.kernels import FUSED, Variant
from estimator.timing.speed import Setup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


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
        model: what was trained.
        plans: how; of two, each takes half of the time (torchtitan's selective checkpoints).
        setup: what of the source's recipe a plan does not say.
        measured: tokens per second of one accelerator.
        row: the row as published.
    """

    source: str
    accelerator: str
    model: ModelConfig
    plans: tuple[Plan, ...]
    setup: Setup
    measured: float
    row: Mapping[str, str]

    @property
    def plan(self) -> Plan:
        """The first of the plans; the others train on the same tokens."""
        return self.plans[0]


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


def _run(source: str, row: Mapping[str, str], gpu: str, family: str, setup: Setup, *plans: Plan) -> Run:
    return Run(source, gpu, _model(row, family), plans, setup, float(row["tokens_per_s_per_gpu"]), row)


# MPT under Composer's FSDP: 16 bits everywhere but in the optimizer and the loss (low-precision LayerNorm, parameters
# gathered in bf16, gradients summed in fp32 unless mixed_precision is PURE).
# attn_impl=flash is flash-attn 1.0.3, which that version of the repository asks for; the table's label "flash-attn 2"
# is contradicted by that, and by its own long sequences, which run at half of the second generation's rate.
def _llmfoundry(row: Mapping[str, str]) -> Run | None:
    plan = Plan(
        batch_size=_count(row, "micro_batch"),
        precision="bf16-master",
        attention="sdpa",
        loss="torch-fp32",
        checkpointing="block" if row["checkpointing"] == "full" else "none",
        grad_accumulation=_count(row, "grad_accum"),
        data_parallel=_count(row, "gpus"),
        sharding="zero3",
    )
    pure = row["zero_or_sharding"].endswith("PURE")
    setup = Setup(attention="flash-1", parameter_width=2, gradient_width=2 if pure else 4)
    return _run("llmfoundry_a100_80gb", row, "a100-80gb-sxm", "gpt2", setup, plan)


# Megatron-DeepSpeed: fp16 everywhere but in the optimizer and the loss, its fused kernels (masked softmax, bias and
# GELU, LayerNorm), apex's fused Adam, every block recomputed. Whether with dropout is not said: taken without.
def _vtrain(row: Mapping[str, str]) -> Run | None:
    gpus, micro_batch = _count(row, "gpus"), _count(row, "micro_batch")
    plan = Plan(
        batch_size=micro_batch,
        precision="bf16-master",
        loss="torch-fp32",
        checkpointing="block",
        optimizer_impl="fused",
        grad_accumulation=_count(row, "global_batch_seqs") // (gpus * micro_batch),
        data_parallel=gpus,
    )
    setup = Setup(FUSED, dtype="fp16", parameter_width=2, gradient_width=2)
    return _run("vtrain_dp_a100", row, "a100-80gb-sxm", "gpt2", setup, plan)


# torchtune and torchtitan: SDPA, and the techniques of the row; torchtune trains in bf16, torchtitan under FSDP's mixed
# precision: parameters gathered in bf16, their fp32 copies and the optimizer shared out, no autocast. torchtitan's
# "selective" keeps every second product of the linear layers and recomputes the others, so a row of it is half way
# between keeping all and keeping none. Left out is what no plan describes: LoRA, quantised optimizers and products
# (fp8, 8-bit Adam), offloading, padded data, a card with an unstated power limit; and rows without a sequence length.
FUSED_PARTS = frozenset({"model", "loss"})
TUNED = {
    "cumulative technique +packed": (frozenset[str](), "none"),
    "cumulative technique +compile": (FUSED_PARTS, "none"),
    "cumulative technique +chunked CE": (FUSED_PARTS, "none"),
    "cumulative technique +activation ckpt": (FUSED_PARTS, "block"),
    "cumulative technique +optimizer in bwd": (FUSED_PARTS, "block"),
}
TITAN: dict[str, dict[str, Any]] = {
    "none": {},
    "every 2nd layer": {"checkpointing": "block", "checkpoint_every": 2},
    "full": {"checkpointing": "block"},
}
# PyTorch's own H100s are those of torchtitan's tables, with HBM2e and 500 W; some of these rows say so ("~95 GiB").
TUNED_GPUS = {
    "A100": "a100-80gb-sxm",
    "H100": "h100-96gb-sxm",
    "H100 (card reports ~95 GiB)": "h100-96gb-sxm",
    "MI300X": "mi300x-192gb",
}


def _torchtune(row: Mapping[str, str]) -> Run | None:
    if row["gpu"] not in TUNED_GPUS or not row["seq_len"]:
        return None
    checkpoints = row["checkpointing"]
    precision = "bf16-master"
    changes: tuple[dict[str, Any], ...]
    if row["notes"] in TUNED:
        precision = "bf16"
        fused, checkpointing = TUNED[row["notes"]]
        changes = ({"checkpointing": checkpointing},)
    elif row["dtype"] == "bf16" and checkpoints.startswith("selective"):
        fused, changes = FUSED_PARTS, ({"checkpointing": "selective"}, {"checkpointing": "block"})
    elif row["dtype"] == "bf16 eager" and checkpoints in TITAN:
        fused, changes = frozenset(), (TITAN[checkpoints],)
    else:
        return None
    gpus = _count(row, "gpus")
    plan = Plan(
        # Where none is stated, the memory that is printed is that of one sequence.
        batch_size=_count(row, "micro_batch") if row["micro_batch"] else 1,
        precision=precision,
        attention="sdpa",
        loss="torch-fp32",
        optimizer_impl="fused",
        data_parallel=gpus,
        sharding="zero3" if gpus > 1 else "none",
    )
    setup = Setup(Variant(fused), parameter_width=2, gradient_width=4 if gpus > 1 else 2)
    plans = tuple(plan.replace(**change) for change in changes)
    return _run("torchtune_torchao", row, TUNED_GPUS[row["gpu"]], "llama", setup, *plans)


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
