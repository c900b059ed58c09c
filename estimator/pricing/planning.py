"""From a budget to a plan: how large a model, on how many tokens, in how many steps.

The optimum is Chinchilla's: least predicted loss at a given compute. The fits disagree by more than a factor of two in
model size, so every answer carries all of them. They say what trains best for the money; a model that will serve many
requests is better trained smaller and longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from estimator.describe.catalogue import number, read_data
from estimator.describe.checks import ConfigError, choose, shown
from estimator.describe.run import Run
from estimator.describe.settings import checked
from estimator.describe.units import SECONDS_PER_HOUR
from estimator.hardware import accelerators as hardware
from estimator.pricing.money import Cost, cost

if TYPE_CHECKING:
    from pathlib import Path

# Training FLOPs per parameter and token: 2 forward (a multiply and an add), 4 backward (the gradients of the input and
# of the weight). Kaplan et al. 2020, section 2.1; the convention of the fits, which leave attention's T^2 term out.
FLOPS_PER_PARAMETER_AND_TOKEN = 6
LARGEST = 1e40  # parameters, tokens, FLOPs, dollars: beyond anyone's, and no power of it leaves the range of floats
DEFAULT_FIT = "besiroglu-2024"  # the one that agrees with the 70B model that Hoffmann et al. in fact trained


@dataclass(frozen=True, slots=True)
class Optimum:
    """The compute-optimal model of one fit.

    Attributes:
        fit: its name in `fits()`.
        parameters: N, all of them.
        tokens: D, with 6 N D = the budget.
        loss: predicted, in nats per token of the fit's data; not comparable between fits or with other data.
    """

    fit: str
    parameters: float
    tokens: float
    loss: float

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget in FLOPs, and what it means on the accelerator that it was given for.

    Attributes:
        flops: of training, in all.
        hours: wall-clock; None without an accelerator.
        cost: accelerator-hours, dollars and energy; None without an accelerator.
        mfu: model FLOPs utilization that turns hours into FLOPs; None without an accelerator.
        assumptions: what was not given, as sentences with sources.
    """

    flops: float
    hours: float | None = None
    cost: Cost | None = None
    mfu: float | None = None
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ComputeOptimal:
    """The answer to `compute_optimal`.

    Attributes:
        budget: what there is to spend.
        best: the optimum by the fit that was asked for.
        by_fit: the optimum by each fit, `best` among them.
    """

    budget: Budget
    best: Optimum
    by_fit: tuple[Optimum, ...]

    @property
    def parameters(self) -> float:
        """N by the fit that was asked for."""
        return self.best.parameters

    @property
    def tokens(self) -> float:
        """D by the fit that was asked for."""
        return self.best.tokens

    @property
    def loss(self) -> float:
        """Predicted loss by the fit that was asked for, nats per token."""
        return self.best.loss

    @property
    def parameters_range(self) -> tuple[float, float]:
        """Least and greatest N among the fits."""
        sizes = [optimum.parameters for optimum in self.by_fit]
        return min(sizes), max(sizes)

    @property
    def tokens_range(self) -> tuple[float, float]:
        """Least and greatest D among the fits."""
        tokens = [optimum.tokens for optimum in self.by_fit]
        return min(tokens), max(tokens)


def fits() -> tuple[str, ...]:
    """Names of the fits of the loss; their constants and sources stand in `data/planning.toml`."""
    return tuple(read_data("planning")["fit"])


def predicted_loss(parameters: float, tokens: float, fit: str = DEFAULT_FIT) -> float:
    """L(N, D) = E + A / N^alpha + B / D^beta, in nats per token (Hoffmann et al. 2022, eq. 2).

    Raises:
        ConfigError: a count that is not a number above 0, or an unknown fit.
    """
    c = read_data("planning")["fit"][choose("fit", fit, fits())]
    n, d = _amount("parameters", parameters), _amount("tokens", tokens)
    return float(c["E"] + c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"])


def tokens_for(parameters: float, fit: str = DEFAULT_FIT) -> float:
    """D for which a model of N parameters is the compute-optimal one.

    At the optimum a little more compute is worth as much in N as in D: alpha A / N^alpha = beta B / D^beta (the
    derivatives of the loss along ln N and ln D, with ln N + ln D fixed). Solved for D.

    Raises:
        ConfigError: as `predicted_loss`.
    """
    c = read_data("planning")["fit"][choose("fit", fit, fits())]
    n = _amount("parameters", parameters)
    return float((c["beta"] * c["B"] / (c["alpha"] * c["A"]) * n ** c["alpha"]) ** (1 / c["beta"]))


def budget(
    flops: float | None = None,
    dollars: float | None = None,
    hours: float | None = None,
    accelerator: str | Path | hardware.Accelerator | None = None,
    count: int = 1,
    *,
    mfu: float | None = None,
    dtype: str = "bf16",
    price: float | str | None = None,
) -> Budget:
    """A budget in FLOPs from one in FLOPs, dollars or hours.

    Args:
        flops: training FLOPs in all.
        dollars: to spend on accelerator-hours, at the median price.
        hours: wall-clock hours of `count` accelerators.
        accelerator: as for `hardware.accelerator`; needed for dollars and hours.
        count: accelerators.
        mfu: model FLOPs utilization, in (0, 1]; None takes the median of published runs, which were large ones: better
            give the one that `estimate` predicts.
        dtype: whose dense peak `mfu` is a part of.
        price: as for `cost.cost`.

    Raises:
        ConfigError: not exactly one of flops, dollars and hours; no accelerator, peak or price where one is needed; a
            number out of its range.
    """
    given = {"flops": flops, "dollars": dollars, "hours": hours}
    amounts = {name: _amount(name, value) for name, value in given.items() if value is not None}
    if len(amounts) != 1:
        raise ConfigError(f"budget = {', '.join(amounts) or None}: must be exactly one of flops, dollars and hours")
    count = checked(Run, "count", count)
    if accelerator is None:
        if flops is None:
            raise ConfigError(f"accelerator = None: must be given to turn {next(iter(amounts))} into FLOPs")
        return Budget(amounts["flops"])
    a = hardware.accelerator(accelerator)
    assumptions = []
    if mfu is None:
        runs = read_data("planning")["mfu"]
        mfu = median(run["value"] for run in runs)
        named = ", ".join(f"{run['run']} {run['value']:g}" for run in runs)
        assumptions.append(f"mfu = {mfu:g} (the median of published runs: {named})")
    else:
        mfu = number("mfu", mfu, most=1, above=True)
    flops_per_second = count * a.peak_flops(dtype) * mfu
    if "flops" in amounts:
        seconds = amounts["flops"] / flops_per_second
    elif "hours" in amounts:
        seconds = amounts["hours"] * SECONDS_PER_HOUR
    else:
        one_hour = cost(a, SECONDS_PER_HOUR, count, price=price)
        if one_hour.dollars is None:
            raise ConfigError(f"price = {shown(price)}: {one_hour.missing[0]}")
        if one_hour.dollars.median == 0:
            raise ConfigError(f"price = {shown(price)}: must be above 0 to turn dollars into hours")
        seconds = amounts["dollars"] / one_hour.dollars.median * SECONDS_PER_HOUR
    total = amounts.get("flops", seconds * flops_per_second)
    spent = cost(a, seconds, count, price=price)
    return Budget(total, seconds / SECONDS_PER_HOUR, spent, mfu, (*assumptions, *spent.assumptions))


def compute_optimal(
    flops: float | None = None,
    dollars: float | None = None,
    hours: float | None = None,
    accelerator: str | Path | hardware.Accelerator | None = None,
    count: int = 1,
    *,
    mfu: float | None = None,
    dtype: str = "bf16",
    price: float | str | None = None,
    fit: str = DEFAULT_FIT,
) -> ComputeOptimal:
    """Model size and tokens of least predicted loss for a budget, by `fit` and by every other.

    N = G (C/6)^(beta/(alpha+beta)) and D = C/6 / N, with G = (alpha A / (beta B))^(1/(alpha+beta)): Hoffmann et al.
    2022, equation 4.

    Args:
        flops: see `budget`.
        dollars: see `budget`.
        hours: see `budget`.
        accelerator: see `budget`.
        count: see `budget`.
        mfu: see `budget`.
        dtype: see `budget`.
        price: see `budget`.
        fit: one of `fits()`.

    Raises:
        ConfigError: as `budget`, or an unknown fit.
    """
    choose("fit", fit, fits())
    spend = budget(flops, dollars, hours, accelerator, count, mfu=mfu, dtype=dtype, price=price)
    by_fit = {name: _optimum(spend.flops, name) for name in fits()}
    return ComputeOptimal(spend, by_fit[fit], tuple(by_fit.values()))


def _optimum(flops: float, fit: str) -> Optimum:
    c = read_data("planning")["fit"][fit]
    both = c["alpha"] + c["beta"]
    product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
    g = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** (1 / both)
    n = g * product ** (c["beta"] / both)
    return Optimum(fit, n, product / n, predicted_loss(n, product / n, fit))


def _amount(field: str, value: float) -> float:
    return number(field, value, most=LARGEST, above=True)
