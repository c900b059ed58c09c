"""Closed forms of code that was recorded at small sizes, at sizes that were not used."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import trainer
from estimator.describe.checks import ConfigError
from trainer.referee.recorder.truth import judged

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from recorder_forms import FORMS

SIZES = {"B": (2, 3, 5), "d": (6, 10, 14), "L": (3, 4, 5)}


class Block(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def build(B, d, L):
    module = nn.Sequential(*(Block(d) for _ in range(L)), nn.Linear(d, 7))
    return module, lambda module, x: module(x).square().mean(), (torch.rand(B, 11, d),)


@pytest.fixture(scope="module")
def forms():
    return trainer.closed_forms(build, SIZES)


@pytest.mark.parametrize("sizes", [{"B": 8, "d": 32, "L": 9}, {"B": 64, "d": 20, "L": 4}])
def test_they_are_exact_at_sizes_not_used(forms, sizes):
    recording = trainer.record(lambda: build(**sizes))
    assert forms.evaluate(**sizes) == recording.peak_bytes
    assert sum(forms.by_module(**sizes).values()) == recording.peak_bytes
    symbols = {s: sizes[s.name] for s in forms.peak_bytes.free_symbols}
    assert forms.peak_bytes.subs(symbols).doit() == recording.peak_bytes
    assert forms.repeated == "L"


def test_sizes_that_the_layers_do_not_reach_are_refused(forms):
    with pytest.raises(ConfigError, match="L = 2: must be 3 or more"):
        forms.evaluate(B=2, d=6, L=2)


def test_code_that_does_something_else_at_another_size_is_refused_with_the_event():
    def jumps(B, d):
        def loss(module, x):
            y = module(x)
            return (y.tanh() if B > 2 else y.sigmoid()).mean()

        return nn.Linear(d, d), loss, (torch.rand(B, d),)

    with pytest.raises(ConfigError, match=r"event \d+ at B = 3.* is .*tanh.*; at the first sizes it is .*sigmoid"):
        trainer.closed_forms(jumps, {"B": (2, 3, 5), "d": (6, 10, 14)})


@pytest.mark.parametrize("name", ["transformers' ViT", "a ResNet of basic blocks"])
def test_those_of_other_peoples_modules_are_a_real_steps_at_sizes_not_used(name):
    build, sizes, unseen = FORMS[name]
    assert trainer.closed_forms(build, sizes).evaluate(**unseen) == judged(partial(build, **unseen)).peak[1]
