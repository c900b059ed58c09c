"""Bad input gets one clear error that names the field, the value and what is allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError, choose
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan


def model(**changes):
    fields = {"family": "gpt2", "num_layers": 2, "d_model": 32, "num_heads": 4, "vocab_size": 10, "context_length": 8}
    return ModelConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers = 0: must be an integer of at least 1"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"d_model": 2.5}, r"d_model = 2.5"),
        ({"num_heads": True}, "num_heads = True"),
        ({"num_heads": 5}, r"d_model = 32: must be divisible by num_heads \(5\)"),
        ({"family": "gpt3"}, r"family = 'gpt3': did you mean gpt2\? allowed are gpt2, llama"),
        ({"num_kv_heads": 2}, "num_kv_heads = 2: gpt2 is multi-head"),
        ({"head_dim": 7}, "head_dim = 7: gpt2 needs"),
        ({"family": "llama"}, "d_ff = None: a llama"),
        ({"family": "llama", "d_ff": 8, "num_kv_heads": 3}, r"num_kv_heads = 3: must divide num_heads \(4\)"),
        ({"family": "llama", "d_ff": 8, "head_dim": 7}, "head_dim = 7: rotary"),
        ({"tie_embeddings": "yes"}, "tie_embeddings = 'yes': must be true or false"),
        ({"qkv_bias": False}, "qkv_bias = False: gpt2 has biases"),
        ({"sliding_window": 0}, "sliding_window = 0: must be an integer of at least 1"),
        ({"sliding_window": 2.5}, "sliding_window = 2.5: must be an integer of at least 1"),
    ],
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        model(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seq_len": -3}, "seq_len = -3"),
        ({"attention": "flsh"}, "attention = 'flsh'"),
        ({"optimizer": "adam w"}, "optimizer = 'adam w': did you mean adamw"),
        ({"max_grad_norm": 0}, "max_grad_norm = 0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm = nan"),
        ({"dropout": 1.0}, "dropout = 1.0: must be a number of at least 0 and below 1"),
        ({"grad_accumulation": 1.5}, "grad_accumulation = 1.5"),
    ],
)
def test_plans_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        Plan(**changes)


def test_a_sequence_longer_than_the_positions():
    with pytest.raises(ConfigError, match="seq_len = 9: the model holds 8 positions"):
        Plan(seq_len=9).tokens(model())
    assert Plan().tokens(model()) == 8


def test_a_window_as_long_as_the_context_is_none():
    assert [model(sliding_window=w).sliding_window for w in (1, 7, 8, 9, None)] == [1, 7, None, None, None]


@given(st.integers(1, 8), st.integers(1, 16), st.integers(1, 8))
def test_configurations_round_trip(heads, width, layers):
    m = model(num_heads=heads, d_model=heads * width, num_layers=layers)
    assert ModelConfig(**m.to_dict()) == m
    assert m.replace() == m
    p = Plan(batch_size=layers)
    assert Plan(**p.to_dict()) == p


def test_replace_derives_again_what_was_derived():
    wider = model().replace(d_model=64)
    assert (wider.head_dim, wider.d_ff) == (16, 256)
    assert model(d_ff=40).replace(d_model=64).d_ff == 40
    with pytest.raises(ConfigError, match="ModelConfig field = 'layers'"):
        model().replace(layers=3)


def test_auto_is_what_torch_picks():
    assert [Plan().implementation(d) for d in ("cpu", "cuda")] == ["loop", "foreach"]
    assert Plan(optimizer="sgd").implementation("cuda") == "bundled"


def test_choose_says_what_is_near():
    assert choose("x", "a", ("a", "b")) == "a"
    with pytest.raises(ConfigError, match=r"x = 3: allowed are a, b"):
        choose("x", 3, ("a", "b"))
