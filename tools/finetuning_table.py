"""Published memory of fine-tuning beside the estimate: `python tools/finetuning_table.py` prints it for docs/accuracy.

The measurements are rows of torchtune_torchao.csv and litgpt_lora.csv in estimator/data/published, which name their
sources. What a source does not say is taken from the defaults of the recipe that it names, and is written in the column
of assumptions.
"""

from __future__ import annotations

import csv
import sys
from importlib import resources
from typing import Any, NamedTuple

import estimator as est

GIB = 2**30


class Row(NamedTuple):
    """A measurement, and the run that it is taken for.

    Attributes:
        note: what of the row's notes tells it from others of its source.
        model, gpu: a preset and an accelerator.
        plan: the recipe.
        assumed: what the source does not say, or what the estimate does not model.
    """

    note: str
    model: str
    gpu: str
    plan: dict[str, Any]
    assumed: str


TECHNIQUES = {"precision": "bf16", "attention": "sdpa", "batch_size": 2, "seq_len": 4096, "optimizer_impl": "fused"}
CHUNKED = TECHNIQUES | {"loss": "chunked"}
CHECKPOINTED = CHUNKED | {"checkpointing": "block"}
LORA = {"adapter": "lora", "adapter_rank": 64, "adapter_targets": "q,v,out,gate,up,down"}
QLORA = {"adapter": "lora", "base_precision": "nf4-double"}
RECIPE = CHECKPOINTED | {"seq_len": 2048, "adapter": "lora", "adapter_rank": 8}
EAGER = "measured with torch.compile, which the estimate does not have"
RANK = "rank 64 as in its configs/llama3_2/3B_lora_single_device.yaml; its adapters are bf16, ours fp32"
ROWS = (
    Row(
        "technique +packed", "llama-3.2-3b", "a100-80gb-sxm", TECHNIQUES | {"loss": "torch-fp32"}, "loss of fp32 logits"
    ),
    Row("technique +compile", "llama-3.2-3b", "a100-80gb-sxm", TECHNIQUES | {"loss": "torch-fp32"}, EAGER),
    Row("technique +chunked CE", "llama-3.2-3b", "a100-80gb-sxm", CHUNKED, EAGER),
    Row("technique +activation ckpt", "llama-3.2-3b", "a100-80gb-sxm", CHECKPOINTED, EAGER),
    Row(
        "technique +optimizer in bwd",
        "llama-3.2-3b",
        "a100-80gb-sxm",
        CHECKPOINTED | {"update": "in-backward"},
        EAGER,
    ),
    Row(
        "technique +8-bit AdamW",
        "llama-3.2-3b",
        "a100-80gb-sxm",
        CHECKPOINTED | {"update": "in-backward", "optimizer": "adamw-8bit", "optimizer_impl": "auto"},
        f"{EAGER}; its activations are on the host, ours are not",
    ),
    Row("technique LoRA", "llama-3.2-3b", "a100-80gb-sxm", CHECKPOINTED | LORA, f"{RANK}; activations as above"),
    Row(
        "technique QLoRA",
        "llama-3.2-3b",
        "a100-80gb-sxm",
        CHECKPOINTED | LORA | QLORA,
        f"{RANK}; its NF4 is torchao's; activations as above",
    ),
    Row(
        "finetune LoRA; packed data; tok/s is total as printed",
        "llama-3.1-8b",
        "rtx-4090",
        RECIPE | {"adapter_targets": "q,v,out,gate,up,down"},
        f"rank 8 as in its configs/llama3_1/8B_lora_single_device.yaml; {EAGER}",
    ),
    Row(
        "finetune QLoRA",
        "llama-3.1-8b",
        "rtx-4090",
        RECIPE | QLORA,
        f"rank 8 on all linear layers, as in its configs/llama3_1/8B_qlora_single_device.yaml; {EAGER}",
    ),
)


LITGPT = {"precision": "bf16", "attention": "sdpa", "adapter": "lora", "adapter_rank": 8, "adapter_dropout": 0.05}
BASES = {"none": "none", "bnb.nf4": "nf4", "bnb.nf4-dq": "nf4-double"}


def measurements(name: str) -> list[dict[str, str]]:
    """The rows of a file."""
    path = resources.files("estimator").joinpath("data", "published", f"{name}.csv")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Print the table in Markdown."""
    write = sys.stdout.write
    write("| run | measured, GiB | allocated | reserved | reserved / measured | what is assumed or not modelled |\n")
    write("|---|---|---|---|---|---|\n")
    known = measurements("torchtune_torchao")
    for row in ROWS:
        (found,) = [x for x in known if row.note in x["notes"] and (row.gpu[:4] != "rtx-" or "4090" in x["gpu"])]
        memory = est.estimate(row.model, est.Plan(**row.plan), row.gpu).memory
        measured = float(found["peak_memory_gib"])
        name = found["notes"].removeprefix("cumulative technique ").split(";")[0]
        run = f"{found['model']} on {found['gpu']}, {found['micro_batch'][:-2]} x {found['seq_len'][:-2]}: {name}"
        write(
            f"| {run} | {measured:.1f} | {memory.allocated / GIB:.1f} | {memory.reserved / GIB:.1f} | "
            f"{memory.reserved / GIB / measured:.2f} | {row.assumed} |\n"
        )
    for found in measurements("litgpt_lora"):  # rank 8 beside queries and values, as its count of parameters says
        base = BASES[found["quantisation"]]
        sizes = {"batch_size": int(found["micro_batch"]), "seq_len": int(found["seq_len"])}
        plan = est.Plan(**LITGPT, **sizes, adapter_targets="q,v", base_precision=base, optimizer_impl="foreach")
        r = est.estimate(found["model"], plan, "a100-40gb-sxm")
        if r.values.trained_parameters != int(found["trained_parameters"]):
            raise ValueError(f"{found}: the estimate trains {r.values.trained_parameters} parameters")
        measured = float(found["peak_memory_gb"]) * 1e9 / GIB
        run = f"{found['model']} on A100, {sizes['batch_size']} x {sizes['seq_len']}: LitGPT LoRA, base {base}"
        write(
            f"| {run} | {measured:.1f} | {r.memory.allocated / GIB:.1f} | {r.memory.reserved / GIB:.1f} | "
            f"{r.memory.allocated / GIB / measured:.2f} of allocated | rank 8 and q,v by its count of parameters |\n"
        )


if __name__ == "__main__":
    main()
