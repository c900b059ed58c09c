"""The number behind each letter, for a model and a plan."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from estimator.eager.letters import Sizes

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig

# Letters and the fields of a ModelConfig that they stand for.
FIELDS = {
    "L": "num_layers",
    "d": "d_model",
    "h": "num_heads",
    "k": "num_kv_heads",
    "e": "head_dim",
    "f": "d_ff",
    "V": "vocab_size",
    "C": "context_length",
    "E": "num_experts",
    "K": "experts_per_token",
    "f_e": "d_expert",
    "f_s": "d_shared",
    "G": "expert_groups",
    "G_K": "groups_per_token",
    "d_q": "query_rank",
    "d_c": "kv_rank",
    "e_n": "nope_dim",
    "e_v": "value_dim",
    "d_e": "embedding_dim",
}
# The same with those of a Plan: the field behind each letter that a user gives.
GIVEN = {"B": "batch_size", "T": "seq_len", **FIELDS, "D": "data_parallel"}


def cpu_threads() -> int:
    """PyTorch's number of threads: its own answer if it is loaded in this process, else the cores we may use."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sizes_of(m: ModelConfig, batch_size: int, seq_len: int, threads: int | None = None, shards: int = 1) -> Sizes:
    """The number behind each letter for a model.

    Args:
        m: the model.
        batch_size: sequences in a micro-batch.
        seq_len: tokens in each.
        threads: CPU threads; None means `cpu_threads()`.
        shards: accelerators that share what is sharded (`Plan.shards`).
    """
    given = {
        "B": batch_size,
        "T": seq_len,
        "g": m.num_heads // m.kv_heads,
        "n": cpu_threads() if threads is None else threads,
        "D": shards,
        "W": m.sliding_window or m.context_length,
        "A": m.attention_chunk or m.context_length,
        "e_r": m.rope_dim or m.rotary_dim,
    }
    given |= {letter: getattr(m, field) for letter, field in FIELDS.items()}
    return Sizes({letter: size for letter, size in given.items() if size is not None})
