"""estimate plan: from money, a deadline, tokens or a size to what can be trained, on what, and when it is done."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import shown
from estimator.describe.units import SECONDS_PER_HOUR
from estimator.pricing.money import KINDS
from estimator.show.commands import Parser
from estimator.show.formatting import STRATEGIES, count, dollars, duration, in_columns, prefixed

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from estimator.answers.plans import Option, Plans

ROWS = 12
# What is said of the others, of the options that are best in what they trade.
TRADES = {
    ("hours", "dollars"): "is both cheaper and faster",
    ("hours", "size"): "trains more in less time",
    ("dollars", "size"): "trains more for less money",
}
# The option of the command for each argument of `estimator.plan`.
OPTIONS = {
    "dollars": "--budget",
    "days": "--max-days",
    "tokens": "--tokens",
    "parameters": "--parameters",
    "tokens_per_parameter": "--tokens-per-parameter",
    "price": "--price",
    "sort": "--sort",
}


def run(argv: Sequence[str]) -> int:
    """`estimate plan`.

    Raises:
        ConfigError: what is asked cannot be.
    """
    args = _parser().parse_args(argv)
    from estimator.answers.plans import COUNTS, plan  # noqa: PLC0415 - sympy, which --help does without

    model = args.model
    if model is not None and model.endswith(".json"):
        model = Path(model)
    found = plan(
        model,
        dollars=args.budget,
        days=args.max_days,
        hours=args.max_hours,
        tokens=args.tokens,
        parameters=args.parameters,
        tokens_per_parameter=args.tokens_per_parameter,
        accelerators=args.gpu,
        counts=args.count or COUNTS,
        batch_tokens=args.batch_tokens,
        price=args.price,
        sort=args.sort,
    )
    if args.json:
        json.dump(found.to_dict(), sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
    else:
        sys.stdout.write(said(found, args.rows))
    return 0


def _parser() -> argparse.ArgumentParser:
    p = Parser(
        prog="estimate plan",
        description="From money, a deadline, tokens or a size to the others: every accelerator and count that fits.",
        allow_abbrev=False,
    )
    p.add_argument("model", nargs="?", help="a preset or the path of a config.json (default: a model in Llama's shape)")
    p.add_argument("--budget", "--dollars", type=_number, metavar="DOLLARS", help="at most")
    p.add_argument("--max-days", type=_number, metavar="DAYS", help="at most")
    p.add_argument("--max-hours", type=_number, metavar="HOURS", help="at most")
    p.add_argument("--tokens", type=_number, metavar="N", help="training tokens, such as 26e9")
    p.add_argument("--parameters", type=_number, metavar="N", help="of a model in Llama's shape, such as 1.3e9")
    p.add_argument(
        "--tokens-per-parameter", type=_number, metavar="X", help="(default: 20, about what is compute-optimal)"
    )
    p.add_argument("--gpu", action="append", metavar="NAME", help="only this one; may be given again")
    p.add_argument("--count", action="append", type=int, metavar="N", help="only so many; may be given again")
    p.add_argument("--batch-tokens", type=_number, metavar="N", help="tokens in an optimizer step (default: GPT-3's)")
    p.add_argument("--price", default="on-demand", choices=KINDS, help="kind of price (default: %(default)s)")
    p.add_argument("--sort", choices=("cost", "time", "size"), help="what comes first")
    p.add_argument("--rows", type=int, default=ROWS, help="rows to print (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    return p


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number") from None


def command(asked: Mapping[str, Any]) -> str:
    """The command that prints what `estimator.plan(**asked)` answers."""
    words = ["estimate", "plan", *([asked["model"]] if "model" in asked else [])]
    for name, flag in OPTIONS.items():
        if name in asked:
            words += [flag, _digits(asked[name])]
    return shlex.join(words)


def python(asked: Mapping[str, Any]) -> str:
    """Python that computes what `estimator.plan(**asked)` answers."""
    given = ", ".join(f"{name}={_digits(x) if isinstance(x, float) else repr(x)}" for name, x in asked.items())
    return f"import estimator as est\n\nfound = est.plan({given})\nprint(found.to_frame())"


def _digits(value: object) -> str:
    """A number in as few digits as say it exactly."""
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def headline(found: Plans) -> str:
    """The answer in a sentence or two."""
    if not found.options:
        why = max(found.refused, key=lambda reason: found.refused[reason], default="no accelerator has such a price")
        return f"Nothing fits within this. Most often because: {why}."
    first = found.options[0]
    what = {"cost": "Cheapest", "time": "Fastest", "size": "Largest"}[found.sort]
    text = f"{what}: {sentence(first)}."
    fastest = min(found.options, key=lambda o: o.hours)
    if found.sort == "cost" and fastest is not first:
        text += f" Fastest: {sentence(fastest, model=False)}."
    return text


def sentence(o: Option, *, model: bool = True) -> str:
    """What is trained, on what, how long and for how much."""
    what = f"{count(o.parameters)} parameters on {count(o.tokens)} tokens, on " if model else ""
    money = "" if o.dollars is None else f" for {dollars(o.dollars)}"
    return f"{what}{o.count} x {o.accelerator} in {duration(o.hours * SECONDS_PER_HOUR)}{money}"


def said(found: Plans, rows: int) -> str:
    """The headline, a row for each option, and what was assumed and left out."""
    lines = [headline(found), ""]
    if found.options:
        table = [HEADER, *(row(o) for o in found.options[:rows])]
        lines += in_columns(table, LEFT)
        more = len(found.options) - rows
        lines += ["", f"* no other {TRADES[found.trade]}." + (f" {more} more: --rows." if more > 0 else "")]
    lines += [f"Assumed: {text}." for text in found.assumptions]
    if found.refused:
        total = sum(found.refused.values())
        top = sorted(found.refused.items(), key=lambda entry: -entry[1])[:3]
        lines.append(f"Left out: {total}; {'; '.join(f'{n} {why}' for why, n in top)}.")
    return "\n".join(lines) + "\n"


HEADER = ("", "accelerators", "parameters", "tokens", "time", "90 % within", "dollars", "$/h", "provider, date",
          "energy", "CO2", "MFU", "how")  # fmt: skip
LEFT = (0, 1, 8, 12)


def row(o: Option) -> tuple[str, ...]:
    """An option as cells under `HEADER`."""
    low, high = duration(o.low * SECONDS_PER_HOUR), duration(o.high * SECONDS_PER_HOUR)
    p, recomputed = o.plan, "" if o.plan.checkpointing == "none" else f", checkpointing {o.plan.checkpointing}"
    return (
        "*" if o.best else "",
        f"{o.count} x {o.accelerator}",
        count(o.parameters),
        count(o.tokens),
        duration(o.hours * SECONDS_PER_HOUR),
        f"{low} - {high}",
        "-" if o.dollars is None else dollars(o.dollars),
        "-" if o.price is None else f"{o.price.usd_per_hour:.2f}",
        "-" if o.price is None else f"{o.price.provider}, {o.price.date}",
        "-" if o.kilowatt_hours is None else prefixed(o.kilowatt_hours * 1e3, "Wh"),
        "-" if o.co2_kg is None else f"{o.co2_kg:,.0f} kg",
        f"{o.mfu:.0%}",
        f"{STRATEGIES[p.sharding] if o.count > 1 else 'alone'}, micro-batch {p.batch_size}{recomputed}",
    )
