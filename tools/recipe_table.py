"""Write the table of docs/recipes.md anew: `python tools/recipe_table.py`."""

from __future__ import annotations

from pathlib import Path

import estimator as est
from estimator.show.formatting import size

GPU = "a100-80gb-sxm"
MODELS = {"gpt2-xl": 1024, "llama-3-8b": 8192}  # sequence length
BASE = {"precision": "bf16-mixed", "attention": "sdpa", "optimizer_impl": "fused"}
RECIPES = {
    "fp32, unfused attention": {"precision": "fp32", "attention": "naive"},
    "fp32": {"precision": "fp32"},
    "bf16-mixed": {},
    "fp16-mixed": {"precision": "fp16-mixed"},
    "bf16-mixed, 8-bit AdamW": {"optimizer": "adamw-8bit", "optimizer_impl": "auto"},
    "bf16-master": {"precision": "bf16-master"},
    "bf16-master, fp32 gradients": {"precision": "bf16-master", "fp32_gradients": True},
    "bf16": {"precision": "bf16"},
    "bf16, dropout 0.1": {"precision": "bf16", "dropout": 0.1},
    "bf16, unfused attention, fp32 softmax": {"precision": "bf16", "attention": "naive-fp32"},
    "bf16, F.cross_entropy": {"precision": "bf16", "loss": "torch"},
    "bf16, F.cross_entropy of fp32 logits": {"precision": "bf16", "loss": "torch-fp32"},
    "bf16, chunked loss": {"precision": "bf16", "loss": "chunked"},
    "bf16, checkpointing each block": {"precision": "bf16", "checkpointing": "block"},
    "bf16, checkpointing every second block": {"precision": "bf16", "checkpointing": "block", "checkpoint_every": 2},
    "bf16, selective checkpointing": {"precision": "bf16", "checkpointing": "selective"},
    "bf16, checkpointing, SGD with momentum": {
        "precision": "bf16",
        "checkpointing": "block",
        "optimizer": "sgd-momentum",
    },
    "bf16, checkpointing, Lion": {
        "precision": "bf16",
        "checkpointing": "block",
        "optimizer": "lion",
        "optimizer_impl": "auto",
    },
}


def rows() -> list[str]:
    """A line for each recipe and model."""
    lines = [
        "| recipe | model | peak at micro-batch 1 | when | what holds most | largest micro-batch on 80 GB |",
        "|---|---|---|---|---|---|",
    ]
    for name, changes in RECIPES.items():
        for model, seq_len in MODELS.items():
            plan = est.Plan(**{**BASE, "seq_len": seq_len, **changes})
            memory = est.estimate(model, plan, GPU).memory
            holds = max(memory.parts, key=lambda part: memory.parts[part])
            when = f"{memory.where.phase}, {memory.where.module or 'model'}"
            most = f"{holds}, {size(memory.parts[holds])}"
            largest = est.max_batch_size(model, plan, GPU)
            lines.append(f"| {name} | {model} | {size(memory.peak)} | {when} | {most} | {largest or 'none'} |")
    return lines


def with_table(page: str) -> str:
    """The page with today's table in the place of the one that it has."""
    start = page.index("| recipe |")
    return page[:start] + "\n".join(rows()) + "\n"


if __name__ == "__main__":
    kept = Path(__file__).parents[1] / "docs" / "recipes.md"
    kept.write_text(with_table(kept.read_text(encoding="utf-8")), encoding="utf-8")
