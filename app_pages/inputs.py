"""The sidebar: what is trained, how, on what, for how long. Every input is bound to the URL under its field's name."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import streamlit as st

import estimator as est
from estimator import config
from estimator.accounts import DEVICES
from estimator.config import ConfigError, ModelConfig, Plan
from estimator.formatting import prefixed, size

CHOICES = {
    "precision": config.PRECISIONS,
    "attention": config.ATTENTIONS,
    "loss": config.LOSSES,
    "checkpointing": config.CHECKPOINTINGS,
    "optimizer": config.OPTIMIZERS,
    "optimizer_impl": config.OPTIMIZER_IMPLS,
}
LABELS = {
    "num_layers": "Layers",
    "d_model": "d_model",
    "num_heads": "Heads",
    "num_kv_heads": "Key/value heads",
    "head_dim": "Head width",
    "d_ff": "d_ff",
    "vocab_size": "Vocabulary",
    "context_length": "Context length",
    "tie_embeddings": "Head shares the embedding",
    "qkv_bias": "Biases on q, k, v",
    "batch_size": "Micro-batch",
    "seq_len": "Sequence",
    "grad_accumulation": "Accumulation",
    "max_grad_norm": "Clip to norm",
    "optimizer_impl": "Implementation",
    "checkpointing": "Checkpointing",
}
# What the widgets take at most: beyond any model, and few enough events to draw the step.
LIMITS = {"num_layers": 2000, "num_heads": 10_000, "num_kv_heads": 10_000, "head_dim": 100_000}
LIMIT = 10_000_000
FIRST = ("batch_size", "seq_len", "precision", "attention", "checkpointing", "optimizer")  # the rest is under "More"


@dataclass(frozen=True, slots=True)
class Setup:
    """What the sidebar says. An input that cannot be is left out of it, and `problems` says which and why."""

    name: str
    model: ModelConfig
    plan: Plan
    gpu: str
    count: int
    mfu: float | None
    steps: int
    global_batch_size: int
    price: float | None
    unit: str
    problems: tuple[str, ...]


@cache
def explained(cls: type) -> dict[str, str]:
    """What each field of a dataclass is, from the Attributes of its docstring."""
    text = re.split(r"\n\s*Raises:", re.split(r"Attributes:\n", cls.__doc__ or "")[-1])[0]
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*(?:\n {9,}.*)*)", text, flags=re.MULTILINE)
    return {name.strip(): " ".join(said.split()) for names, said in entries for name in names.split(",")}


def label(name: str) -> str:
    """What an input is called on the page."""
    return LABELS.get(name, name.replace("_", " ").capitalize())


@cache
def supported() -> dict[str, str]:
    """Id -> what to call it, of the accelerators whose memory rules are modelled."""
    found = (est.accelerator(id_) for id_ in est.accelerators())
    return {a.id: f"{a.name} · {size(a.memory_bytes)}" for a in found if a.device in DEVICES}


def sidebar() -> Setup:
    """Draw the sidebar and return what it says."""
    with st.sidebar:
        problems: list[str] = []
        st.subheader("Model")
        name, model = _model(problems)
        st.subheader("Recipe")
        plan = _plan(model, problems)
        st.subheader("Machine and run")
        gpu, count = _machine()
        run = _run(gpu, plan)
    return Setup(name, model, plan, gpu, count, *run, tuple(problems))


def _problem(problems: list[str], error: ConfigError) -> None:
    st.error(str(error), icon=":material/error:")
    problems.append(str(error))


def _model(problems: list[str]) -> tuple[str, ModelConfig]:
    names = est.presets()
    name = st.selectbox(
        "Model",
        names,
        index=names.index("gpt2-xl"),
        key="model",
        bind="query-params",
        label_visibility="collapsed",
        help="A published model; each of its sizes can be changed below.",
    )
    published = est.preset(name)
    with st.expander("Sizes"):
        changes = _sizes(name, published)
    try:
        return name, published.replace(**changes)
    except ConfigError as error:
        _problem(problems, error)
        return name, published


def _sizes(name: str, published: ModelConfig) -> dict[str, Any]:
    """Inputs for each size; those that differ from the preset's."""
    columns = st.columns(2)
    gpt2 = published.family == "gpt2"
    changes: dict[str, Any] = {}
    sizes = ["num_layers", "d_model", "num_heads", "vocab_size", "context_length", "d_ff"]
    sizes += [] if gpt2 else ["num_kv_heads", "head_dim"]
    for i, field in enumerate(sizes):
        own = getattr(published, field)
        derived = field in (
            "d_ff",
            "num_kv_heads",
            "head_dim",
        )  # empty: as published, or following what it follows from
        value = columns[i % 2].number_input(
            label(field),
            min_value=1,
            max_value=LIMITS.get(field, LIMIT),
            value=None if derived else own,
            placeholder=f"{own:,}",
            key=f"{name}.{field}",
            bind="query-params",
            help=explained(ModelConfig)[field],
        )
        if value is not None and value != own:
            changes[field] = value
    for field in ["tie_embeddings"] + ([] if gpt2 else ["qkv_bias"]):
        own = getattr(published, field)
        value = st.toggle(
            label(field), own, key=f"{name}.{field}", bind="query-params", help=explained(ModelConfig)[field]
        )
        if value != own:
            changes[field] = value
    return changes


def _plan(model: ModelConfig, problems: list[str]) -> Plan:
    names = [f.name for f in fields(Plan)]
    plan = Plan()
    columns = st.columns(2)
    for i, name in enumerate(FIRST):
        with columns[i % 2]:
            plan = _plan_field(name, plan, model, problems)
    with st.expander("More of the recipe"):
        columns = st.columns(2)
        for i, name in enumerate(name for name in names if name not in FIRST):
            with columns[i % 2]:
                plan = _plan_field(name, plan, model, problems)
    return plan


def _plan_field(name: str, plan: Plan, model: ModelConfig, problems: list[str]) -> Plan:
    """`plan` with what the input for `name` says, or with its default if that cannot be."""
    default = getattr(Plan(), name)
    common = {"label": label(name), "key": name, "bind": "query-params", "help": explained(Plan)[name]}
    if name in CHOICES:
        value = st.selectbox(**common, options=CHOICES[name], index=CHOICES[name].index(default))
    elif isinstance(default, bool):
        value = st.toggle(**common, value=default)
    elif name == "max_grad_norm":
        value = st.number_input(**common, min_value=0.0, value=None, placeholder="no clipping", step=0.1)
    else:
        placeholder = f"{model.context_length:,}" if name == "seq_len" else None
        value = st.number_input(**common, min_value=1, max_value=LIMIT, value=default, placeholder=placeholder)
    try:
        wanted = plan.replace(**{name: value})
        wanted.tokens(model)
    except ConfigError as error:
        _problem(problems, error)
        return plan
    return wanted


def _machine() -> tuple[str, int]:
    names = tuple(supported())
    left, right = st.columns([2, 1])
    gpu = left.selectbox(
        "Accelerator",
        names,
        index=names.index("a100-80gb-sxm"),
        format_func=lambda id_: supported()[id_],
        key="gpu",
        bind="query-params",
        help="Memory is what a framework sees, not what is on the label.",
    )
    count = right.number_input(
        "Count",
        min_value=1,
        max_value=LIMIT,
        value=1,
        key="count",
        bind="query-params",
        help="Accelerators that share the global batch, each with a whole copy of the model.",
    )
    return gpu, count


def _run(gpu: str, plan: Plan) -> tuple[float | None, int, int, float | None, str]:
    left, right = st.columns(2)
    steps = left.number_input(
        "Steps", 1, 10**9, 400_000, key="steps", bind="query-params", help="Optimizer steps of the whole run."
    )
    sequences = right.number_input(
        "Global batch",
        1,
        10**9,
        1024,
        key="global_batch_size",
        bind="query-params",
        help="Sequences in one optimizer step of the whole job.",
    )
    peaks = est.accelerator(gpu).peak
    said = f" {gpu} does {prefixed(peaks[plan.precision], 'FLOP/s')}." if plan.precision in peaks else ""
    mfu = left.number_input(
        "MFU, %",
        min_value=0.1,
        max_value=100.0,
        value=50.0,
        step=5.0,
        format="%g",
        key="mfu",
        bind="query-params",
        help=f"Model FLOPs utilisation: the share of the accelerator's peak that does useful work.{said}",
    )
    price = right.number_input(
        "$ per hour",
        min_value=0.0,
        max_value=1e6,
        value=None,
        placeholder="list price",
        key="price",
        bind="query-params",
        help="US dollars for one accelerator for one hour; empty takes the providers' list prices on file.",
    )
    unit = st.segmented_control(
        "Units of memory",
        ("GiB", "GB"),
        default="GiB",
        required=True,
        key="unit",
        bind="query-params",
        help="GiB is 2^30 bytes, GB is 10^9.",
    )
    return mfu / 100 if mfu is not None else None, steps, sequences, price, unit
