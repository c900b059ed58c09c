"""The page without a browser: every figure on it is the library's, every input reaches the library."""

import json
import math
import os
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

import estimator as est
from estimator.accounting import accounts
from estimator.answers import derivations, sweeps
from estimator.answers.advice import Advisor
from estimator.answers.layouts import MEGATRON, search
from estimator.answers.request import Request
from estimator.answers.sweeps import reach
from estimator.describe.hf import from_hf
from estimator.describe.presets import preset_groups
from estimator.describe.settings import choices
from estimator.describe.words import in_words
from estimator.show import commands
from estimator.show.formatting import dollars, hours, prefixed, size
from estimator.show.planning import headline

pytest.importorskip("streamlit", reason="the page needs the app extra: pip install -e '.[app]'")
from streamlit.testing.v1 import AppTest

from app_pages import estimate, formulas, layouts, scenarios, sweep, validate
from app_pages import plan as plan_page
from app_pages.inputs import HIDDEN

HF = Path(__file__).parents[1] / "data" / "hf"
TINY = [json.loads(line) for line in (HF / "tiny.jsonl").read_text().splitlines()]
GPU = "a100-80gb-sxm"
RUN = {"steps": 400_000, "global_batch_size": 1024}
VIEWS = ("estimate", "plan", "formulas", "sweep", "compare", "validate")


def ran(at):
    at.run()
    assert not at.exception, at.exception[0].value
    return at


def opened(**query):
    at = AppTest.from_file("../../app.py", default_timeout=120)
    for key, value in query.items():
        at.query_params[key] = value
    return ran(at)


def viewed(view, **query):
    """One view and the foot, as `app.py` draws them."""
    script = f"from app_pages import inputs, keep, {view}; s = inputs.sidebar(); {view}.show(s); keep.show(s)"
    at = AppTest.from_string(script, default_timeout=120)
    for key, value in query.items():
        at.query_params[key] = value
    return ran(at)


@pytest.fixture
def unadvised(monkeypatch):
    """Without the changes of the recipe, which take an account of every other recipe and are tested by themselves."""
    monkeypatch.setattr(estimate, "changes", lambda *_: ())


def metrics(at):
    return {m.label: m.value for m in at.metric}


def code(at, language):
    return [c.value for c in at.code if c.language == language]


def is_the_estimate(at, inputs):
    """Whether the page's headline is that of a scenario's inputs."""
    asked = {name: value for name, value in inputs.items() if name not in ("model", "gpu", "count", *RUN)}
    run = RUN | {name: inputs[name] for name in RUN if name in inputs} | {"count": inputs.get("count", 1)}
    r = est.estimate(inputs["model"], est.Plan(**asked), inputs["gpu"], **run)
    shown = metrics(at)
    assert shown["Memory needed"] == size(r.memory.needed)
    assert shown["Training time"] == hours(r.time.seconds)
    largest = est.max_batch_size(r.model, r.plan, inputs["gpu"], global_batch_size=run["global_batch_size"])
    assert shown["Max micro-batch"] == f"{largest:,}"
    assert at.success[0].value.startswith("Fits")
    assert not at.error


@pytest.mark.usefixtures("unadvised")
def test_it_opens_on_a_run_that_people_make():
    at = opened()
    is_the_estimate(at, scenarios.SCENARIOS[scenarios.FIRST])
    assert "days" in next(m.delta for m in at.metric if m.label == "Training time")  # not years


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_a_scenario_is_a_click_and_all_of_them_fit(name):
    at = opened(model="qwen2.5-0.5b", batch_size="3", **{"qwen2.5-0.5b.num_layers": "2"})
    at.button(key=f"scenario {name}").click()
    ran(at)
    is_the_estimate(at, scenarios.SCENARIOS[name])


@pytest.mark.usefixtures("unadvised")
def test_the_courses_question_keeps_its_link():
    is_the_estimate(opened(model="gpt2-xl"), {"model": "gpt2-xl", "gpu": GPU})


@pytest.mark.usefixtures("unadvised")
def test_tokens_and_steps_say_the_same():
    at = opened(model="gpt2", batch_size="4")
    assert at.number_input(key="tokens").value == pytest.approx(400_000 * 1024 * 1024 / 1e9)
    at.number_input(key="tokens").set_value(26.0)
    ran(at)
    assert at.number_input(key="steps").value == round(26e9 / 1024 / 1024)
    at.number_input(key="batch_tokens").set_value(2**19)
    ran(at)
    assert at.number_input(key="global_batch_size").value == 512
    assert at.number_input(key="tokens").value == pytest.approx(26.0, rel=1e-4)


@pytest.mark.usefixtures("unadvised")
def test_a_deadline_is_met_or_what_would_meet_it_is_said():
    query = {"model": "gpt2", "batch_size": "4", "steps": "10000", "attention": "sdpa"}
    days = est.estimate("gpt2", est.Plan(batch_size=4, attention="sdpa"), GPU, steps=10_000, global_batch_size=1024)
    late = opened(**query, deadline=str(days.time.days / 3.5))
    assert "about 4 accelerators" in late.warning[0].value
    assert not opened(**query, deadline=str(days.time.days * 2)).warning


@pytest.mark.usefixtures("unadvised")
def test_where_it_does_not_fit_time_and_cost_say_so():
    at = opened(model="gpt2-xl", batch_size="8")
    under = {m.label: m.delta for m in at.metric}
    assert [under[name] for name in ("Training time", "Cost", "Energy")] == ["if it fitted"] * 3
    assert under["Memory needed"] != "if it fitted"


PLANNED = {"plan.dollars": "300", "plan.days": "2"}


def test_a_plan_is_the_librarys_and_each_row_opens_as_an_estimate():
    at = viewed("plan", **PLANNED)
    found = est.plan(dollars=300, days=2, price="on-demand")
    assert at.success[0].value.replace("\\$", "$") == headline(found)
    first = found.options[0]
    inputs = plan_page.inputs_of(first)
    q = first.request
    assert inputs["model"] == "own-llama"
    assert inputs["own-llama.num_layers"] == q.model.num_layers
    query = {name: str(value).lower() for name, value in inputs.items()}
    shown = metrics(viewed("estimate", goal="memory", **query))
    r = q.estimate()
    assert shown["Memory needed"] == size(r.memory.needed)
    assert shown["Training time"] == hours(r.time.seconds)
    assert shown["Cost"] == dollars(first.dollars)


def test_a_plan_of_nothing_asks_for_something():
    assert "at least one" in viewed("plan").info[0].value
    assert viewed("plan", **{"plan.dollars": "0.001"}).error[0].value.startswith("Nothing fits")


def test_what_does_not_fit_is_said_so_and_what_would():
    at = opened(model="gpt2-xl", batch_size="8", goal="speed")
    assert at.error[0].value.startswith("Does not fit")
    assert "A micro-batch of 5 fits; so does this one with attention sdpa." in at.error[0].value
    assert est.max_batch_size("gpt2-xl", est.Plan(), GPU, global_batch_size=1024) == 5
    assert est.estimate("gpt2-xl", est.Plan(batch_size=8, attention="sdpa"), GPU, global_batch_size=1024).fits


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"gpt2-xl.d_model": "1601"}, "d_model = 1601: must be divisible by num_heads (25), or give head_dim"),
        ({"seq_len": "2048"}, "seq_len = 2048: the model holds 1024 positions (context_length)"),
        ({"optimizer": "lion", "optimizer_impl": "fused"}, "optimizer_impl = 'fused': lion has bundled"),
    ],
)
def test_a_bad_input_shows_one_message_and_leaves_the_rest(query, said):
    at = opened(**query)
    assert len(at.error) == 1
    assert at.error[0].value.startswith(said)
    assert metrics(at)["Memory needed"]


RECIPES = [
    {},
    {"attention": "sdpa", "precision": "bf16", "batch_size": 2},
    {"checkpointing": "block", "batch_size": 3, "seq_len": 512, "max_grad_norm": 1.0},
    {"optimizer": "sgd", "loss": "torch", "batch_size": 64, "compile": True},
]


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize("model", ["gpt2", "gpt2-xl", "llama-3.2-1b", "qwen2.5-0.5b"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mfu", [None, 0.4])
def test_every_headline_figure_is_the_librarys(model, recipe, mfu):
    gpu, run = "h100-80gb-sxm", {"steps": 1000, "global_batch_size": 512, "count": 8}
    query = {name: str(x).lower() for name, x in (recipe | run).items()}
    at = viewed("estimate", model=model, gpu=gpu, **query, **({"mfu": str(100 * mfu)} if mfu else {}))
    plan = est.Plan(**recipe)
    r = est.estimate(model, plan, gpu, mfu=mfu, **run)
    spent = est.cost(gpu, r.time.seconds, 8)
    shown = metrics(at)
    assert shown["Memory needed"] == size(r.memory.needed)
    assert shown["Training time"] == hours(r.time.seconds)
    assert shown["Max micro-batch"] == f"{est.max_batch_size(model, r.plan, gpu, global_batch_size=512):,}"
    assert shown["Cost"] == dollars(spent.dollars.median)
    assert shown["Energy"] == prefixed(spent.kilowatt_hours * 1e3, "Wh")
    table = next(frame.value for frame in at.dataframe if "parameters" in frame.value)
    assert (table["parameters"].astype(int) == r.to_frame()["parameters"].astype(int)).all()
    assert (table["backward_flops"].astype(int) == r.to_frame()["backward_flops"].astype(int)).all()


CASES = [
    {},
    {"model": "llama-3.2-1b", "gpu": "h100-80gb-sxm", "seq_len": "2048", "mfu": "35", "count": "8", "compile": "true"},
    {"model": "own-llama", "own-llama.d_model": "512", "own-llama.num_heads": "8", "own-llama.qkv_bias": "true",
     "attention": "sdpa", "batch_size": "4", "seq_len": "1024"},
    {"model": "mistral-7b", "mistral-7b.sliding_window": "512", "seq_len": "1024", "attention": "sdpa"},
    {"gpt2-xl.num_layers": "12", "gpt2-xl.tie_embeddings": "false", "max_grad_norm": "1", "optimizer": "lion"},
]  # fmt: skip


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize("query", CASES)
def test_the_python_and_the_command_give_the_figures_of_the_page(capsys, query):
    at = viewed("estimate", **query)
    shown = metrics(at)
    (python,), (command,) = code(at, "python"), code(at, "sh")
    exec(python, {})  # noqa: S102 - that it runs is what is tested
    needed, fits, run_hours, largest = capsys.readouterr().out.split()
    assert size(int(needed)) == shown["Memory needed"]
    assert (fits == "True") == bool(at.success)
    assert hours(float(run_hours) * 3600) == shown["Training time"]
    assert f"{int(largest):,}" == shown["Max micro-batch"]
    words = shlex.split(command)
    assert words[0] == "estimate"
    assert commands.main([*words[1:], "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert size(printed["memory"]["needed"]) == shown["Memory needed"]
    assert hours(printed["time"]["seconds"]) == shown["Training time"]


@pytest.mark.usefixtures("unadvised")
def test_gb_in_place_of_gib():
    r = est.estimate("gpt2-xl", est.Plan(), GPU, **RUN)
    assert metrics(opened(unit="GB"))["Memory needed"] == size(r.memory.needed, "GB")


def test_the_changes_are_the_librarys_and_taking_one_makes_it_fit():
    at = opened(model="gpt2-xl", batch_size="8")
    found = Advisor(est.estimate("gpt2-xl", est.Plan(batch_size=8), GPU, **RUN), 1024).improvements("memory")
    rows = [m.value for m in at.markdown if "— needs" in m.value]
    assert len(rows) == len(found)
    for row, change in zip(rows, found, strict=True):
        fields = {name: value for name, value in change.fields.items() if name not in HIDDEN}
        assert all(str(value) in row for value in fields.values() if not isinstance(value, bool))
        assert f"needs {size(change.estimate.memory.needed)}" in row
        assert f"largest micro-batch 5 → {change.largest}" in row
        assert ("check" in row) == change.fits
    at.button(key="take checkpointing block").click()
    ran(at)
    assert at.success[0].value.startswith("Fits")
    assert at.selectbox(key="checkpointing").value == "block"


@pytest.mark.usefixtures("unadvised")
def test_the_accumulation_follows_from_the_global_batch():
    at = opened(model="gpt2-xl", batch_size="4", count="8")
    turns = est.estimate("gpt2-xl", est.Plan(batch_size=4, grad_accumulation=32), GPU, count=8)
    assert "32 micro-batches of 4 on each accelerator" in " ".join(c.value for c in at.caption)
    assert metrics(at)["Memory needed"] == size(turns.memory.needed)


@pytest.mark.usefixtures("unadvised")
def test_a_pasted_configuration_becomes_the_model():
    at = opened(model="gpt2", batch_size="4")
    config = {"model_type": "llama", "num_hidden_layers": 5, "hidden_size": 320, "num_attention_heads": 5}
    at.text_area(key="paste").set_value(json.dumps(config))
    ran(at)
    assert at.selectbox(key="model").value == "own-llama"
    assert metrics(at)["Memory needed"] == size(
        est.estimate(from_hf(config), est.Plan(batch_size=4), GPU, **RUN).memory.needed
    )


@pytest.mark.usefixtures("unadvised")
def test_a_pasted_configuration_of_any_family_becomes_the_model_and_its_link_opens_it():
    row = next(row for row in TINY if row["name"] == "tiny deepseek_v3")
    at = opened(model="gpt2", batch_size="4")
    at.text_area(key="paste").set_value(json.dumps(row["config"]))
    ran(at)
    m = from_hf(row["config"])
    needed = size(est.estimate(m, est.Plan(batch_size=4), GPU, **RUN).memory.needed)
    assert at.selectbox(key="model").value == "own-config"
    assert metrics(at)["Memory needed"] == needed
    assert any(f"{in_words(m)}." == c.value for c in at.caption)
    assert "est.ModelConfig(" in code(at, "python")[0]
    (link,) = [at.query_params["config"]] if isinstance(at.query_params["config"], str) else at.query_params["config"]
    assert from_hf(json.loads(link)) == m
    assert set(json.loads(link)) < set(row["config"])  # the fields that the model depends on
    again = opened(batch_size="4", model="own-config", config=link)
    assert metrics(again)["Memory needed"] == needed
    again.number_input(key="own-config.num_experts").set_value(16)
    assert metrics(ran(again))["Memory needed"] == size(
        est.estimate(m.replace(num_experts=16), est.Plan(batch_size=4), GPU, **RUN).memory.needed
    )
    group = at.selectbox(key="group")
    assert set(group.options) == {"all", *preset_groups()}
    group.set_value("Gemma")
    listed = ran(at).selectbox(key="model").options
    assert listed[: len(preset_groups()["Gemma"])] == list(preset_groups()["Gemma"])
    assert "gpt2" not in listed


@pytest.mark.usefixtures("unadvised")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ('{"model_type": "mamba"}', "mamba"),
        ("[]", "must be a JSON object"),
        ("\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_configuration_is_refused_and_the_figures_of_the_model_before_it_are_gone(text, said):
    at = opened(model="gpt2-xl")
    before = metrics(at)["Memory needed"]
    at.text_area(key="paste").set_value(text)
    ran(at)
    assert [said in error.value for error in at.error] == [True, True]  # on the page, and at the input
    assert not at.metric
    assert not at.code
    at.button(key="go on").click()
    ran(at)
    assert not at.error
    assert metrics(at)["Memory needed"] == before == size(est.estimate("gpt2-xl", **RUN).memory.needed)


@pytest.mark.usefixtures("unadvised")
def test_what_a_link_says_in_vain_is_named():
    at = opened(
        model="gpt2", batchsize="8", optimizer="adamv", seq_len="1e400", count="0", steps="00500", precision="bf16"
    )
    (said,) = [w.value for w in at.warning]
    assert "'batchsize': this page has no such input. Was batch_size meant?" in said
    assert "optimizer = 'adamv': cannot be, and is adamw here" in said
    assert "seq_len = '1e400': cannot be, and is empty here" in said
    assert "count = '0': cannot be, and is 1 here" in said
    assert "steps" not in said
    assert "precision" not in said
    at.button(key="link dismissed").click()
    ran(at)
    assert not at.warning
    assert not opened(model="gpt2", batch_size="8", goal="speed", compile="TRUE").warning


@pytest.mark.usefixtures("unadvised")
def test_what_a_user_writes_becomes_no_markup():
    evil = "![x](http://a.example/b.png)<b>www.a.example $x$ `c`"
    at = opened(model="gpt2", adapter_targets=evil, adapter="lora", **{evil: evil})
    texts = [x.value for x in (*at.error, *at.warning)]
    assert len(texts) == 3
    for text in texts:
        assert re.search(r"(?<!\\)[\[<`$]|(?<!\\)://|www\.", text) is None
    assert all("a.example" in text for text in texts if not text.startswith("Shown without"))


@pytest.mark.usefixtures("unadvised")
def test_every_input_of_the_recipe_is_drawn_and_explained():
    at = opened()
    for name, names in choices(est.Plan).items():
        if name not in HIDDEN:
            assert tuple(at.selectbox(key=name).options) == names
    widgets = [*at.selectbox, *at.number_input, *at.toggle]
    silent = [w.label for w in widgets if not w.help]
    assert silent == []


@pytest.mark.parametrize("figure", formulas.FIGURES)
def test_the_formulas_page_shows_every_figure(figure):
    at = viewed("formulas", figure=figure, batch_size="2", mfu="40")
    r = est.estimate("gpt2-xl", est.Plan(batch_size=2), GPU, mfu=0.4, **RUN)
    d = next(
        d for d in (derivations.peak(r), derivations.needed(r), derivations.hours(r), *_forms(r)) if d.name == figure
    )
    assert at.subheader[0].value == d.title
    assert at.latex[0].value.strip("$\n") == d.aligned()
    assert d.python in code(at, "python")
    assert len(at.table) == 2  # the textbook's account, and the notes


def _forms(r):
    return [derivations.form(r, name) for name in accounts.FORMS]


def test_another_number_for_a_symbol():
    at = viewed("formulas", figure="parameters", **{"parameters.L": "24"})
    other = est.estimate(est.preset("gpt2-xl").replace(num_layers=24))
    assert any(f"= **{other.values.parameters:,}**" in m.value for m in at.markdown)


def test_the_notes_answers_stand_beside_the_right_ones():
    notes = viewed("formulas", figure="needed").table[1].value
    assert list(notes.iloc[:, 1]) == [
        "18.72 GB",
        "0.32 GB",
        "191",
        "17 FLOPs a parameter",
        "133,004,351,504,384 FLOPs",
        "455 hours",
    ]
    assert list(notes.iloc[:, 2]) == [
        "24.9 GB",
        "15.5 GB",
        "3 sequences",
        "14 FLOPs a parameter",
        "3,506,703,564,800 FLOPs",
        "14.0 years",
    ]


def test_the_sweep_says_how_many_fit():
    at = viewed("sweep")
    most = est.max_batch_size("gpt2-xl", est.Plan(), GPU, global_batch_size=1024)
    shown = f"{math.ceil(1.5 * most)} configurations, of which {most} fit"
    assert shown in at.caption[0].value
    assert at.selectbox(key="x").options[0] == "Micro-batch"
    assert shown in viewed("sweep", x="Micro-batch", show="Memory needed").caption[0].value


def test_a_sweep_ends_where_it_matters():
    """Half as much again as the largest that fits, found by the library's own answer to that."""
    q = Request("gpt2-xl", est.preset("gpt2-xl"), est.Plan(attention="sdpa", checkpointing="block"), GPU, **RUN)
    for axis in ("num_layers", "d_ff"):
        end = reach(q, axis)
        fits = [sweeps.point(q, {axis: at}).estimate().fits for at in (int(end / 1.7), end)]
        assert fits == [True, False]
    assert reach(q, "seq_len") == 1024
    assert reach(q, "steps") == 1_600_000


@pytest.mark.parametrize("metric", sweep.METRICS)
@pytest.mark.parametrize("axes", [{"x": "d_model"}, {"x": "seq_len", "y": "count", "log": "true"}])
def test_every_figure_can_be_swept_and_its_python_runs(capsys, metric, axes):
    at = viewed("sweep", show=metric, model="gpt2", **{"count.to": "4", "d_model.to": "1200"}, **axes)
    assert "configurations, of which" in at.caption[0].value
    python = next(text for text in code(at, "python") if "sweep(" in text)
    exec(python, {})  # noqa: S102 - that it runs is what is tested
    assert f"'{metric}'" in capsys.readouterr().out


def test_a_range_that_cannot_be_is_said():
    assert "range" in viewed("sweep", **{"batch_size.from": "9", "batch_size.to": "3"}).error[0].value
    assert "no on-demand price" in viewed("sweep", gpu="l4-24gb", show="dollars").info[0].value


def test_compare_shows_each_configurations_own_figures():
    at = viewed("compare", columns="3", **{"B.model": "gpt2", "B.gpu": "l4-24gb", "C.checkpointing": "block"})
    differs, same = (table.value for table in at.table)
    assert list(differs.columns) == ["A", "B", "C"]
    assert "precision" in same.index
    assert set(differs.index) == {"model", "accelerator", "checkpointing", *differs.index[3:]}
    assert not set(differs.index) & set(same.index)
    for name, model, plan, gpu in (
        ("A", "gpt2-xl", est.Plan(), GPU),
        ("B", "gpt2", est.Plan(), "l4-24gb"),
        ("C", "gpt2-xl", est.Plan(checkpointing="block"), GPU),
    ):
        r = est.estimate(model, plan, gpu, **RUN)
        for what, text in (
            ("parameters", f"{r.values.parameters:,}"),
            ("memory needed", size(r.memory.needed)),
            ("training time", hours(r.time.seconds)),
        ):
            assert differs.loc[what, name].split(" (")[0] == text
    first = est.estimate("gpt2-xl", est.Plan(), GPU, **RUN)
    again = est.estimate("gpt2-xl", est.Plan(checkpointing="block"), GPU, **RUN)
    said = next(m.value for m in at.markdown if m.value.startswith("**C, "))
    assert f"checkpointing block: {again.time.hours / first.time.hours:.1f}x slower" in said
    assert f"{size(first.memory.needed - again.memory.needed)} less memory" in said


def test_a_configuration_that_cannot_be_is_said_in_its_column():
    at = viewed("compare", optimizer_impl="fused", **{"B.optimizer_impl": "bundled", "B.optimizer": "muon"})
    assert len(at.error) == 1
    assert "muon has loop, foreach, fused" in at.error[0].value
    assert not any(m.value.startswith("**B, ") for m in at.markdown)


def test_the_measurement_is_equal_to_the_estimate():
    pytest.importorskip("torch", reason="needs the trainer extra")
    at = viewed("validate", checkpointing="block")
    at.button[0].click()
    ran(at)
    assert at.success[0].value == "All 8 figures that can be measured are equal, to the byte and the FLOP."
    assert (at.dataframe[0].value["difference"] == 0).all()


def test_a_measurement_that_breaks_is_said(monkeypatch):
    pytest.importorskip("torch", reason="needs the trainer extra")
    monkeypatch.setattr(validate, "COMMAND", ("false",))
    at = viewed("validate")
    at.button[0].click()
    ran(at)
    assert "exit status 1" in at.error[0].value


def test_without_torch_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(validate, "find_spec", lambda name: None)  # noqa: ARG005 - as `importlib.util.find_spec`
    at = viewed("validate")
    assert "pip install" in at.info[0].value
    assert len(at.dataframe) == 2  # what is on file needs no torch


def test_results_on_file_are_shown():
    exact, times = (frame.value for frame in viewed("validate").dataframe[-2:])
    assert len(exact) + len(times) == len(list(validate.RESULTS.glob("*.json")))
    assert (exact["figures"] == exact["equal"]).all()
    assert all(float(error.rstrip("%")) <= 25 for error in times["greatest"])


NAMES = [
    *("model", "gpu", "batch_size", "seq_len", "precision", "optimizer", "optimizer_impl", "mfu", "steps", "count"),
    *("unit", "max_grad_norm", "price", "embed", "gpt2-xl.d_model", "gpt2-xl.num_layers", "own-llama.d_ff"),
    *("grad_accumulation", "global_batch_size", "figure", "peak.L", "x", "y", "show", "log", "batch_size.from"),
    *("seq_len.to", "columns", "B.model", "B.gpu", "D.batch_size", "C.optimizer"),
]
VALUES = [
    *("own-llama", "gpt2", "mi300x-192gb", "fused", "lion", "sgd", "true", "null", "1e400", "NaN", "é", "", "-1", "0"),
    *("count", "d_model", "dollars", "hours", "GB", "4", "10000000", "1e17"),
]
values = st.one_of(
    st.text(max_size=12), st.integers(-(10**20), 10**20).map(str), st.floats().map(str), st.sampled_from(VALUES)
)
queries = st.dictionaries(st.one_of(st.sampled_from(NAMES), st.text(min_size=1, max_size=8)), values, max_size=7)


@settings(
    max_examples=int(os.environ.get("FUZZ_DRAWS", "30")),
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(st.sampled_from(VIEWS), queries)
@example("estimate", {"batch_size": "1e400"})
@example("estimate", {"unit": ""})
@example("estimate", {"model": "llama-4-scout-text"})  # of ten million tokens
@example("estimate", {"gpt2-xl.num_layers": "2000", "gpt2-xl.vocab_size": "10000000", "batch_size": "10000000"})
@example("sweep", {"gpt2-xl.d_ff": "10000000", "x": "num_layers", "num_layers.to": "10000000", "y": "d_model"})
@example("sweep", {"seq_len": "1", "gpt2-xl.num_layers": "1", "y": "seq_len"})
@example("formulas", {"peak.L": "1e30", "seq_len": "1"})
@example("compare", {"columns": "", "B.gpu": "nothing"})
def test_any_query_string_opens_the_page(view, query):
    script = (
        f"from app_pages import estimate, inputs, keep, {view}; estimate.changes = lambda *_: (); "
        f"inputs.drop_infinite(); s = inputs.sidebar(); {view}.show(s); keep.show(s)"
    )
    at = AppTest.from_string(script, default_timeout=120)
    for key, value in query.items():
        at.query_params[key] = value
    ran(at)
    assert at.header or at.error


def test_a_request_is_remembered_by_what_it_asks():
    q = Request("gpt2", est.preset("gpt2"), est.Plan(), GPU)
    assert q.estimate() is replace(q).estimate()


def test_layouts_are_those_of_the_search_and_lead_to_their_estimate():
    asked = {"layouts.count": "4", "layouts.batch": "16", "layouts.code": "Megatron-LM's"}
    at = viewed("layouts", model="tinyllama-1.1b", gpu=GPU, seq_len="512", **asked)
    found = search("tinyllama-1.1b", MEGATRON.replace(seq_len=512), GPU, count=4, global_batch_size=16)
    first = found.options[0]
    assert f"Fastest of {len(found.options):,} that fit: {layouts.said(first)}" in at.success[0].value
    inputs = dict(pair.split("=") for pair in _first_link(at).split("&"))
    r = est.estimate("tinyllama-1.1b", first.plan, GPU, global_batch_size=16)
    assert inputs["count"] == "4"
    assert inputs["global_batch_size"] == "16"
    assert inputs["implementation"] == "megatron"
    assert size(r.memory.needed, "GiB") in at.markdown[1].value
    pipelines = [layouts.said(o) for o in found.options if o.plan.is_pipeline]
    assert at.selectbox(key="layouts.shown").options == list(dict.fromkeys(pipelines))


def _first_link(at):
    body = next(x.proto.body for x in at.get("html") if "Estimate it" in x.proto.body)
    return body.split("./?")[1].split('"')[0].replace("&amp;", "&")
