from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.settings import choices
from trainer.model.decoder import build_model
from trainer.model.generate import generate, sample

pytestmark = pytest.mark.usefixtures("one_thread")


CONFIGS = {
    "gpt2": ModelConfig("gpt2", num_layers=2, d_model=16, num_heads=4, vocab_size=23, context_length=12),
    "llama": ModelConfig(
        "llama", num_layers=2, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, vocab_size=23, context_length=12
    ),
}


def build(family, attention="sdpa", seed=0, dtype=torch.float64, window=None):
    torch.manual_seed(seed)
    model = build_model(CONFIGS[family].replace(sliding_window=window), Plan(attention=attention)).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():  # far from the initial weights, whose logits are nearly alike
            weight.mul_(4).add_(torch.randn_like(weight), alpha=0.1)
    return model


families = pytest.mark.parametrize("family", CONFIGS)
attentions = pytest.mark.parametrize("attention", ["naive", "sdpa"])
ON_CPU = [name for name in choices(Plan)["attention"] if name != "sdpa-efficient"]  # that is CUDA's


@families
@attentions
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_cached_logits_equal_uncached_ones(family, attention, data):
    """Worked in float64, they are equal in every bit of a float32, however the tokens are cut into pieces.

    In one dtype they cannot be: a BLAS adds up the products of a matrix and of a vector in different orders.
    """
    window = data.draw(st.sampled_from([None, 1, 2, 5, 12]))
    model = build(family, attention, data.draw(st.integers(0, 99)), window=window)
    B, T = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    ids = torch.randint(23, (B, T))
    cuts = sorted({0, T, *data.draw(st.lists(st.integers(0, T), max_size=12))})
    cache = model.new_cache(B)
    with torch.no_grad():
        whole = model(ids)
        pieces = torch.cat([model(ids[:, a:b], cache) for a, b in pairwise(cuts)], 1)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(pieces.float(), whole.float())


@families
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cached_generation_equals_uncached_also_beyond_the_context(family, temperature, window):
    model = build(family, window=window)
    prompt = torch.randint(23, (3, 5))
    texts = [
        generate(model, prompt, 15, temperature, use_cache=cached, generator=torch.Generator().manual_seed(1))
        for cached in (True, False)
    ]
    assert torch.equal(*texts)
    assert texts[0].shape == (3, 20)
    assert torch.equal(texts[0][:, :5], prompt)


@families
@pytest.mark.parametrize("attention", ON_CPU)
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_token_reaches_a_window_in_each_layer_and_no_further(family, attention, window):
    """Two layers: position 0 is seen up to position 2 (window - 1), by a path of the last seen token in each."""
    model = build(family, attention, window=window)
    ids = torch.randint(1, 23, (1, 12))
    changed = ids.clone()
    changed[0, 0] = 0
    with torch.no_grad():
        moved = (model(ids) != model(changed)).any(-1)[0]
    last = 2 * (window - 1)
    assert moved[: last + 1].all()
    assert not moved[last + 1 :].any()


@families
def test_all_kernels_see_the_same_window(family):
    ids = torch.randint(23, (2, 12))
    with torch.no_grad():
        naive, *others = (build(family, attention, window=4)(ids) for attention in ON_CPU)
        whole = build(family)(ids)
    for other in others:
        torch.testing.assert_close(other, naive, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole[:, :4], naive[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole[:, 4:], naive[:, 4:], rtol=1e-3)


@families
def test_greedy_takes_the_likeliest_of_the_last_context_length_tokens(family):
    model = build(family)
    ids = generate(model, torch.randint(23, (1, 20)), 6, temperature=0)
    for end in range(20, 26):
        assert ids[0, end] == model(ids[:, end - 12 : end])[0, -1].argmax()


@families
def test_a_prompt_longer_than_the_context_is_cropped(family):
    model = build(family)
    prompt = torch.randint(23, (2, 30))
    assert torch.equal(generate(model, prompt, 3, 0)[:, 30:], generate(model, prompt[:, -12:], 3, 0)[:, 12:])


@families
def test_rows_do_not_see_one_another_and_stop_one_by_one(family):
    model = build(family)
    prompts = torch.randint(23, (6, 4))
    free = generate(model, prompts, 8, temperature=0)
    eos = int(free[0, 6])  # row 0 stops here at the latest
    stopped = generate(model, prompts, 8, temperature=0, eos_token_id=eos)
    for row, prompt in enumerate(prompts):
        alone = generate(model, prompt, 8, temperature=0, eos_token_id=eos)
        n = len(alone)
        assert torch.equal(stopped[row, :n], alone)
        assert (stopped[row, n:] == eos).all()
        assert torch.equal(free[row, :n], alone)
        assert n == 12 or alone[-1] == eos
        assert eos not in alone[4:-1]


def test_generation_ends_when_all_rows_have():
    model = build("gpt2")
    prompt = torch.randint(23, (1, 4)).expand(3, 4)
    eos = int(generate(model, prompt[0], 1, temperature=0)[-1])
    assert generate(model, prompt, 100, temperature=0, eos_token_id=eos).shape == (3, 5)


def test_an_end_of_text_in_the_prompt_does_not_stop_a_row():
    model = build("gpt2")
    assert len(generate(model, torch.tensor([7, 7, 7]), 1, temperature=0, eos_token_id=7)) == 4


def test_shapes_modes_and_gradients_are_left_alone():
    model = build("gpt2")
    for prompt in (torch.tensor([1, 2]), torch.tensor([[1, 2]], dtype=torch.int32)):
        for training in (True, False):
            model.train(training)
            ids = generate(model, prompt, 3)
            assert ids.ndim == prompt.ndim
            assert ids.dtype == torch.int64
            assert model.training is training
            assert not ids.requires_grad
    assert torch.equal(generate(model, torch.tensor([1, 2]), 0), torch.tensor([1, 2]))
    assert all(weight.grad is None for weight in model.parameters())


logits = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12).map(lambda x: torch.tensor([x]))


@settings(deadline=None)
@given(logits, st.floats(1e-45, 1e3), st.none() | st.integers(1, 20), st.none() | st.floats(1e-6, 1))
def test_samples_are_among_the_likeliest(x, temperature, top_k, top_p):
    draws = {int(sample(x, temperature, top_k, top_p)) for _ in range(5)}
    probabilities = torch.softmax((x[0].double() - x.max()) / temperature, -1)
    for draw in draws:
        likelier = probabilities > probabilities[draw] * (1 + 1e-5)
        if top_k is not None:
            assert likelier.sum() < top_k
            continue
        if top_p is not None:
            assert probabilities[likelier].sum() < top_p + 1e-5


@settings(deadline=None)
@given(logits)
def test_temperature_zero_top_k_one_and_a_tiny_top_p_are_greedy(x):
    greedy = sample(x, 0)
    assert x[0, greedy] == x.max()
    assert torch.equal(sample(x, 1, top_k=1), x.sort(dim=-1, descending=True, stable=True).indices[:, 0])
    assert x[0, sample(x, 1, top_p=1e-9)] == x.max()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [0.5, 0.3, 0.15, 0.05]),
        ({"temperature": 0.5}, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
        ({"top_k": 2}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.75}, [0.625, 0.375, 0, 0]),
        ({"top_p": 0.85}, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.375, 0, 0]),
    ],
)
def test_frequencies_are_those_of_the_cut_distribution(arguments, expected):
    n = 20_000
    order = torch.tensor([2, 0, 3, 1])  # not sorted by likelihood
    x = torch.tensor([0.5, 0.3, 0.15, 0.05])[order].log().expand(n, 4)
    drawn = sample(x, generator=torch.Generator().manual_seed(0), **arguments)
    counts = torch.bincount(drawn, minlength=4) / n
    torch.testing.assert_close(counts, torch.tensor(expected)[order], atol=5 * 0.5 / n**0.5, rtol=0)
    assert ((counts > 0) == (torch.tensor(expected)[order] > 0)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_p": 1.5}, "top_p = 1.5"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"prompt": torch.tensor([])}, "prompt of shape"),
        ({"prompt": torch.tensor([1.0])}, "prompt of shape"),
        ({"prompt": torch.tensor([23])}, r"prompt id 23: must be in \[0, 23\)"),
        ({"prompt": torch.tensor([-1])}, "prompt id -1"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        generate(build("gpt2"), **{"prompt": torch.tensor([1]), "max_new_tokens": 1, **arguments})


def test_a_diverged_model_is_reported():
    model = build("gpt2")
    torch.nn.init.constant_(model.head.weight, float("nan"))
    with pytest.raises(ConfigError, match="diverged"):
        generate(model, torch.tensor([1]), 1)
