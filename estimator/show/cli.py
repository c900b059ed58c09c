"""estimate MODEL: the command line over `estimator.estimate`; and `estimate calibrate`."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import number
from estimator.describe.checks import ConfigError, shown
from estimator.describe.model import ModelConfig
from estimator.describe.plan import FULLY_SHARDED, Plan
from estimator.describe.run import Run
from estimator.describe.settings import settings
from estimator.describe.units import GIB
from estimator.describe.words import in_words
from estimator.show.commands import Parser, TopicHelp

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from estimator.accounting.accounts import Values
    from estimator.answers.estimates import Estimate
    from estimator.describe.settings import Setting
    from estimator.timing.speed import Time

ALMOST_ALL = 0.999  # of the parameters are trained: what is left out says more


def _common() -> dict[str, str]:
    """The short help: what most people need, and in how few words."""
    return {
        "MODEL": "a preset (`estimate list models`) or the path of a config.json",
        "--gpu NAME": "an accelerator (`estimate list accelerators`) or a profile.toml",
        "--count N": "how many of them",
        **{f"{_flag(x.name)} {_metavar(x)}": _short(x) for x in settings(Plan).values() if x.common},
        "--global-batch-size N": "sequences in an optimizer step of the whole job",
        "--steps N, --tokens N": "optimizer steps or training tokens; with them come hours, dollars and energy",
        "--max-batch": "print only the largest micro-batch that fits",
        "--json": "print everything as JSON",
    }


def _short(setting: Setting) -> str:
    if setting.choices:
        return ", ".join([*setting.choices, *(f"{other} (is {name})" for other, name in setting.spellings.items())])
    said = setting.meaning.rstrip(".")
    return f"{said} (default: {setting.optional})" if setting.optional else said


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _metavar(setting: Setting) -> str:
    return {"count": "N", "number": "X"}.get(setting.kind, "NAME")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # no number, or one of more digits than Python reads
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be an integer") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)}: must be a number") from None


def parser() -> argparse.ArgumentParser:
    """Arguments: a model, each field of the plan, each size of the model, the accelerator, the run, the output."""
    p = Parser(
        prog="estimate",
        usage="%(prog)s MODEL [OPTION ...] (--help lists the options)",
        description="The bytes, FLOPs and hours of a training step, when its memory peaks, and by what formula.",
        epilog="`estimate list` prints the names of all presets and accelerators; `estimate calibrate` measures this "
        "machine for --gpu.",
        allow_abbrev=False,
        add_help=False,
    )
    p.add_argument("model", help="a preset (estimate list) or the path of a config.json")
    p.add_argument("--gpu", default="a100-80gb-sxm", help="an accelerator or a profile.toml (default: %(default)s)")
    recipe = p.add_argument_group("the plan (defaults: what a bare PyTorch script does)")
    _add_fields(recipe, Plan)
    sizes = p.add_argument_group("sizes of the model, in place of the preset's")
    _add_fields(sizes, ModelConfig, skip=("family", "parts", "pattern"))
    run = p.add_argument_group("the run")
    _add_fields(run, Run)
    run.add_argument("--tokens", type=_number, metavar="N", help="training tokens, in place of steps")
    run.add_argument("--price", type=_number, metavar="X", help="US dollars of an accelerator-hour (default: on file)")
    run.add_argument("--stack-factor", metavar="FILE", help="what `estimate calibrate --log` wrote of your own stack")
    out = p.add_argument_group("the output")
    out.add_argument(
        "--optimise-for",
        "--optimize-for",
        choices=("memory", "speed", "batch", "cost"),
        help="print what is better for that, up to four changes at once",
    )
    out.add_argument("--max-batch", action="store_true", help="print the largest micro-batch that fits, and stop")
    out.add_argument("--formulas", action="store_true", help="print the closed form of every figure, and stop")
    out.add_argument("--json", action="store_true", help="print everything as JSON")
    topics = {"plan": recipe, "model": sizes, "run": run, "output": out}
    p.add_argument("-h", "--help", action=TopicHelp, common=_common(), topics=topics)
    return p


def _add_fields(group: Any, cls: type, skip: Sequence[str] = ()) -> None:
    for setting in settings(cls).values():
        if setting.name in skip:
            continue
        option: dict[str, Any] = {"dest": setting.name, "default": None, "help": setting.help.replace("%", "%%")}
        if setting.kind == "flag":
            option["action"] = argparse.BooleanOptionalAction
        else:
            option["metavar"] = _metavar(setting)
            option["type"] = {"count": _integer, "number": _number}.get(setting.kind, str)
        group.add_argument(_flag(setting.name), **option)


def run(argv: Sequence[str]) -> int:
    """`estimate MODEL ...`.

    Raises:
        ConfigError: what is asked cannot be.
    """
    return _run(parser().parse_args(argv))


def calibrate(argv: Sequence[str]) -> int:
    """`estimate calibrate`: of the user's own log, or else the trainer measures this machine.

    Raises:
        ConfigError: what is asked cannot be.
        ModuleNotFoundError: there is no torch to measure with.
    """
    if not any(word.split("=")[0] == "--log" for word in argv):
        from trainer.referee.calibrate import main as measure  # noqa: PLC0415 - the one thing here that takes torch

        return measure(argv)
    arguments = parser()
    arguments.prog = "estimate calibrate"
    arguments.add_argument("--log", required=True, metavar="FILE", help="a log of three or more steps of this run")
    arguments.add_argument("--out", metavar="FILE", help="write the factor there, for --stack-factor")
    return _calibrate_by_log(arguments.parse_args(argv))


def _calibrate_by_log(args: argparse.Namespace) -> int:
    """`estimate calibrate --log FILE MODEL ...`: measured steps over predicted ones."""
    from estimator.answers.logs import explanation, load, logged, read_log, save  # noqa: PLC0415 - only for this
    from estimator.timing.stack import StackFactor  # noqa: PLC0415 - the same

    log = read_log(args.log)
    earlier = load(args.stack_factor).runs if args.stack_factor else ()
    args.stack_factor = None
    r = asked(args)
    if r.time is None or not r.time.predicted:
        raise ConfigError(f"log = {args.log!r}: no time is predicted for this run: {' '.join(r.notes)}")
    found = StackFactor((*earlier, logged(log, r, f"{args.log} ({log.format})")))
    sys.stdout.write(explanation(found, r) + "\n")
    if args.out:
        save(found, args.out)
        sys.stdout.write(f"Written to {args.out}: give it as --stack-factor {args.out}\n")
    return 0


def model_of(args: argparse.Namespace) -> ModelConfig:
    """The model that the arguments describe."""
    from estimator.describe.hf import TakenForAnother, from_hf  # noqa: PLC0415 - only here
    from estimator.describe.presets import preset  # noqa: PLC0415 - only here

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TakenForAnother)
        named = (
            from_hf(Path(args.model))
            if args.model.endswith(".json") or os.path.isdir(args.model)  # noqa: PTH112 - Path.is_dir raises where a name is too long to be a path
            else preset(args.model)
        )
    sys.stderr.writelines(f"estimate: note: {warning.message}\n" for warning in said)
    given = vars(args)
    return named.replace(**{name: given[name] for name in settings(ModelConfig) if given.get(name) is not None})


def _described(args: argparse.Namespace) -> tuple[ModelConfig, Plan]:
    """The model and the plan that the arguments describe."""
    model, given = model_of(args), vars(args)
    wanted = {name: given[name] for name in settings(Plan) if given[name] is not None}
    several = max(given["count"] or 1, wanted.get("data_parallel", 1)) > 1
    if several and settings(Plan)["sharding"].checked(wanted.get("sharding", "none")) in FULLY_SHARDED:
        wanted.setdefault("precision", "bf16-fsdp")  # what people shard with; the first line of the answer says it
    return model, Plan(**wanted)


def asked(args: argparse.Namespace) -> Estimate:
    """The estimate that the arguments ask for."""
    from estimator.answers.estimates import estimate  # noqa: PLC0415 - sympy, which --help does without

    return estimate(
        *(described := _described(args)),
        args.gpu,
        **_options(args) | {"steps": _steps(args, *described)},
    )


def _steps(args: argparse.Namespace, model: ModelConfig, plan: Plan) -> int | None:
    """The optimizer steps that were asked for, or that the training tokens take."""
    if args.tokens is None:
        return args.steps
    if args.steps is not None:
        raise ConfigError(f"tokens = {args.tokens:g}: steps = {args.steps} is given too; allowed is one of them")
    wanted = number("tokens", args.tokens, most=1e18, above=True)
    count = plan.data_parallel if args.count is None else args.count
    sequences = args.global_batch_size or plan.batch_size * plan.grad_accumulation * count
    return math.ceil(wanted / (sequences * plan.tokens(model) * (1 - (args.padding or 0.0))))


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked beside model, plan and accelerator."""
    from estimator.answers.logs import load  # noqa: PLC0415 - sympy, which --help does without

    given = {name: value for name in settings(Run) if (value := getattr(args, name)) is not None}
    return given | {"stack_factor": load(args.stack_factor) if args.stack_factor else None}


def carrying(args: argparse.Namespace) -> dict[str, Any]:
    """What carries the time, whatever the machine and the batch."""
    return {name: x for name, x in _options(args).items() if name not in ("count", "global_batch_size", "steps")}


def _run(args: argparse.Namespace) -> int:
    from estimator.answers.estimates import max_batch_size, replicated  # noqa: PLC0415 - sympy, which --help does without
    from estimator.show.remedies import advise  # noqa: PLC0415 - likewise

    if args.max_batch:
        model, plan = _described(args)
        largest = max_batch_size(
            model, replicated(plan, args.count), args.gpu, global_batch_size=args.global_batch_size
        )
        sys.stdout.write(f"{largest}\n")
        return 0
    r = asked(args)
    if args.json:
        json.dump(r.to_dict(), sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
    elif args.formulas:
        _formulas(r)
    else:
        _tables(
            args.model,
            r,
            max_batch_size(r.model, r.plan, args.gpu, global_batch_size=args.global_batch_size),
            args.price,
        )
        if args.optimise_for or not r.fits:
            sys.stdout.flush()  # the figures are there; what follows takes some seconds
            advise(r, args.optimise_for or "memory", args.global_batch_size, carrying(args))
    return 0


def _formulas(r: Estimate) -> None:
    from estimator.accounting.accounts import FORMS  # noqa: PLC0415 - only here
    from estimator.eager.letters import legend, written  # noqa: PLC0415 - only here

    write = sys.stdout.write
    for name in FORMS:
        write(f"{name} = {getattr(r.account, name)}\n  = {getattr(r.values, name):,}\n")
    write("peak_bytes = the greatest of\n")
    for piece in r.account.pieces:
        where = r.account.traced.named(piece.where, r.account.turns(r.memory.sizes))
        write(f"  {where.phase}, {where.module or 'model'}, {where.op}:\n    {written(piece.live)}\n")
    write(f"  = {r.values.peak_bytes:,}\n")
    symbols = r.account.symbols_at(r.memory.sizes)
    meanings = legend(str(symbol) for symbol in symbols)
    write("\n".join(f"{letter}: {text}" for letter, text in meanings.items()) + "\n")


def gib(nbytes: float) -> str:
    """Bytes as GiB."""
    return f"{nbytes / GIB:,.2f} GiB"


def parameters(values: Values) -> str:
    """How many there are, and how many of them a token goes through."""
    total, active = values.parameters, values.active_parameters
    return f"{total:,} parameters" + (f", {active:,} of them active" if active != total else "")


def trained(values: Values) -> str:
    """How many of the parameters are trained."""
    whole, part = values.parameters, values.trained_parameters
    if part > ALMOST_ALL * whole:  # a mixture whose routers have a correction that no gradient moves
        return f"trained: all parameters but {whole - part:,}"
    return f"trained: {part:,} of {whole:,} parameters ({100 * part / whole:.3g} %)"


def verdict(r: Estimate, largest: int) -> str:
    """Fits or not, by how much, when the peak is and what holds it, and what the logits are of it."""
    from estimator.show.formatting import logits  # noqa: PLC0415 - only here

    m = r.memory
    spare = (m.capacity or 0) - m.needed
    fits = f"Fits: needs {gib(m.needed)} of {gib(m.capacity or 0)}, {gib(spare)} to spare."
    if m.verdict == "fits but tight":
        tips = ", ".join(f"{name} ({gib(nbytes)})" for name, nbytes in m.can_tip.items())
        fits = f"Fits but tight: needs {gib(m.needed)} of {gib(m.capacity or 0)}; what can tip it: {tips}."
    if not m.fits:
        fits = f"Does not fit: needs {gib(m.needed)} of {gib(m.capacity or 0)}, {gib(-spare)} too much."
    holds = max(m.parts, key=lambda name: m.parts[name])
    place = f"{m.where.phase} of {m.where.module or 'the model'} ({m.where.op or 'forward'})"
    batch = f"the largest micro-batch is {largest}" if largest else "not even one sequence fits"
    said = f"{fits} The peak is in the {place}; most of it is {holds} ({gib(m.parts[holds])}); {batch}."
    return f"{said} {logits(r)}".rstrip()


def at_a_glance(r: Estimate, largest: int, price: float | None = None) -> str:
    """The answer in a line: memory, largest micro-batch, time of a step and of the run, dollars, energy."""
    from estimator.pricing.money import cost  # noqa: PLC0415 - only here
    from estimator.show.formatting import dollars, duration, prefixed  # noqa: PLC0415 - likewise

    m, t = r.memory, r.time
    said = [f"{'fits' if m.fits else 'DOES NOT FIT'}: {gib(m.needed)} of {gib(m.capacity or 0)}"]
    said.append(f"largest micro-batch {largest}")
    if t is not None:
        said.append(f"{duration(t.seconds_per_step)} a step")
    if t is not None and t.steps:
        spent = cost(r.accelerator, t.seconds, t.count, price=price)
        said.append(duration(t.seconds))
        said += [dollars(spent.dollars.median)] if spent.dollars is not None else []
        said += [prefixed(spent.kilowatt_hours * 1e3, "Wh")] if spent.kilowatt_hours is not None else []
        said += [] if m.fits else ["if it fitted"]
    return " | ".join(said)


def _tables(name: str, r: Estimate, largest: int, price: float | None = None) -> None:
    from rich.console import Console  # noqa: PLC0415 - --json does without
    from rich.table import Table  # noqa: PLC0415 - --json does without
    from rich.text import Text  # noqa: PLC0415 - --json does without

    class Output(Console):
        """A console that leaves a closed pipe to `main`."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    # rich takes COLUMNS as it is, 0 included; shutil's answer is a width that one can print in.
    width = min(max(shutil.get_terminal_size().columns, 20), 1000)
    console = Output(width=width, markup=False, emoji=False)
    p = r.plan
    blocks = f" (1 block in {p.checkpoint_every})" if p.checkpoint_every > 1 else ""
    console.print(
        Text(name.encode("utf-8", "backslashreplace").decode(), style="bold"),
        f"on {r.accelerator.name}: micro-batch {p.batch_size} x {p.tokens(r.model):,} tokens, "
        f"{p.precision}, {p.attention} attention, checkpointing {p.checkpointing}{blocks}, "
        f"{p.optimizer} ({p.optimizer_on(r.account.device)})",
        highlight=False,
    )
    console.print(at_a_glance(r, largest, price), style="bold", highlight=False)
    console.print(f"{in_words(r.model)}; {parameters(r.whole)}", highlight=False)
    if r.whole.trained_parameters != r.whole.parameters:
        console.print(trained(r.whole), highlight=False)
    console.print(verdict(r, largest) + "\n", style="bold green" if r.fits else "bold red", highlight=False)
    table = Table("memory at the peak", "bytes", "GiB", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {**r.memory.parts, "live tensors": r.memory.peak}
    rows["allocator's rounding"] = r.memory.allocated - r.memory.peak - r.memory.workspace
    rows["cuBLAS workspace"] = r.memory.workspace
    rows["CUDA context (290 to 670 MB)"] = sum(r.memory.context) // 2
    rows[f"NCCL's buffers ({r.memory.nccl[0] / 1e9:.2f} to {r.memory.nccl[1] / 1e9:.2f} GB)"] = sum(r.memory.nccl) // 2
    rows["needed, which decides whether it fits"] = r.memory.needed
    if r.account.device == "cuda":
        rows["reserved by the allocator (a model)"] = r.memory.reserved
        rows["nvidia-smi shows about"] = sum(r.memory.nvidia_smi) // 2
    for part, nbytes in rows.items():
        if nbytes:
            table.add_row(part, f"{nbytes:,}", f"{nbytes / GIB:,.2f}")
    console.print(table)
    table = Table("by module", "parameters", "saved bytes", "GFLOPs fwd", "GFLOPs bwd", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for module, form in (*r.values.modules.items(), ("total", r.values)):
        counts = (f"{form.parameters:,}", f"{form.activation_bytes:,}")
        flops = (f"{form.forward_flops / 1e9:,.1f}", f"{form.backward_flops / 1e9:,.1f}")
        table.add_row(module, *counts, *flops, style="bold" if module == "total" else None)
    console.print()
    console.print(table)
    console.print(
        f"\nmatrix products of a micro-batch: {r.flops.forward:,} FLOPs forward, {r.flops.backward:,} backward\n"
        f"optimizer: {r.flops.optimizer:,} FLOPs; a step of {r.flops.sequences:,} sequences: {r.flops.step:,} FLOPs",
        highlight=False,
    )
    if r.model.num_experts is not None:
        by = {name: f"{flops / 1e9:,.4g} GFLOPs" for name, flops in r.flops_per_token.items()}
        console.print(f"a token: {by['ledger']} by the ledger, {by['6N']} by 6 N of the active ones", highlight=False)
    if r.time is not None:
        _time(r.time, console)
        for assumption in r.assumptions:
            console.print(f"  {assumption}", highlight=False)
    for note in (*r.notes, *r.memory_notes):
        console.print(note, highlight=False)


def _time(t: Time, console: Console) -> None:
    run = f"; {t.steps:,} steps: {t.hours:,.0f} hours ({t.days:,.0f} days)" if t.steps else ""
    each = f" ({t.tokens_per_second_per_accelerator:,.0f} each)" if t.count > 1 else ""
    text = f", of text {t.text_tokens_per_second:,.0f}" if t.padding else ""
    what = "time predicted:" if t.predicted else "time at"
    console.print(
        f"{what} {t.mfu:.0%} of {t.peak_flops / 1e12:g} TFLOP/s: {t.seconds_per_step:,.4g} s a step, "
        f"{t.tokens_per_second:,.0f} tokens/s{each}{text}{run}",
        highlight=False,
    )
    if t.interval is None:
        return
    shares = ", ".join(f"{name} {part / t.seconds_per_step:.0%}" for name, part in t.parts.items() if part)
    low, high = (seconds / (t.steps or 1) for seconds in (t.interval.low, t.interval.high))
    console.print(f"  of a step: {shares}", highlight=False)
    console.print(f"  between {low:,.4g} and {high:,.4g} s a step: {t.interval.source}", highlight=False)
    console.print(f"  {t.origin}", highlight=False)
