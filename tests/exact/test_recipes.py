"""Every recipe on random shapes: saved bytes, peak and FLOPs equal to what PyTorch does, to the last one."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import OPTIMIZERS, Plan
from estimator.describe.settings import choices
from trainer.referee.validate import compare

pytestmark = pytest.mark.usefixtures("no_onednn")

EXAMPLES = 3  # shapes a recipe: each is several real steps under the profiler


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Both families, edges of 1 among the sizes, sliding windows shorter and longer than the sequence."""
    heads = draw(st.sampled_from([1, 2, 4]))
    layers, vocab, context = (
        draw(st.integers(1, 8)),
        draw(st.sampled_from([1, 17, 101])),
        draw(st.sampled_from([1, 6, 13])),
    )
    window = draw(st.sampled_from([None, None, 1, 3, 5]))
    if draw(st.booleans()):
        width = heads * draw(st.sampled_from([1, 3, 8]))
        ffn = draw(st.integers(1, 40))
        return ModelConfig("gpt2", layers, width, heads, vocab, context, d_ff=ffn, sliding_window=window)
    kv_heads = draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0]))
    head_dim = draw(st.sampled_from([2, 4, 6]))
    width = draw(st.sampled_from([heads * head_dim, 7, 24]))
    bias, tied = draw(st.booleans()), draw(st.booleans())
    ffn = draw(st.integers(1, 40))
    return ModelConfig("llama", layers, width, heads, vocab, context, kv_heads, head_dim, ffn, tied, bias, window)


def check(data: st.DataObject, windowed: bool = False, **recipe: object) -> None:
    m = data.draw(models().filter(lambda m: (m.sliding_window or 99) < m.context_length) if windowed else models())
    least = m.sliding_window + 1 if windowed else 1
    every = data.draw(st.integers(1, 3)) if recipe.get("checkpointing", "none") != "none" else 1
    p = Plan(
        checkpoint_every=every,
        batch_size=data.draw(st.integers(1, 3)),
        seq_len=data.draw(st.integers(least, m.context_length)),
        grad_accumulation=data.draw(st.integers(1, 3)),
        max_grad_norm=data.draw(st.sampled_from([None, 1.0])),
        **recipe,
    )
    wrong = [row for row in compare(m, p) if row.difference]
    assert not wrong, f"{m} {p}: {wrong}"


quick = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate,),  # a smaller case of a few bytes' difference says no more, and takes minutes to find
)


@pytest.mark.parametrize(("optimizer", "impl"), [(name, impl) for name, impls in OPTIMIZERS.items() for impl in impls])
@quick
@given(data=st.data())
def test_optimizers(optimizer, impl, data):
    check(data, optimizer=optimizer, optimizer_impl=impl, attention="sdpa")


# Models whose peak is in the optimizer's step.
NARROW = [
    ModelConfig("gpt2", 4, 32, 4, 1, 13, d_ff=37),
    ModelConfig("llama", 3, 24, 4, 101, 6, 1, 4, 36, tie_embeddings=False, qkv_bias=True),
    ModelConfig("gpt2", 2, 16, 2, 101, 6, d_ff=40),
]


@pytest.mark.parametrize(("optimizer", "impl"), [(name, impl) for name, impls in OPTIMIZERS.items() for impl in impls])
def test_optimizers_of_bf16_parameters(optimizer, impl):
    for m, name in ((NARROW[0], "bf16"), (NARROW[1], "bf16"), (NARROW[2], "bf16-mixed")):
        p = Plan(seq_len=1, precision=name, optimizer=optimizer, optimizer_impl=impl, max_grad_norm=1.0)
        assert [row for row in compare(m, p) if row.difference] == [], m


CHOICES = choices(Plan)
ALONE = [name for name in CHOICES["precision"] if name != "bf16-fsdp"]  # which takes several processes: see tests/ranks
ON_CPU = [name for name in CHOICES["attention"] if name != "sdpa-efficient"]  # that is CUDA's


def drawn(data: st.DataObject, windowed: bool = False, **fixed: object) -> None:
    """`check` with a recipe of which `fixed` is given and the rest drawn."""
    choices = {
        "precision": ALONE,
        "attention": ON_CPU,
        "checkpointing": CHOICES["checkpointing"],
        "loss": CHOICES["loss"],
        "dropout": (0.0, 0.0, 0.1),
    }
    recipe = fixed | {name: data.draw(st.sampled_from(values)) for name, values in choices.items() if name not in fixed}
    if recipe["attention"] == "sdpa-flash" and recipe["dropout"]:  # refused together on the CPU
        recipe["dropout" if "attention" in fixed else "attention"] = 0.0 if "attention" in fixed else "sdpa"
    check(data, windowed, optimizer="sgd", **recipe)


@pytest.mark.parametrize(
    ("attention", "dropout"),
    [(name, rate) for name in ON_CPU for rate in (0.0, 0.1) if not (name == "sdpa-flash" and rate)],
)
@quick
@given(data=st.data())
def test_attention_and_dropout(attention, dropout, data):
    drawn(data, attention=attention, dropout=dropout)


@pytest.mark.parametrize("precision", ALONE)
@quick
@given(data=st.data())
def test_precision(precision, data):
    drawn(data, precision=precision)


@pytest.mark.parametrize("attention", ON_CPU)
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
@quick
@given(data=st.data())
def test_sliding_window(precision, attention, data):
    drawn(data, True, attention=attention, precision=precision)


@pytest.mark.parametrize("checkpointing", CHOICES["checkpointing"])
@quick
@given(data=st.data())
def test_checkpointing(checkpointing, data):
    drawn(data, checkpointing=checkpointing)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_unfused_attention_under_a_selective_checkpoint_adds_its_mask_out_of_place(precision):
    m = ModelConfig("gpt2", 2, 2, 2, 101, 13, 2, 1, 29, sliding_window=2)  # whose peak is there
    p = Plan(precision=precision, attention="sdpa-math", loss="chunked", checkpointing="selective", optimizer="sgd")
    assert [row for row in compare(m, p) if row.difference] == []


@pytest.mark.parametrize("loss", CHOICES["loss"])
@quick
@given(data=st.data())
def test_losses(loss, data):
    drawn(data, loss=loss)


def test_an_implementation_that_an_optimizer_does_not_have_is_refused_with_those_that_it_has():
    with pytest.raises(ConfigError, match="lion has bundled"):
        Plan(optimizer="lion", optimizer_impl="fused")
