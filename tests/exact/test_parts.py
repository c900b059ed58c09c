"""Random decoders of parts under random recipes: every figure equal to what PyTorch does, to the last byte."""

from __future__ import annotations

from random import Random

import pytest
import torch
from random_parts import draw

from trainer.referee.validate import compare


@pytest.fixture(autouse=True)
def plain_kernels():
    """oneDNN's scratch depends on the machine; one thread, as the sizes are small."""
    threads, enabled = torch.get_num_threads(), torch.backends.mkldnn.enabled
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.enabled = enabled


@pytest.mark.parametrize("seed", range(160, 200))
def test_a_drawn_model_and_recipe(seed):
    m, p = draw(Random(seed))
    assert [row for row in compare(m, p) if row.difference] == [], (m, p)
