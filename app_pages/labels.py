"""What inputs are called, and what each is, in the words of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan

LABELS = {
    "num_layers": "Layers",
    "d_model": "d_model",
    "num_heads": "Heads",
    "num_kv_heads": "Key/value heads",
    "head_dim": "Head width",
    "d_ff": "d_ff",
    "vocab_size": "Vocabulary",
    "tie_embeddings": "Head shares the embedding",
    "qkv_bias": "Biases on q, k, v",
    "sliding_window": "Sliding window",
    "gpu": "Accelerator",
    "batch_size": "Micro-batch",
    "seq_len": "Sequence",
    "grad_accumulation": "Accumulation",
    "max_grad_norm": "Clip to norm",
    "optimizer_impl": "Implementation",
}


def label(name: str) -> str:
    """What the input of a field is called on the page."""
    return LABELS.get(name, name.replace("_", " ").capitalize())


def plain(text: str) -> str:
    """A text as Markdown that looks as it is written: what a user wrote in it becomes no link, image or formula."""
    escaped = "".join(f"\\{c}" if c in "\\`*[]<>$~!@^|" else c for c in text)
    return escaped.replace("://", "\\://").replace("www.", "www\\.")


def explained(cls: type[ModelConfig | Plan]) -> dict[str, str]:
    """What each field of a dataclass is."""
    return cls.HELP
