"""Random decoders of parts under random recipes, and families: every figure is what PyTorch does, to the last byte.

A sample: `python tools/check_decoders.py` holds all families at two sizes, and any number of draws.
"""

from __future__ import annotations

from random import Random

import pytest
from families_at_sizes import families
from random_parts import draw

from estimator.describe.model import ModelConfig
from estimator.describe.parts import Attention, Parts
from estimator.describe.plan import Plan
from trainer.referee.validate import compare

pytestmark = pytest.mark.usefixtures("no_onednn", "one_thread")


@pytest.mark.parametrize("seed", range(160, 200))
def test_a_drawn_model_and_recipe(seed):
    m, p = draw(Random(seed))
    assert [row for row in compare(m, p) if row.difference] == [], (m, p)


@pytest.mark.parametrize("family", ["deepseek_v3", "gemma3_text", "gpt_oss", "llama4_text"])
def test_a_family_in_other_sizes(family):
    _, m, p = list(families([family]))[1]
    assert [row for row in compare(m, p) if row.difference] == [], (m, p)


def test_no_byte_depends_on_the_routing():
    """The real step's tokens are dealt out so that one expert gets three times its share."""
    _, m, p = next(families(["deepseek_v3"]))
    assert [row for row in compare(m, p.replace(imbalance=3.0)) if row.difference] == []


def test_what_attention_found_is_let_go_behind_its_gate():
    """The name that held it is bound anew: of attention that is computed again, with dropout, it would be the peak."""
    parts = Parts(order="parallel", attention=Attention(out_gate=True))
    m = ModelConfig(
        "own", num_layers=8, d_model=7, num_heads=4, head_dim=2, num_kv_heads=1, d_ff=14, vocab_size=5,
        context_length=6, parts=parts,
    )  # fmt: skip
    p = Plan(batch_size=2, attention="naive", dropout=0.1, checkpointing="attention", checkpoint_every=2)
    assert [row for row in compare(m, p) if row.difference] == []
