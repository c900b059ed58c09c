"""Models in words: what sets one apart from others is in its line, and nothing that it has not."""

import pytest

import estimator as est
from estimator.describe.words import in_words

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("name", "said", "unsaid"),
    [
        (
            "deepseek-v3",
            "8 of 256 experts a token and a shared one, 3 dense layers first, latent attention of 128 heads",
            "QK-norm",
        ),
        ("qwen3-30b-a3b", "8 of 128 experts a token, grouped-query attention 8:1, QK-norm", "dense"),
        ("qwen2-57b-a14b", "and a shared one behind a gate", "QK-norm"),
        ("gpt-oss-20b", "windows of 128 tokens in 1 of 2 layers, attention sinks", "dense"),
        ("gemma-2-2b", "scores capped at 50, rotary positions, GeGLU feed-forward of 9,216", "experts"),
        ("gemma-3-12b-text", "windows of 1,024 tokens in 5 of 6 layers", "capped"),
        ("llama-4-maverick-text", "experts in 2 of 4 layers", "dense"),
        ("smollm3-3b", "no positions in 1 of 4 layers", "windows"),
        ("glm-4-32b", "rotary positions on 64 of 128 of a head", "windows"),
        ("falcon-7b", "multi-query attention of 71 heads", "biases"),
        ("jetmoe-8b", "attention by experts of 16 heads", "shared"),
        ("gpt2-xl", "learned positions, GELU (tanh) feed-forward of 6,400, LayerNorm, biases in attention", "rotary"),
        ("olmo-1b", "LayerNorm without a weight", "biases"),
        ("gpt-1", "LayerNorm after attention and feed-forward are added", "before"),
    ],
)
def test_what_sets_a_model_apart_is_said(name, said, unsaid):
    line = in_words(est.preset(name))
    assert said in line
    assert unsaid not in line


def test_every_preset_has_a_line_of_words():
    for name in est.presets():
        line = in_words(est.preset(name))
        assert "None" not in line
        assert ", ," not in line
        assert len(line) < 400
