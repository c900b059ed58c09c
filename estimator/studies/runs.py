"""Training runs that others published, as models and plans.

Needs no torch. Every row is predicted with the parameters of its accelerator; what a source did differently from a
plain eager step is its recipe (`SOURCES`), the same for all of its rows.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import choose
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.hardware.accelerators import accelerator
from estimator.timing.kernels import FUSED_BY_HAND, Variant
from estimator.timing.speed import Setup

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from estimator.hardware.accelerators import Accelerator


def evidence(a: Accelerator) -> tuple[int, str]:
    """How many published runs are on an accelerator or another of its architecture; and that as a sentence."""
    here = sum(run.accelerator == a.id for run in runs())
    alike = sum(accelerator(run.accelerator).architecture == a.architecture for run in runs())
    if here:
        return alike, f"Of {len(runs())} published runs that predictions are held against, {here} are on it."
    if alike:
        return alike, f"None of {len(runs())} published runs is on it; {alike} are on others of its architecture."
    return 0, f"None of {len(runs())} published runs is on its architecture: its time is scaled from others'."


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
        software: what ran it, as far as the source says.
        measured: tokens per second of one accelerator.
        row: the row as published.
        weight: how many independent measurements the row counts for.
    """

    source: str
    accelerator: str
    model: ModelConfig
    plans: tuple[Plan, ...]
    setup: Setup
    software: str
    measured: float
    row: Mapping[str, str]
    weight: float = 1.0

    @property
    def plan(self) -> Plan:
        """The first of the plans; the others train on the same tokens."""
        return self.plans[0]

    @property
    def tokens(self) -> int:
        """Of one accelerator in an optimizer step: of those that have a model together its part."""
        p = self.plan
        whole = p.batch_size * p.tokens(self.model) * p.grad_accumulation
        return whole * p.data_parallel // p.accelerators

    @property
    def stack(self) -> str:
        """Source, card and software: runs that share what nobody wrote down."""
        return f"{NAMES[self.source]}, {self.software}, {self.accelerator}"


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


def _run(
    source: str, row: Mapping[str, str], gpu: str, family: str, setup: Setup, software: str, *plans: Plan,
    measured: float | None = None, weight: float = 1.0,
) -> Run:  # fmt: skip
    rate = float(row["tokens_per_s_per_gpu"]) if measured is None else measured
    return Run(source, gpu, _model(row, family), plans, setup, software, rate, row, weight)


# MPT under Composer's FSDP: 16 bits everywhere but in the optimizer and the loss (low-precision LayerNorm, parameters
# gathered in bf16, gradients summed in fp32 unless mixed_precision is PURE), and flash-attn's fused cross entropy,
# which is MPT's default (llmfoundry/models/mpt/modeling_mpt.py: loss_fn = "fused_crossentropy").
# attn_impl=flash is flash-attn 1.0.3, which that version of the repository asks for; the table's label "flash-attn 2"
# is contradicted by that, and by its own long sequences, which run at half of the second generation's rate.
def _llmfoundry(row: Mapping[str, str]) -> Run | str:
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
    hopper = row["gpu"].startswith("h100")
    setup = Setup(
        Variant(frozenset({"loss"})),
        attention="flash-1",
        parameter_width=2,
        gradient_width=2 if pure else 4,
        network=None if hopper else "mosaicml-a100",
    )
    source, card = ("llmfoundry_h100_80gb", "h100-80gb-sxm") if hopper else ("llmfoundry_a100_80gb", "a100-80gb-sxm")
    return _run(source, row, card, "gpt2", setup, "Composer FSDP", plan)


# Megatron-DeepSpeed: fp16 everywhere but in the optimizer and the loss, its fused kernels (masked softmax, bias and
# GELU, LayerNorm), apex's fused Adam, every block recomputed, gradients summed when backward is over.
# Dropout of 0.1 on scores and hidden states is Megatron's default (megatron/training/arguments.py: attention_dropout,
# hidden_dropout) and is written into vTrain's own model (src/model/gpt_model.py at f8dda8473); gradients are clipped to
# 1.0, the default too. CONFIG.sh of Megatron-LM's runs sets the same clipping and leaves dropout alone.
# The rows were composed from timed parts, not timed run by run: within 6e-6 the iteration is linear in accumulation,
# and what more accelerators add is the same at every size. So each model and micro-batch counts as three.
COMPOSED = 3.0


@cache
def _alike() -> Mapping[tuple[str, ...], int]:
    return Counter((row["d_model"], row["micro_batch"]) for row in rows("vtrain_dp_a100"))


def _vtrain(row: Mapping[str, str]) -> Run | str:
    gpus, micro_batch = _count(row, "gpus"), _count(row, "micro_batch")
    plan = Plan(
        batch_size=micro_batch,
        precision="bf16-master",
        loss="torch-fp32",
        checkpointing="block",
        dropout=0.1,
        max_grad_norm=1.0,
        optimizer_impl="fused",
        grad_accumulation=_count(row, "global_batch_seqs") // (gpus * micro_batch),
        data_parallel=gpus,
    )
    setup = Setup(
        FUSED_BY_HAND, dtype="fp16", parameter_width=2, gradient_width=2, network="vtrain-a100", overlap=False
    )
    weight = COMPOSED / _alike()[row["d_model"], row["micro_batch"]]
    return _run("vtrain_dp_a100", row, "a100-80gb-sxm", "gpt2", setup, "Megatron-DeepSpeed", plan, weight=weight)


# InternEvo: 16 bits with fp32 masters; flash-attn 1.0.5 and torch 1.13.1 (doc/en/install.md), its rotary embedding and
# loss; apex's fused norm on hidden states cast to fp32, and SwiGLU in two kernels (InternLM/InternLM's
# modeling_internlm.py, `norm1(residual1.float())`, and linear.py, `F.silu(w1(x)) * w2(x)`); gradients clipped to 1.0
# (configs/_base_/models/internlm_7B.py). ZeRO-1: gradients are summed over all, and each parameter is updated whole by
# one accelerator of the node (zero1=8) or of all (zero1=-1), which broadcasts it by itself (`_partition_param_list` of
# internlm/solver/optimizer/hybrid_zero_optim.py).
def _internevo(row: Mapping[str, str]) -> Run | str:
    gpus = _count(row, "gpus")
    plan = Plan(
        batch_size=_count(row, "micro_batch"),
        precision="bf16-master",
        attention="sdpa",
        loss="torch-fp32",
        checkpointing="block" if row["checkpointing"] == "full" else "none",
        max_grad_norm=1.0,
        optimizer_impl="fused",
        grad_accumulation=_count(row, "grad_accum"),
        data_parallel=gpus,
        sharding="zero1",
    )
    in_a_node = row["zero_or_sharding"].startswith("zero1=8")
    setup = Setup(
        replace(FUSED_BY_HAND, wide=frozenset({"norm"}), apart=frozenset({"ffn"})),
        attention="flash-1",
        parameter_width=2,
        gradient_width=2,
        network="internevo-a100",
        update_group=min(8, gpus) if in_a_node else None,
        whole_updates=True,
    )
    software = "ZeRO-1 in a node" if in_a_node else "ZeRO-1 over all"
    return _run("internevo_a100", row, "a100-80gb-sxm", "llama", setup, software, plan)


# Megatron-LM: its own implementation, fp16 with unfused attention, dropout as its GPT has it, norms clipped (not known
# together with it: some ten thousandths of a step), gradients summed when backward is over. The rows of 2021 recompute
# every layer and interleave stages from 76B on but for the largest (run_table_1.sh: 5, 5, 3, 1 layers in a part of a
# stage); the rows of Korthikanti et al. say their parts, and whether they have sequence parallelism.
LAYOUT = re.compile(r"TP(\d+)xPP(\d+)xDP(\d+)(?: VP(\d+))?( SP)?")
PARTS_OF_2021 = {"gpt-76.1B": 3, "gpt-145.6B": 2, "gpt-310.1B": 2, "gpt-529.6B": 3}


def _megatron(row: Mapping[str, str]) -> Run | str:
    if not row["micro_batch"]:
        return "no micro-batch is stated"
    found = LAYOUT.fullmatch(row["parallelism"])
    assert found is not None, row["parallelism"]
    ranks, stages, replicas = (int(n) for n in found.groups()[:3])
    gpus, micro_batch, sequences = (_count(row, name) for name in ("gpus", "micro_batch", "global_batch_seqs"))
    plan = Plan(
        implementation="megatron",
        batch_size=micro_batch,
        precision="bf16-master",
        checkpointing="selective" if row["checkpointing"].startswith("selective") else "block",
        dropout=0.1,
        grad_accumulation=sequences // (replicas * micro_batch),
        data_parallel=replicas,
        tensor_parallel=ranks,
        pipeline_parallel=stages,
        sequence_parallel=bool(found[5]),
        virtual_stages=int(found[4] or PARTS_OF_2021.get(row["model"], 1)),
    )
    setup = Setup(dtype="fp16", parameter_width=2, gradient_width=2, network="selene", overlap=False)
    measured = None
    if not row["tokens_per_s_per_gpu"]:
        measured = sequences * _count(row, "seq_len") / gpus / float(row["iteration_time_s"])
    year = "2022" if "Table 5" in row["source"] else "2021"
    return _run("megatron_layouts", row, "a100-80gb-sxm", "gpt2", setup, year, plan, measured=measured)


# torchtune and torchtitan: SDPA, and the techniques of the row; torchtune trains in bf16, torchtitan under FSDP's mixed
# precision: parameters gathered in bf16, their fp32 copies and the optimizer shared out, no autocast. torchtitan's
# "selective" keeps every second product of the linear layers and recomputes the others, so a row of it is half way
# between keeping all and keeping none. Left out is what no plan describes: LoRA, 8-bit Adam, products in blocks of 8
# bits (mxfp8), with gradients of weights in 16, or on a card whose products in 8 bits nobody has timed, offloading,
# padded data, a card with an unstated power limit; and rows without a sequence length.
# torchtitan clips gradients to 1.0 (torchtitan/config_manager.py: training.max_norm); its AdamW goes over lists until
# February 2025 (pytorch/torchtitan#881 makes the fused one its default), when float8nocompile's table was a month old,
# which has micro-batches of one sequence (pytorch/torchtitan#778).
LISTED = "torchao/prototype/float8nocompile"
FUSED_PARTS = frozenset({"model", "loss"})
TUNED = {
    "cumulative technique +packed": (frozenset[str](), "none"),
    "cumulative technique +compile": (FUSED_PARTS, "none"),
    "cumulative technique +chunked CE": (FUSED_PARTS, "none"),
    "cumulative technique +activation ckpt": (FUSED_PARTS, "block"),
    "cumulative technique +optimizer in bwd": (FUSED_PARTS, "block"),
}
SELECTIVE = ({"checkpointing": "selective"}, {"checkpointing": "block"})
# torchao's float8: tensorwise where nothing is said, its default (Float8LinearConfig).
EIGHT_BITS = {
    "fp8 tensorwise": "tensorwise",
    "fp8 tensorwise (fp8 all-gather)": "tensorwise",
    "fp8+compile": "tensorwise",
    "fp8 rowwise": "rowwise",
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


def _torchtune(row: Mapping[str, str]) -> Run | str:
    if row["gpu"] not in TUNED_GPUS:
        return f"{row['gpu']}: an offloading or quantised recipe, or an unstated limit of power"
    if not row["seq_len"]:
        return "no sequence length is stated"
    checkpoints = row["checkpointing"]
    precision = "bf16-master"
    changes: tuple[dict[str, Any], ...]
    if row["notes"] in TUNED:
        precision = "bf16"
        fused, checkpointing = TUNED[row["notes"]]
        changes = ({"checkpointing": checkpointing},)
    elif row["dtype"] == "bf16" and checkpoints.startswith("selective"):
        fused, changes = FUSED_PARTS, SELECTIVE
    elif row["dtype"] == "bf16 eager" and checkpoints in TITAN:
        fused, changes = frozenset(), (TITAN[checkpoints],)
    elif row["dtype"] in EIGHT_BITS and row["gpu"] != "MI300X":
        fused = FUSED_PARTS
        changes = SELECTIVE if checkpoints.startswith("selective") else (TITAN[checkpoints],)
    else:
        eight_bit = "fp8" in row["dtype"]
        return "products in 8 bits" if eight_bit else row["notes"].removeprefix("cumulative technique ").lstrip("+")
    gpus = _count(row, "gpus")
    trainer = "torchtune" if row["notes"] in TUNED else "torchtitan"
    plan = Plan(
        # Where none is stated, the memory that is printed is that of one sequence.
        batch_size=_count(row, "micro_batch") if row["micro_batch"] else 1,
        precision=precision,
        attention="sdpa",
        loss="torch-fp32",
        max_grad_norm=1.0 if trainer == "torchtitan" else None,
        optimizer_impl="foreach" if LISTED in row["source"] else "fused",
        data_parallel=gpus,
        sharding="zero3" if gpus > 1 else "none",
    )
    plans = tuple(plan.replace(**change) for change in changes)
    # Both normalize and rotate in fp32; torchtitan rotates complex numbers, which the compiler leaves to eager kernels.
    whole = frozenset({"rotation"}) if trainer == "torchtitan" else frozenset[str]()
    scales = EIGHT_BITS.get(row["dtype"], "")
    variant = Variant(fused, wide=frozenset({"norm", "rotation"}), whole=whole, float8=scales)
    gathered = 1 if "fp8 all-gather" in row["dtype"] else 2
    setup = Setup(variant, parameter_width=gathered, gradient_width=4 if gpus > 1 else 2)
    software = f"{trainer} {'compiled' if fused else 'eager'}{' float8' if scales else ''}"
    return _run("torchtune_torchao", row, TUNED_GPUS[row["gpu"]], "llama", setup, software, *plans)


# Llama models under PyTorch's FSDP. fms-fsdp (IBM): FSDP with bf16 parameters and reductions, HSDP in a node for small
# models, the loss on bf16 logits, norm and rotation in fp32 (foundation-model-stack: fms/modules/layernorm.py,
# positions.py). torchtitan until the end of 2024: reductions in fp32, AdamW of lists (`fused` is off by default), the
# loss on fp32 logits; "selective op" as above. Both clip gradients to 1.0.
NETWORKS = {"fms-fsdp A100": 6.25e9, "fms-fsdp H100": 12.5e9, "torchtitan H100": 50e9}  # bytes/s, as the notes say


def _fsdp(row: Mapping[str, str]) -> Run | str:
    ibm = "fms-fsdp" in row["source"] or "maximizing-training" in row["source"]
    trainer = "fms-fsdp" if ibm else "torchtitan"
    compiled = row["compile"] == "1"
    checkpoints = row["checkpointing"]
    every = {"checkpointing": "block", "checkpoint_every": 2}
    changes: tuple[dict[str, Any], ...] = (
        ({"checkpointing": "selective"}, {"checkpointing": "block"})
        if checkpoints == "selective op"
        else ({"none": {}, "full": {"checkpointing": "block"}}.get(checkpoints, every),)
    )
    gpus = _count(row, "gpus")
    plan = Plan(
        batch_size=_count(row, "micro_batch"),
        precision="bf16-master",
        attention="sdpa",
        loss="torch" if ibm else "torch-fp32",
        max_grad_norm=1.0,
        data_parallel=gpus,
        sharding="zero3",
        shard_group=8 if row["zero_or_sharding"] == "HSDP" else None,
    )
    whole = frozenset[str]() if ibm else frozenset({"rotation"})
    fused = FUSED_PARTS if compiled else frozenset[str]()
    variant = Variant(fused, wide=frozenset({"norm", "rotation"}), whole=whole)
    setup = Setup(
        variant,
        parameter_width=2,
        gradient_width=2 if ibm else 4,
        network=NETWORKS.get(f"{trainer} {row['gpu'].split()[0]}"),
    )
    card = {"A100": "a100-80gb-sxm", "H100": "h100-80gb-sxm" if ibm else "h100-96gb-sxm"}[row["gpu"].split()[0]]
    software = trainer if ibm else f"{trainer} {'compiled' if compiled else 'eager'}"
    plans = tuple(plan.replace(**change) for change in changes)
    return _run("llama_fsdp", row, card, "llama", setup, software, *plans)


SOURCES: dict[str, Callable[[Mapping[str, str]], Run | str]] = {
    "llmfoundry_a100_80gb": _llmfoundry,
    "llmfoundry_h100_80gb": _llmfoundry,
    "vtrain_dp_a100": _vtrain,
    "torchtune_torchao": _torchtune,
    "internevo_a100": _internevo,
    "megatron_layouts": _megatron,
    "llama_fsdp": _fsdp,
}
NAMES = {
    "llmfoundry_a100_80gb": "llm-foundry",
    "llmfoundry_h100_80gb": "llm-foundry",
    "vtrain_dp_a100": "vTrain",
    "torchtune_torchao": "pytorch",
    "internevo_a100": "InternEvo",
    "megatron_layouts": "Megatron-LM",
    "llama_fsdp": "PyTorch FSDP",
}


@cache
def _read() -> tuple[tuple[str, Mapping[str, str], Run | str], ...]:
    """(source, row, the run or why there is none) of every row."""
    return tuple((name, row, make(row)) for name, make in SOURCES.items() for row in rows(name))


def runs(source: str | None = None) -> tuple[Run, ...]:
    """The published training runs that a plan can describe, of one source or of all.

    Raises:
        ConfigError: unknown source.
    """
    names = SOURCES if source is None else (choose("source", source, SOURCES),)
    return tuple(run for name, _, run in _read() if name in names and isinstance(run, Run))


def left_out() -> dict[str, Counter[str]]:
    """Rows that no plan can describe: by source, how many for each reason."""
    found: dict[str, Counter[str]] = {}
    for name, _, run in _read():
        if isinstance(run, str):
            found.setdefault(NAMES[name], Counter())[run] += 1
    return found
