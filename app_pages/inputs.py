"""The sidebar: what is trained, how, on what, for how long. Every input is bound to the URL under its field's name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import streamlit as st

from app_pages import targets
from app_pages.labels import explained, label, plain
from app_pages.model_input import model_input
from estimator.accounting.accounts import DEVICES
from estimator.answers.request import Request
from estimator.describe.checks import ConfigError, choose
from estimator.describe.plan import FULLY_SHARDED, Plan
from estimator.describe.run import WIDE, Run
from estimator.describe.settings import gathered, limits, settings
from estimator.hardware.accelerators import accelerator, accelerators
from estimator.hardware.networks import network, networks
from estimator.show.formatting import prefixed
from estimator.timing.roofline import efficiency

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from estimator.describe.model import ModelConfig

FIRST = tuple(name for name, x in settings(Plan).items() if x.common)  # the rest is under "More"
HIDDEN = tuple(
    name for name, x in settings(Plan).items() if x.follows
)  # they follow from the count and the global batch

# What a predicted time rests on; and of those that are names, which there are.
REST = tuple(name for name in settings(Run) if name not in ("count", "global_batch_size", "steps", "mfu"))
OFFERED: dict[str, Callable[[str], tuple[str, ...]]] = {
    "network": lambda _: networks(),
    "attention_kernel": lambda gpu: tuple(efficiency(accelerator(gpu)).flash),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What the sidebar says. An input that cannot be is left out of `request`, and `problems` says which and why."""

    request: Request
    price: float | None
    unit: str
    problems: tuple[str, ...]


@cache
def supported() -> tuple[str, ...]:
    """Ids of the accelerators whose memory rules are modelled."""
    return tuple(id_ for id_ in accelerators() if accelerator(id_).device in DEVICES)


def drop_infinite() -> None:
    """Forget the link's infinite numbers, of which Streamlit would make integers, and start again without them."""
    infinite = [name for name, value in st.query_params.items() if _is_infinite(value)]
    for name in infinite:
        del st.query_params[name]
    if infinite:
        st.rerun()


def _is_infinite(text: str) -> bool:
    try:
        return math.isinf(float(text))
    except ValueError:
        return False


def sidebar() -> Setup:
    """Draw the sidebar and return what it says."""
    problems: list[str] = []

    def problem(error: ConfigError) -> None:
        st.error(plain(str(error)), icon=":material/error:")
        problems.append(str(error))

    with st.sidebar:
        st.subheader("Model")
        name, model = model_input(problem)
        st.subheader("Recipe")
        plan = _plan(model, problems)
        st.subheader("Machine and run")
        gpu, count = _machine()
        mfu, steps, sequences, price = _run(gpu, plan)
        targets.draw(plan.tokens(model), steps, sequences)
        rest = _rest(gpu, problems)
        unit = st.segmented_control(
            "Units of memory",
            ("GiB", "GB"),
            default="GiB",
            required=True,
            key="unit",
            bind="query-params",
            help="GiB is 2^30 bytes, GB is 10^9.",
        )
    unit = unit or "GiB"  # an empty parameter in the link clears the choice
    request = Request(name, model, plan, gpu, count, mfu, steps, sequences, **rest)
    return Setup(request, price, unit, tuple(problems))


def _plan(model: ModelConfig, problems: list[str]) -> Plan:
    """The recipe's inputs; a value that cannot be is named at its input and left at its default."""
    drawn: dict[str, Any] = {}
    slots: dict[str, Any] = {}

    def draw(names: tuple[str, ...]) -> None:
        columns = st.columns(2)
        for i, name in enumerate(names):
            slots[name] = columns[i % 2].container()
            with slots[name]:
                drawn[name] = _plan_input(name, model)

    draw(FIRST)
    with st.expander("More of the recipe"):
        draw(tuple(name for name in settings(Plan) if name not in FIRST + HIDDEN))

    def model_takes(plan: Plan) -> None:
        plan.tokens(model)

    in_order = {name: drawn[name] for name in settings(Plan) if name in drawn}
    plan, refused = gathered(Plan, in_order, accepts=model_takes)
    _refuse(refused, slots, problems)
    return plan


def _refuse(refused: Mapping[str, ConfigError], slots: Mapping[str, Any], problems: list[str]) -> None:
    """Say at each input that cannot be why it cannot."""
    for name, error in refused.items():
        slots[name].error(plain(str(error)), icon=":material/error:")
        problems.append(str(error))


def _plan_input(name: str, model: ModelConfig) -> Any:
    setting = settings(Plan)[name]
    common: dict[str, Any] = {"label": label(name), "key": name, "bind": "query-params", "help": setting.markdown}
    if setting.kind == "choice":
        names = tuple(setting.choices)
        if name == "precision" and st.session_state.get("sharding") in FULLY_SHARDED:
            names = ("bf16-fsdp", *(x for x in names if x != "bf16-fsdp"))
        return st.selectbox(**common, options=names, index=names.index(setting.default))
    if setting.kind == "flag":
        return st.toggle(**common, value=setting.default)
    if setting.kind == "text":
        return st.text_input(**common, value=setting.default)
    common |= {"value": setting.default, "placeholder": setting.optional or None}
    if setting.kind == "number":
        least = float(setting.least) + (1e-6 if setting.above else 0.0)
        most = float(setting.most) - (0.01 if setting.below else 0.0)
        return st.number_input(**common, min_value=least, max_value=most, step=0.05 if most <= 1 else 0.1)
    if name == "seq_len":
        common["placeholder"] = f"{model.context_length:,}"
    return st.number_input(**common, min_value=1, max_value=limits(Plan)[name])


def _rest(gpu: str, problems: list[str]) -> dict[str, Any]:
    """What a predicted time rests on, as far as it is said; what cannot be is named at its input and left out."""
    drawn: dict[str, Any] = {}
    slots: dict[str, Any] = {}
    with st.expander("What the time rests on"):
        for name in REST:
            slots[name] = st.container()
            with slots[name]:
                drawn[name] = _rest_input(name, gpu)

    def known(run: Run) -> None:
        if run.network is not None:
            network(run.network)
        if run.attention_kernel is not None:
            choose("attention_kernel", run.attention_kernel, OFFERED["attention_kernel"](gpu))

    run, refused = gathered(Run, drawn, accepts=known)
    _refuse(refused, slots, problems)
    return {name: getattr(run, name) for name in REST}


def _rest_input(name: str, gpu: str) -> Any:
    setting = settings(Run)[name]
    common: dict[str, Any] = {"label": label(name), "key": name, "bind": "query-params", "help": setting.markdown}
    if setting.kind == "flag":
        return st.toggle(**common, value=setting.default)
    if name == "wide":
        return tuple(sorted(st.multiselect(**common, options=WIDE, placeholder="nothing")))
    if name in OFFERED:
        options = OFFERED[name](gpu)
        return st.selectbox(**common, options=options, index=None, placeholder="by default", accept_new_options=True)
    if setting.kind == "text":
        return st.text_input(**common, value=None, placeholder="by default")
    most = float(setting.most) - (0.01 if setting.below else 0.0)
    common |= {"value": setting.default, "placeholder": "by default", "format": "%g"}
    return st.number_input(**common, min_value=float(setting.least), max_value=most)


def _machine() -> tuple[str, int]:
    names = supported()
    left, right = st.columns([2, 1])
    gpu = left.selectbox(
        "Accelerator",
        names,
        index=names.index("a100-80gb-sxm"),
        key="gpu",
        bind="query-params",
        help="Memory is what a framework sees of it, not what is on the label.",
    )
    count = right.number_input(
        label("count"),
        min_value=1,
        max_value=limits(Run)["count"],
        value=1,
        key="count",
        bind="query-params",
        help=explained("count"),
    )
    return gpu, count


def _run(gpu: str, plan: Plan) -> tuple[float | None, int, int, float | None]:
    left, right = st.columns(2)
    steps = left.number_input(
        label("steps"), 1, limits(Run)["steps"], 400_000, key="steps", bind="query-params", help=explained("steps")
    )
    sequences = right.number_input(
        label("global_batch_size"),
        1,
        limits(Run)["global_batch_size"],
        1024,
        key="global_batch_size",
        bind="query-params",
        help=explained("global_batch_size"),
    )
    peaks = accelerator(gpu).peak
    said = f" {gpu} does {prefixed(peaks[plan.precision], 'FLOP/s')}." if plan.precision in peaks else ""
    percent = left.number_input(
        "MFU, %",
        min_value=0.1,
        max_value=100.0,
        value=None,
        placeholder="predicted",
        step=5.0,
        format="%g",
        key="mfu",
        bind="query-params",
        help="Model FLOPs utilisation: the share of the accelerator's peak that does useful work. Empty predicts it "
        f"from the step's kernels; a number replaces the prediction.{said}",
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
    return percent / 100 if percent is not None else None, steps, sequences, price
