"""Every setting, from its declaration alone, through the command line, Python, JSON, the page and its link."""

from __future__ import annotations

import json
import random
import shlex

import pytest

import estimator as est
from estimator.answers.request import Request
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import drawn, gathered, settings
from estimator.show import cli


def others(setting):
    """Values that are not the default: every other choice, or one of the setting's kind."""
    if setting.choices:
        return [name for name in setting.choices if name != setting.default]
    if setting.kind == "flag":
        return [not setting.default]
    if setting.kind == "count":
        return [2]
    if setting.kind == "number":
        return [setting.least + 0.5]
    return [value for value in setting.draws if value != setting.default][:1]


# What a property that a declaration needs follows from.
BEHIND = {
    "is_pipeline": {"pipeline_parallel": 2},
    "shares_matrices": {"tensor_parallel": 2},
    "product_dtype": {"precision": "bf16"},
}


def needed(name, value):
    """What the declarations say that this value cannot go without, beside it."""
    fields = {name: value}
    for need in settings(Plan)[name].needs:
        fields |= BEHIND.get(need.other, {})
        other = settings(Plan).get(need.other)
        if other is not None and (value in need.values or not need.values) and other.default not in need.allowed:
            fields |= needed(other.name, next(iter(need.allowed)))
    return fields


def with_what_it_needs(name, value):
    """A plan that has this value."""
    fields = needed(name, value)
    if name == "optimizer_impl":
        fields["optimizer"] = next(o for o, own in est.describe.plan.OPTIMIZERS.items() if value in own)
    return Plan(**fields)


EACH = [(name, value) for name, setting in settings(Plan).items() for value in others(setting)]
PLANS = [pytest.param(name, value, id=f"{name}={value}") for name, value in EACH]


def parsed(words):
    """The model and the plan of a command."""
    assert words[0] == "estimate"
    return cli._described(cli.parser().parse_args(words[1:]))


@pytest.mark.parametrize(("name", "value"), PLANS)
def test_command_line_python_and_json_say_the_same_plan(name, value):
    plan = with_what_it_needs(name, value)
    assert getattr(plan, name) == value
    asked = Request("gpt2", est.preset("gpt2"), plan, "a100-80gb-sxm")
    assert parsed(shlex.split(asked.command()))[1] == plan
    line = next(line for line in asked.python().splitlines() if line.startswith("plan = "))
    assert eval(line.removeprefix("plan = "), {"est": est}) == plan  # noqa: S307 - our own line
    assert Plan(**json.loads(json.dumps(plan.to_dict()))) == plan


def sidebar_alone():
    """The sidebar, and nothing that it asks for."""
    import streamlit as st

    from app_pages.inputs import sidebar

    st.session_state["asked"] = sidebar()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, v in EACH if not settings(Plan)[n].follows])
def test_a_link_reaches_the_page_and_comes_back_as_its_command(name, value):
    testing = pytest.importorskip("streamlit.testing.v1", reason="the page needs the app extra")
    plan = with_what_it_needs(name, value)
    page = testing.AppTest.from_function(sidebar_alone, default_timeout=60)
    page.query_params["model"] = "gpt2"
    for field, setting in settings(Plan).items():
        if getattr(plan, field) != setting.default:
            page.query_params[field] = (
                str(getattr(plan, field)).lower() if setting.kind == "flag" else str(getattr(plan, field))
            )
    page.run()
    assert [error.value for error in page.error] == []
    asked = page.session_state["asked"].request
    assert asked.plan == plan
    assert parsed(shlex.split(asked.command()))[1] == plan


RUNS = {
    name: {"network": "dgx-h100", "attention_kernel": "flash-2", "torch_version": "2.1", "wide": ("norm",)}.get(name)
    or others(setting)[0]
    for name, setting in settings(Run).items()
} | {"overlap": False, "padding": 0.25}


@pytest.mark.parametrize(("name", "value"), RUNS.items())
def test_an_argument_of_a_run_is_an_option_of_the_command(name, value):
    flag = f"--{name.replace('_', '-')}"
    words = [f"--no-{flag[2:]}"] if value is False else [flag, *(value if isinstance(value, tuple) else [str(value)])]
    args = cli.parser().parse_args(["gpt2", *words])
    given = {name: getattr(args, name) for name in settings(Run) if getattr(args, name) is not None}
    assert getattr(Run(**given), name) == value


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, v in RUNS.items() if n != "mfu"])  # a link has per cent
def test_what_the_time_rests_on_reaches_the_page_and_comes_back_as_its_command(name, value):
    testing = pytest.importorskip("streamlit.testing.v1", reason="the page needs the app extra")
    page = testing.AppTest.from_function(sidebar_alone, default_timeout=60)
    said = value[0] if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    page.query_params |= {"model": "gpt2", name: said}
    page.run()
    assert [error.value for error in page.error] == []
    asked = page.session_state["asked"].request
    assert getattr(asked, name) == value
    assert asked.run[name] == value
    args = cli.parser().parse_args(shlex.split(asked.command())[1:])
    assert getattr(Run(**{name: getattr(args, name)}), name) == value
    assert f"{name}={value!r}" in asked.python()


def test_each_size_of_a_model_is_an_option_of_the_command():
    m = est.preset("llama-3.2-1b")
    for name, setting in settings(ModelConfig).items():
        if setting.kind in ("text", "part") or getattr(m, name) is None:
            continue
        value = not getattr(m, name) if setting.kind == "flag" else getattr(m, name) * 2
        try:
            wanted = m.replace(**{name: value})
        except ConfigError:  # sizes that go together only
            continue
        asked = Request("llama-3.2-1b", wanted, Plan(), "a100-80gb-sxm")
        assert parsed(shlex.split(asked.command()))[0] == wanted


def test_random_plans_have_every_setting_and_every_choice():
    found = [drawn(Plan, random.Random(turn)) for turn in range(400)]
    for name, setting in settings(Plan).items():
        wanted = set(setting.draws or setting.choices or ((True, False) if setting.kind == "flag" else (1, 2, 3)))
        if any(need.other in BEHIND for need in setting.needs):  # of several accelerators, which tests draw themselves
            wanted = {setting.default}
        assert {getattr(plan, name) for plan in found} >= wanted, name


def test_values_that_do_not_go_together_are_each_named_with_the_reason():
    plan, refused = gathered(Plan, {"precision": "bf16-fsdp", "optimizer": "lion", "optimizer_impl": "fused"})
    assert plan == Plan(optimizer="lion")
    assert list(refused) == ["precision", "optimizer_impl"]
    assert "policy of fully_shard" in str(refused["precision"])
    plan, refused = gathered(Plan, {"precision": "bf16-fsdp", "sharding": "fsdp"})  # which goes only with the later
    assert plan == Plan(precision="bf16-fsdp", sharding="zero3")
    assert refused == {}
