"""From money, a deadline, tokens or a size to the others: every accelerator and count on which the run fits.

Of a run four things can be given: dollars, days, tokens and the model (or its parameters). What is not given follows:
tokens from parameters and parameters from tokens by their ratio, or, where money or time is the limit, as many as it
buys. Each option is an `estimator.estimate` of a whole configuration, and has its price from one provider's list.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import account
from estimator.accounting.collector import collected_later
from estimator.answers.estimates import Estimate, estimate, max_batch_size
from estimator.answers.request import Request
from estimator.describe.catalogue import number, read_data
from estimator.describe.checks import ConfigError, choose, shown
from estimator.describe.hf import from_hf
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.presets import preset
from estimator.describe.run import Run
from estimator.describe.settings import checked
from estimator.describe.units import SECONDS_PER_DAY, SECONDS_PER_HOUR
from estimator.hardware.accelerators import accelerator, accelerators
from estimator.pricing.money import KINDS, Price, cost, prices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd

# What people run: autocast to bf16, fused attention and optimizer, clipped gradients.
RECIPE = Plan(precision="bf16-mixed", attention="sdpa", loss="torch", optimizer_impl="fused", max_grad_norm=1.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SORTS = ("cost", "time", "size")
LARGEST = 1e15  # dollars, tokens, days, parameters: beyond anyone's
LEAST_PARAMETERS = 1e6  # a smaller model is all embedding
SOLVED = 0.03  # of a size: shapes of whole blocks and heads are no finer
TURNS = 6  # at most, to find it


@dataclass(frozen=True, slots=True)
class Option:
    """One way to do the run.

    Attributes:
        name: the preset, or "llama-shaped" for a model that was given, or found, by its parameters.
        model, plan: what is trained, and how.
        accelerator, count: on what.
        parameters: N.
        tokens: training tokens.
        steps, global_batch_size: optimizer steps, and sequences in each.
        hours, low, high: wall-clock, and between what nine runs of ten lie.
        dollars: of the whole run at `price`; None where no price is on file.
        price: the offer that is cheapest for this count.
        paid: accelerators that are paid: whole instances of the offer.
        kilowatt_hours, co2_kg: None where the power is not published.
        mfu: model FLOPs utilisation.
        needed: bytes on one accelerator.
        best: no other option is better in both of `Plans.trade`.
    """

    name: str
    model: ModelConfig
    plan: Plan
    accelerator: str
    count: int
    parameters: int
    tokens: float
    steps: int
    global_batch_size: int
    hours: float
    low: float
    high: float
    dollars: float | None
    price: Price | None
    paid: int
    kilowatt_hours: float | None
    co2_kg: float | None
    mfu: float
    needed: int
    best: bool = False

    @property
    def days(self) -> float:
        """`hours` in days."""
        return self.hours / 24

    @property
    def request(self) -> Request:
        """The same as a question to `estimator.estimate`."""
        plan = self.plan.replace(data_parallel=1)  # which the request's count says
        batch = self.global_batch_size
        return Request(self.name, self.model, plan, self.accelerator, self.count, None, self.steps, batch)

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        plain = asdict(self)
        return plain | {"model": self.model.to_dict(), "plan": self.plan.to_dict(), "days": self.days}


@dataclass(frozen=True, slots=True)
class Plans:
    """The options of a run, sorted; and what was left out and why.

    Attributes:
        options: best first.
        sort: what is best: "cost", "time" or "size".
        trade: the two that options trade for each other: hours for dollars where all do the same; hours, or dollars
            where only time is limited, for size where it is looked for.
        refused: how many pairs of accelerator and count were left out, by reason.
        assumptions: what was not given, as sentences with sources.
    """

    options: tuple[Option, ...]
    sort: str
    trade: tuple[str, str]
    refused: Mapping[str, int]
    assumptions: tuple[str, ...]

    @property
    def front(self) -> tuple[Option, ...]:
        """The Pareto front of what is traded, cheapest first; where money is the limit, fastest first."""
        first = COSTS["hours" if self.trade == ("hours", "size") else "dollars"]
        return tuple(sorted((o for o in self.options if o.best), key=first))

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        return asdict(self) | {"options": [option.to_dict() for option in self.options]}

    def to_frame(self) -> pd.DataFrame:
        """One row an option."""
        import pandas as pd  # noqa: PLC0415 - half a second that only this needs

        rows = [
            {
                "accelerator": o.accelerator,
                "count": o.count,
                "parameters": o.parameters,
                "tokens": o.tokens,
                "days": o.days,
                "hours": o.hours,
                "dollars": o.dollars,
                "usd_per_hour": o.price.usd_per_hour if o.price else None,
                "provider": o.price.provider if o.price else None,
                "date": o.price.date if o.price else None,
                "kilowatt_hours": o.kilowatt_hours,
                "co2_kg": o.co2_kg,
                "mfu": o.mfu,
                "sharding": o.plan.sharding,
                "checkpointing": o.plan.checkpointing,
                "batch_size": o.plan.batch_size,
                "needed": o.needed,
                "best": o.best,
            }
            for o in self.options
        ]
        return pd.DataFrame(rows)


@collected_later()
def plan(
    model: ModelConfig | str | Path | None = None,
    recipe: Plan | None = None,
    *,
    dollars: float | None = None,
    days: float | None = None,
    hours: float | None = None,
    tokens: float | None = None,
    parameters: float | None = None,
    tokens_per_parameter: float | None = None,
    accelerators: Sequence[str] | None = None,
    counts: Sequence[int] = COUNTS,
    batch_tokens: float | None = None,
    price: str = "on-demand",
    sort: str | None = None,
    progress: Callable[[float], object] = lambda _: None,
) -> Plans:
    """Every accelerator and count on which a run fits, with its hours, dollars, energy and CO2.

    Args:
        model: a configuration, the name of a preset or the path of a config.json.
        recipe: how a step is run; its batch_size, accumulation, sharding and data_parallel follow, and its
            checkpointing where it says none. By default bf16 autocast, fused attention and AdamW, gradients clipped.
        dollars: at most.
        days: at most.
        hours: at most, in place of days.
        tokens: to train on.
        parameters: of a model in Llama's shape, in place of `model`.
        tokens_per_parameter: what tokens and parameters follow from each other by; by default 20 (Hoffmann et al.
            2022), or with a model and a limit of dollars or time, as many tokens as the limit buys.
        accelerators: to choose from; by default all of the catalogue that have a price of that kind.
        counts: how many of them may be taken.
        batch_tokens: in one optimizer step; by default GPT-3's for a model of that size.
        price: kind of price (`estimator.pricing.money.KINDS`).
        sort: "cost" or "time" (the default with tokens and a model), or "size", the most parameters and tokens first
            (the default where they are what is looked for).
        progress: told how much is done, of 1; it may raise to give up.

    Raises:
        ConfigError: nothing to go by, a number out of its range, an unknown name, a model and parameters.
    """
    asked = _Asked.of(model, dollars, days, hours, tokens, parameters, tokens_per_parameter)
    choose("kind of price", price, KINDS)
    choose("sort", sort or "cost", SORTS)
    cards = [accelerator(name) for name in (accelerators if accelerators is not None else _priced(price))]
    wanted = sorted({checked(Run, "count", count) for count in counts})
    batch = None if batch_tokens is None else _amount("batch_tokens", batch_tokens)
    found: list[Option] = []
    refused: Counter[str] = Counter()
    for i, card in enumerate(cards):
        guess = None
        for count in wanted:
            progress((i + wanted.index(count) / len(wanted)) / len(cards))
            try:
                option = _solved(asked, recipe or RECIPE, card.id, count, batch, price, guess)
            except _RefusedError as why:
                refused[str(why)] += 1
                continue
            except ConfigError as why:  # no peak for the dtype, no whole nodes, no flash attention, ...
                refused[f"{card.id}: {why}"] += 1
                continue
            guess = option.parameters
            found.append(option)
    order = sort or ("size" if asked.searches else "cost")
    front = _front(found, asked.trade)
    options = [replace(o, best=id(o) in front) for o in found]
    options.sort(key=_ORDERS[order])
    return Plans(tuple(options), order, asked.trade, dict(refused), asked.assumptions(batch))


budget = plan  # the same question under the name of what most people begin with


class _RefusedError(Exception):
    """An accelerator and count that cannot do the run."""


# What there should be little of.
COSTS: dict[str, Callable[[Option], float]] = {
    "hours": lambda o: o.hours,
    "dollars": lambda o: math.inf if o.dollars is None else o.dollars,
    # Sizes that differ by less than they are solved for are the same.
    "size": lambda o: -round(math.log(o.parameters * o.tokens) / (2 * SOLVED)),
}
_ORDERS: dict[str, Callable[[Option], Any]] = {
    "cost": lambda o: (COSTS["dollars"](o), o.hours),
    "time": lambda o: (o.hours, COSTS["dollars"](o)),
    "size": lambda o: (COSTS["size"](o), COSTS["dollars"](o), o.hours),
}


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was given, checked. `ratio` is tokens a parameter; None where a limit decides on the tokens of a model."""

    name: str
    model: ModelConfig | None
    dollars: float | None
    seconds: float | None
    tokens: float | None
    ratio: float | None

    @classmethod
    def of(
        cls,
        model: ModelConfig | str | Path | None,
        dollars: float | None,
        days: float | None,
        hours: float | None,
        tokens: float | None,
        parameters: float | None,
        ratio: float | None,
    ) -> _Asked:
        if days is not None and hours is not None:
            raise ConfigError(f"days = {shown(days)}: hours = {shown(hours)} is given too; allowed is one of them")
        if model is not None and parameters is not None:
            raise ConfigError(f"parameters = {shown(parameters)}: a model is given too; allowed is one of them")
        if tokens is not None and ratio is not None and (model is not None or parameters is not None):
            raise ConfigError(
                f"tokens_per_parameter = {shown(ratio)}: tokens and a model are given too; allowed are two of the three"
            )
        given = {"dollars": dollars, "days": days, "hours": hours, "tokens": tokens}
        amounts = {name: _amount(name, x) for name, x in given.items() if x is not None}
        if not amounts and model is None and parameters is None:
            raise ConfigError(
                "plan: nothing is given; must be at least one of dollars, days, tokens, model, parameters"
            )
        seconds = amounts.get("days", 0) * SECONDS_PER_DAY + amounts.get("hours", 0) * SECONDS_PER_HOUR or None
        limited = dollars is not None or seconds is not None
        m, name = None, "llama-shaped"
        if parameters is not None:
            m = shaped(_amount("parameters", parameters, least=LEAST_PARAMETERS))
        elif isinstance(model, ModelConfig):
            m, name = model, model.family
        elif isinstance(model, str) and not model.endswith(".json"):
            m, name = preset(model), model
        elif model is not None:
            m = from_hf(model)
            name = m.family
        if ratio is not None:
            ratio = _amount("tokens_per_parameter", ratio)
        elif m is None or (tokens is None and not limited):
            ratio = float(read_data("planning")["rule"]["tokens_per_parameter"])
        if m is None and tokens is not None and ratio is not None:
            m = shaped(max(amounts["tokens"] / ratio, LEAST_PARAMETERS))
        return cls(name, m, dollars, seconds, amounts.get("tokens"), ratio)

    @property
    def searches(self) -> bool:
        """Whether the size or the tokens are what is looked for."""
        return self.model is None or (self.tokens is None and self.ratio is None)

    @property
    def trade(self) -> tuple[str, str]:
        """What an option can be better in; where the size is looked for, the limit itself is spent by all."""
        if not self.searches:
            return "hours", "dollars"
        return ("hours" if self.dollars is not None else "dollars"), "size"

    def wanted(self, parameters: int) -> float | None:
        """The tokens of a model of N parameters; None for as many as the limits buy."""
        if self.tokens is not None:
            return self.tokens
        return None if self.ratio is None else self.ratio * parameters

    def bought(self, seconds: float, dollars: float | None) -> float:
        """Tokens within the limits, at so many seconds and dollars a token."""
        by_time = math.inf if self.seconds is None else self.seconds / seconds
        by_money = math.inf
        if self.dollars is not None and dollars is not None:
            by_money = self.dollars / dollars
        return min(by_time, by_money)

    def assumptions(self, batch: float | None) -> tuple[str, ...]:
        data = read_data("planning")
        found = []
        if self.ratio == data["rule"]["tokens_per_parameter"]:
            found.append(f"{self.ratio:g} tokens a parameter ({data['rule']['source']})")
        if self.name == "llama-shaped":
            found.append(f"a model in Llama's shape ({data['shape']['source']})")
        if batch is None:
            found.append(f"tokens in a step as in GPT-3 of that size ({data['batch'][0]['source']})")
        return tuple(found)


@cache
def shaped(parameters: float) -> ModelConfig:
    """A model in Llama's shape of about that many parameters, as near as whole blocks and heads come.

    With a width of w for each of L blocks a block has 12 (w L)^2 parameters, so that N is about 12 w^2 L^3.
    """
    shape = read_data("planning")["shape"]
    w, head, v = shape["width_per_block"], shape["head_width"], shape["vocab_size"]

    def made(blocks: int, heads: int) -> ModelConfig:
        d = heads * head
        return ModelConfig(
            shape["family"], blocks, d, heads, v, shape["context_length"], d_ff=max(256, round(8 * d / 3 / 256) * 256)
        )

    blocks = max(1, round((parameters / (12 * w * w)) ** (1 / 3)))
    near = [made(n, heads) for n in {blocks, max(1, blocks - 1), blocks + 1} for heads in range(max(1, n - 6), n + 4)]
    return min(near, key=lambda m: (abs(math.log(count_parameters(m) / parameters)), m.num_layers))


def count_parameters(m: ModelConfig) -> int:
    """N of a model in Llama's shape: q, k, v, out; gate, up, down; two norms a block; embedding, head, last norm."""
    block = 4 * m.d_model * m.width_of_heads + 3 * m.d_model * m.f + 2 * m.d_model
    return m.num_layers * block + 2 * m.vocab_size * m.d_model + m.d_model


def _priced(kind: str) -> tuple[str, ...]:
    """Accelerators whose memory is modelled and that have a verified price of that kind."""
    able = (a for a in accelerators() if accelerator(a).device == "cuda")
    return tuple(a for a in able if any(p.verified for p in prices(a, kind)))


def _solved(
    asked: _Asked, recipe: Plan, gpu: str, count: int, batch: float | None, kind: str, guess: int | None
) -> Option:
    """The option on `count` of `gpu`; where the size is looked for, the largest within the limits.

    Cost grows with N times tokens, so with N^2 at a fixed ratio, which is how the next guess is made from what the last
    one could have bought.
    """
    if asked.model is not None:
        return _option(asked, asked.model, recipe, gpu, count, batch, kind)
    size, best = float(guess or 1e9), None
    low, high = LEAST_PARAMETERS, LARGEST
    for _ in range(TURNS):
        m = shaped(size)
        try:
            option = _option(asked, m, recipe, gpu, count, batch, kind, limits=False)
        except _RefusedError:  # it does not fit: smaller
            high = min(high, size)
            size = max(low, size / 2) if best is None else math.sqrt(low * high)
            continue
        could = asked.bought(option.hours * SECONDS_PER_HOUR / option.tokens, _per_token(option))
        ratio = could / option.tokens
        if ratio >= 1:
            low, best = max(low, size), option if best is None or option.parameters > best.parameters else best
            if ratio < 1 + SOLVED:
                break
        else:
            high = min(high, size)
        if high / low < 1 + SOLVED / 2:
            break
        size = min(max(size * ratio**0.5 * (1 - SOLVED / 4), low * (1 + SOLVED / 4)), high / (1 + SOLVED / 4))
    if best is None:
        raise _RefusedError("no model fits within the limits")
    return best


def _per_token(option: Option) -> float | None:
    return None if option.dollars is None else option.dollars / option.tokens


def _option(
    asked: _Asked,
    m: ModelConfig,
    recipe: Plan,
    gpu: str,
    count: int,
    batch: float | None,
    kind: str,
    *,
    limits: bool = True,
) -> Option:
    length = recipe.tokens(m)
    n = _parameters(m, recipe)
    if batch is None:  # a power of 2, as batches are
        sequences = 2 ** max(0, round(math.log2(_batch_tokens(n) / length)))
    else:
        sequences = max(1, round(batch / length / count)) * count  # the same for each accelerator
    if sequences < count or (batch is not None and batch < length * count):
        raise _RefusedError("a step has fewer sequences than accelerators")
    r = fastest(m, recipe, gpu, count, sequences)
    if r is None:
        raise _RefusedError("does not fit")
    if r.time is None:
        raise _RefusedError(f"{gpu}: {r.notes[-1]}")
    per_token = r.time.seconds_per_step / (sequences * length)
    offer, paid = _offer(gpu, count, kind)
    if asked.dollars is not None and offer is None:
        raise _RefusedError(f"{gpu}: no {kind} price is on file")
    dollars = None if offer is None else per_token / SECONDS_PER_HOUR * paid * offer.usd_per_hour
    tokens = asked.wanted(n)
    could = asked.bought(per_token, dollars)
    if tokens is None:
        tokens = could
    elif limits and could < tokens:
        raise _RefusedError("is too slow or too dear")
    steps = max(1, math.ceil(tokens / (sequences * length) - 1e-9))
    if tokens == could:  # whole steps, within the limits
        steps = max(1, math.floor(tokens / (sequences * length)))
    tokens = steps * sequences * length
    seconds = tokens * per_token
    spent = cost(gpu, seconds, paid)
    low, high = r.time.spread or (1, 1)
    name = asked.name
    return Option(
        name, m, r.plan.replace(grad_accumulation=1), gpu, count, n, tokens, steps, sequences,
        seconds / SECONDS_PER_HOUR, low * seconds / SECONDS_PER_HOUR, high * seconds / SECONDS_PER_HOUR,
        None if dollars is None else dollars * tokens, offer, paid,
        spent.kilowatt_hours, spent.co2_kg, r.time.mfu, r.memory.needed,
    )  # fmt: skip


def fastest(m: ModelConfig, recipe: Plan, gpu: str, count: int, sequences: int) -> Estimate | None:
    """The fastest way to run a step of `sequences` on `count` of `gpu` that fits; None if none does.

    Tried are DDP and the full sharding, without checkpointing and with, each with the largest micro-batch that divides
    an accelerator's share. This is the one place where a search over layouts takes over.
    """
    best: Estimate | None = None
    share = sequences // count
    for way in _ways(recipe, count):
        most = max_batch_size(m, way, gpu, global_batch_size=sequences)
        if not most:
            continue
        batch = max(x for x in range(1, min(most, share) + 1) if share % x == 0)
        r = estimate(m, way.replace(batch_size=batch), gpu, global_batch_size=sequences)
        if r.time is None:
            return r
        if best is None or best.time is None or r.time.seconds_per_step < best.time.seconds_per_step:
            best = r
        if way.checkpointing == recipe.checkpointing and batch * recipe.tokens(m) >= ENOUGH:
            break
    return best


ENOUGH = 4096  # tokens in a micro-batch without recomputation: more of them with it would not be faster


def _ways(recipe: Plan, count: int) -> Iterator[Plan]:
    kinds = (recipe.checkpointing,) if recipe.checkpointing != "none" else ("none", "selective", "block")
    shardings = ("none", "zero3") if count > 1 else ("none",)
    for sharding in shardings:
        for kind in kinds:
            yield recipe.replace(
                batch_size=1, grad_accumulation=1, data_parallel=count, sharding=sharding, checkpointing=kind
            )


def _offer(gpu: str, count: int, kind: str) -> tuple[Price | None, int]:
    """The verified offer that is cheapest for `count`, and how many accelerators are paid: offers are whole."""
    offers = [(p, -(-count // p.count) * p.count) for p in prices(gpu, kind) if p.verified]
    if not offers:
        return None, count
    return min(offers, key=lambda offer: offer[0].usd_per_hour * offer[1])


@cache
def _parameters(m: ModelConfig, recipe: Plan) -> int:
    return account(m, recipe.replace(batch_size=1)).evaluate(m, recipe.replace(batch_size=1)).parameters


def _batch_tokens(parameters: float) -> float:
    """Tokens in a step of the GPT-3 model that is nearest below, or the smallest one's."""
    table = read_data("planning")["batch"]
    below = [row["tokens"] for row in table if row["parameters"] <= parameters]
    return float(max(below, default=table[0]["tokens"]))


def _front(options: Sequence[Option], trade: tuple[str, str]) -> set[int]:
    """Identities of the options of which no other is at least as good in both of `trade`, and better in one."""
    costs = {id(o): (COSTS[trade[0]](o), COSTS[trade[1]](o)) for o in options}
    priced = {key: pair for key, pair in costs.items() if math.inf not in pair}
    return {
        key
        for key, (one, other) in priced.items()
        if not any(x <= one and y <= other and (x, y) != (one, other) for x, y in priced.values())
    }


def _amount(field: str, value: float, least: float = 0.0) -> float:
    return number(field, value, least, LARGEST, above=least == 0)
