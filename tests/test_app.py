"""The page without a browser: every figure on it is the library's, every input reaches the library."""

import json

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.formatting import dollars, hours, size
from estimator.presets import from_hf

pytest.importorskip("streamlit", reason="the page needs the app extra: pip install -e '.[app]'")
from streamlit.testing.v1 import AppTest

from app_pages import formulas

GPU = "a100-80gb-sxm"


def opened(**query):
    at = AppTest.from_file("../app.py", default_timeout=60)
    for key, value in query.items():
        at.query_params[key] = value
    at.run()
    assert not at.exception, at.exception[0].value
    return at


def metrics(at):
    return {m.label: m.value for m in at.metric}


def test_it_opens_on_gpt2_xl_on_an_a100():
    at = opened()
    r = est.estimate("gpt2-xl", est.Plan(), GPU, mfu=0.5, steps=400_000, global_batch_size=1024)
    shown = metrics(at)
    assert shown["Memory needed"] == size(r.memory.needed)
    assert shown["Training time"] == hours(r.time.seconds)
    assert shown["Largest micro-batch"] == str(est.max_batch_size("gpt2-xl", est.Plan(), GPU))
    assert at.success[0].value.startswith("Fits")
    assert not at.error


def test_what_does_not_fit_is_said_so():
    at = opened(batch_size="8")
    assert at.error[0].value.startswith("Does not fit")


def test_a_bad_size_shows_one_message_and_leaves_the_rest():
    at = opened(**{"gpt2-xl.d_model": "1601"})
    assert [e.value for e in at.error] == ["d_model = 1601: must be divisible by num_heads (25), or give head_dim"]
    assert metrics(at)["Memory needed"]


def test_a_sequence_that_is_too_long_shows_one_message_and_leaves_the_rest():
    at = opened(seq_len="2048")
    assert [e.value for e in at.error] == ["seq_len = 2048: the model holds 1024 positions (context_length)"]
    assert metrics(at)["Memory needed"] == metrics(opened())["Memory needed"]


def viewed(view, **query):
    at = AppTest.from_string(f"from app_pages import inputs, {view}; {view}.show(inputs.sidebar())", default_timeout=60)
    for key, value in query.items():
        at.query_params[key] = value
    at.run()
    assert not at.exception, at.exception[0].value
    return at


@pytest.mark.parametrize("model", ["gpt2", "llama-3.2-1b", "qwen2.5-0.5b"])
@pytest.mark.parametrize("recipe", [{}, {"attention": "sdpa"}, {"checkpointing": "block", "batch_size": "3"}])
def test_every_headline_figure_is_the_librarys(model, recipe):
    shown = metrics(opened(model=model, gpu="h100-80gb-sxm", count="8", steps="1000", mfu="40", **recipe))
    plan = est.Plan(**{k: int(v) if v.isdigit() else v for k, v in recipe.items()})
    r = est.estimate(model, plan, "h100-80gb-sxm", mfu=0.4, steps=1000, global_batch_size=1024, count=8)
    spent = est.cost("h100-80gb-sxm", r.time.seconds, 8)
    assert shown["Memory needed"] == size(r.memory.needed)
    assert shown["Training time"] == hours(r.time.seconds)
    assert shown["Largest micro-batch"] == f"{est.max_batch_size(model, plan, 'h100-80gb-sxm'):,}"
    assert shown["Cost"] == dollars(spent.dollars.median)


def test_gb_in_place_of_gib():
    r = est.estimate("gpt2-xl", est.Plan(), GPU)
    assert metrics(opened(unit="GB"))["Memory needed"] == size(r.memory.needed, "GB")


def test_taking_a_change_of_the_recipe_makes_it_fit():
    at = opened(batch_size="8")
    take = next(b for b in at.button if b.key == "take checkpointing block")
    take.click().run()
    assert not at.exception
    assert at.success[0].value.startswith("Fits")
    assert at.selectbox(key="checkpointing").value == "block"


def test_a_pasted_configuration_becomes_the_model():
    at = opened()
    config = {"model_type": "llama", "num_hidden_layers": 5, "hidden_size": 320, "num_attention_heads": 5}
    at.text_area(key="paste").set_value(json.dumps(config)).run()
    assert not at.exception
    assert at.selectbox(key="model").value == "own-llama"
    r = est.estimate(from_hf(config), est.Plan(), GPU)
    assert metrics(at)["Memory needed"] == size(r.memory.needed)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not JSON"), ('{"model_type": "mamba"}', "mamba"), ("[]", "must be a JSON object"), ("\x00", "not JSON")],
)
def test_a_bad_configuration_shows_one_message_and_leaves_the_rest(text, said):
    at = opened()
    at.text_area(key="paste").set_value(text).run()
    assert not at.exception
    assert len(at.error) == 1
    assert said in at.error[0].value
    assert metrics(at)["Memory needed"] == "29.5 GiB"


@pytest.mark.parametrize("figure", formulas.FIGURES)
def test_the_formulas_page_shows_every_figure(figure):
    at = viewed("formulas", figure=figure)
    assert at.selectbox(key="figure").value == figure
    assert at.latex
    assert len(at.table) >= 2


def test_the_sweep_says_how_many_fit():
    at = viewed("sweep")
    most = est.max_batch_size("gpt2-xl", est.Plan(), GPU)
    assert f"64 configurations, of which {most} fit" in at.caption[0].value
    at = viewed("sweep", x="seq_len", y="batch_size", show="seconds", log="true")
    assert "configurations" in at.caption[0].value
    assert "range" in viewed("sweep", **{"batch_size.from": "9", "batch_size.to": "3"}).error[0].value


def test_compare_shows_each_configurations_own_figures():
    at = viewed("compare", columns="3", **{"B.model": "gpt2", "C.gpu": "h100-80gb-sxm", "C.checkpointing": "block"})
    table = at.table[0].value
    assert table.loc["parameters", "B"] == f"{est.estimate('gpt2').values.parameters:,}"
    r = est.estimate("gpt2-xl", est.Plan(checkpointing="block"), "h100-80gb-sxm")
    assert table.loc["memory needed", "C"] == size(r.memory.needed)


def test_the_measurement_is_equal_to_the_estimate():
    pytest.importorskip("torch", reason="needs the trainer extra")
    at = viewed("validate", checkpointing="block")
    at.button[0].click().run()
    assert not at.exception
    assert at.success[0].value.startswith("Every figure")


names = st.sampled_from(
    [
        "model",
        "gpu",
        "batch_size",
        "seq_len",
        "precision",
        "optimizer",
        "optimizer_impl",
        "mfu",
        "steps",
        "count",
        "unit",
        "max_grad_norm",
        "price",
        "embed",
        "gpt2-xl.d_model",
        "gpt2-xl.num_layers",
        "own-llama.d_ff",
        "grad_accumulation",
    ]
)
values = st.one_of(
    st.text(max_size=12),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(["own-llama", "gpt2", "mi300x-192gb", "fused", "lion", "sgd", "true", "null", "1e400", "NaN", "é"]),
)


@settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(st.dictionaries(st.one_of(names, st.text(min_size=1, max_size=8)), values, max_size=6))
@example({"batch_size": "1e400"})
@example({"unit": ""})
@example({"gpt2-xl.num_layers": "2000", "gpt2-xl.vocab_size": "10000000", "batch_size": "10000000"})
def test_any_query_string_opens_the_page(query):
    at = opened(**query)
    assert at.header or at.error
