"""Random decoders of parts under random recipes, and families: every figure is what PyTorch does, to the last byte.

A sample: `python tools/check_decoders.py` holds all families at two sizes, and any number of draws.
"""

from __future__ import annotations

from random import Random

import pytest
from families_at_sizes import families
from random_parts import draw

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
