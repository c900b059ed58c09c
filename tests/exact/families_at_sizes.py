"""Every family of decoders at two sizes each, under two recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError
from estimator.describe.hf import from_hf
from estimator.describe.hub import HUB
from estimator.describe.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from estimator.describe.model import ModelConfig

HF = Path(__file__).parents[1] / "data" / "hf"
# The recipe of each of a family's two sizes.
PLANS = (
    Plan(batch_size=2, seq_len=40),
    Plan(
        batch_size=3,
        seq_len=21,
        precision="bf16-mixed",
        attention="sdpa",
        loss="torch",
        checkpointing="block",
        optimizer_impl="foreach",
        grad_accumulation=2,
        max_grad_norm=1.0,
    ),
)


def shrunk(m: ModelConfig) -> ModelConfig:
    """A published model in sizes that run in a moment."""
    sizes = {"num_layers": 4, "d_model": 64, "num_heads": 4, "head_dim": 16, "vocab_size": 160, "context_length": 128}
    others = {"d_ff": 96, "d_expert": 48, "d_shared": 40, "num_experts": 8, "experts_per_token": 2} | {
        "expert_groups": 2,
        "groups_per_token": 1,
        "rotary_dim": 8,
        "num_kv_heads": 4 if m.kv_heads == m.num_heads else min(m.kv_heads, 2),
    }
    return m.replace(**sizes, **{name: value for name, value in others.items() if getattr(m, name) is not None})


def resized(m: ModelConfig) -> ModelConfig:
    """The same parts and pattern in other sizes, most of them odd."""
    changes: dict[str, Any] = {"num_layers": m.num_layers + 3, "vocab_size": 131}
    if m.made_of.attention.latent == "none":
        changes["head_dim"] = m.e
    if m.family != "gpt2":  # whose width is that of its heads
        changes["d_model"] = 44
    others = {"d_ff": 53, "d_expert": 19, "d_shared": 23, "kv_rank": 14, "query_rank": 18} | {
        "num_experts": 2 * (m.num_experts or 0),
        "sliding_window": 9,
        "attention_chunk": 8,
    }
    changes |= {name: value for name, value in others.items() if getattr(m, name) is not None}
    return m.replace(**changes)


def with_a_kernel(m: ModelConfig, p: Plan) -> Plan:
    """The plan, without fused attention where the model has what no fused kernel computes."""
    try:
        p.attention_kernel("cpu", m)
    except ConfigError:
        return p.replace(attention="naive-fp32")
    return p


def _rows() -> Iterator[tuple[str, str, ModelConfig]]:
    """(name, family, model) of each tiny model, and of each published one whose class came with its weights."""
    for line in (HF / "tiny.jsonl").read_text().splitlines():
        row = json.loads(line)
        yield row["name"], row["family"], from_hf(row["config"])
    for line in (HF / "more.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["config"]["model_type"] in HUB:
            yield f"{row['name']}, shrunk", row["config"]["model_type"], shrunk(from_hf(row["config"]))


def families(names: Collection[str] = ()) -> Iterator[tuple[str, ModelConfig, Plan]]:
    """Each family as it is in the data of the tests, and in other sizes."""
    for name, family, m in _rows():
        if not names or family in names:
            for size, p in zip((m, resized(m)), PLANS, strict=True):
                yield name, size, with_a_kernel(size, p)
