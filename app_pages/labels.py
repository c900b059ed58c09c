"""What inputs are called, and what each is, in the words of the docstrings."""

from __future__ import annotations

import re
from functools import cache

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


@cache
def explained(cls: type) -> dict[str, str]:
    """What each field of a dataclass is, from the Attributes of its docstring."""
    text = (cls.__doc__ or "").split("Attributes:\n")[-1].split("Raises:")[0]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {9,}.*)*)", text, flags=re.MULTILINE)
    return {name.strip(): " ".join(said.split()) for names, said in entries for name in names.split(",")}
