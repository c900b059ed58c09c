"""estimate: the command line over `estimator.estimate`."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from estimator.describe.checks import SHOWN, ConfigError, shown
from estimator.describe.model import ModelConfig
from estimator.describe.plan import FULLY_SHARDED, SHARDING_SPELLINGS, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from _typeshed import SupportsWrite
    from rich.console import Console

    from estimator.answers.estimates import Estimate
    from estimator.timing.speed import Time

GIB = 2**30


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that repeats no more of a long word than an error of the library does."""

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        """Print the help; argparse's own is silent where it cannot be written."""
        (file or sys.stdout).write(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Print usage and `message`, and exit with 2."""
        super().error(re.sub(rf"\S{{{SHOWN + 1},}}", lambda word: f"{word[0][: SHOWN - 3]}...", message))


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
        description="The bytes, FLOPs and hours of a training step, when its memory peaks, and by what formula.",
        epilog="`estimate --list` prints the names of all presets and accelerators; `estimate calibrate` measures this "
        "machine for --gpu.",
        allow_abbrev=False,
    )
    p.add_argument("model", help="a preset (estimate --list) or the path of a config.json")
    p.add_argument("--gpu", default="a100-80gb-sxm", help="an accelerator or a profile.toml (default: %(default)s)")
    recipe = p.add_argument_group("the plan (defaults: what a bare PyTorch script does)")
    _add_fields(recipe, Plan)
    sizes = p.add_argument_group("sizes of the model, in place of the preset's")
    _add_fields(sizes, ModelConfig, skip=("family", "parts", "pattern"))
    run = p.add_argument_group("the run")
    run.add_argument(
        "--mfu", type=_number, help="MFU to reckon time with, in (0, 1] (default: predicted from the kernels)"
    )
    run.add_argument("--steps", type=_integer, help="optimizer steps")
    run.add_argument("--global-batch-size", type=_integer, help="sequences in an optimizer step of the whole job")
    run.add_argument("--count", type=_integer, help="accelerators (default: the plan's data_parallel)")
    run.add_argument(
        "--network", metavar="NAME|X", help="between nodes: a well-known cluster's, or bytes/s of one accelerator"
    )
    run.add_argument("--network-latency", type=_number, metavar="X", help="seconds of one hop between nodes")
    run.add_argument("--attention-kernel", metavar="NAME", help="flash-1, flash-2, flash-3 or cudnn, where timed")
    run.add_argument(
        "--no-overlap", dest="overlap", action="store_false", help="gradients are summed when backward is over"
    )
    run.add_argument(
        "--wide", nargs="*", default=(), metavar="NAME", help="computed in fp32 in 16-bit models: norm rotation"
    )
    run.add_argument("--stack-factor", metavar="FILE", help="what `estimate calibrate --log` wrote of your own stack")
    out = p.add_argument_group("the output")
    out.add_argument("--max-batch", action="store_true", help="print the largest micro-batch that fits, and stop")
    out.add_argument("--formulas", action="store_true", help="print the closed form of every figure, and stop")
    out.add_argument("--json", action="store_true", help="print everything as JSON")
    return p


def _add_fields(group: Any, cls: type[ModelConfig | Plan], skip: Sequence[str] = ()) -> None:
    for f in fields(cls):
        if f.name in skip:
            continue
        kind = str(f.type)
        option: dict[str, Any] = {"dest": f.name, "default": None, "help": cls.HELP[f.name].replace("%", "%%")}
        if "bool" in kind and "int" not in kind:
            option["action"] = argparse.BooleanOptionalAction
        else:
            option["metavar"] = "N" if "int" in kind else "X" if "float" in kind else "NAME"
            option["type"] = _integer if "int" in kind else _number if "float" in kind else str
        group.add_argument(f"--{f.name.replace('_', '-')}", **option)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if all is well, 2 for bad input, 1 where the output cannot be written."""
    if sys.stdout is None:  # `estimate ... >&-`: nobody listens
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it is open until the end
    try:
        try:
            return _command(sys.argv[1:] if argv is None else list(argv))
        finally:
            sys.stdout.flush()  # here, where what goes wrong can still be said
    except BrokenPipeError:  # `estimate ... | head` has read enough
        _abandon_output()
        return 0
    except OSError as error:
        if error.filename is not None:  # of a file that was to be read
            raise
        _abandon_output()
        sys.stderr.write(f"estimate: error: the output cannot be written ({error.strerror})\n")
        return 1


def _abandon_output() -> None:
    """What is left to be written goes nowhere: Python would try again at its end, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _command(argv: list[str]) -> int:
    if argv[:1] == ["--list"]:
        return _list()
    from_log = argv[:1] == ["calibrate"] and any(word.split("=")[0] == "--log" for word in argv)
    if argv[:1] == ["calibrate"] and not from_log:
        return _calibrate(argv[1:])
    arguments = parser()
    if from_log:
        arguments.prog = "estimate calibrate"
        arguments.add_argument("--log", required=True, metavar="FILE", help="a log of three or more steps of this run")
        arguments.add_argument("--out", metavar="FILE", help="write the factor there, for --stack-factor")
    args = arguments.parse_args(argv[1:] if from_log else argv)
    try:
        return _calibrate_by_log(args) if from_log else _run(args)
    except ConfigError as error:
        arguments.exit(2, f"estimate: error: {error}\n")


def _calibrate(argv: Sequence[str]) -> int:
    """`estimate calibrate`: the trainer measures, so it is asked for here and nowhere else."""
    try:
        from trainer.referee.calibrate import main as calibrate  # noqa: PLC0415 - the one thing here that takes torch
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"estimate calibrate: error: {error.name} is missing: pip install transformer-estimator[trainer]\n"
        )
        return 2
    return calibrate(argv)


def _list() -> int:
    from estimator.describe.presets import preset_groups  # noqa: PLC0415 - only for this
    from estimator.hardware.accelerators import accelerators  # noqa: PLC0415 - only for this

    groups = "".join(f"  {group}: {', '.join(names)}\n" for group, names in preset_groups().items())
    sys.stdout.write(f"models:\n{groups}accelerators:\n  {', '.join(accelerators())}\n")
    return 0


def _calibrate_by_log(args: argparse.Namespace) -> int:
    """`estimate calibrate --log FILE MODEL ...`: measured steps over predicted ones."""
    from estimator.answers.logs import explanation, read_log, save, stack_factor  # noqa: PLC0415 - only for this

    log = read_log(args.log)
    r = _asked(args)
    if r.time is None or not r.time.predicted:
        raise ConfigError(f"log = {args.log!r}: no time is predicted for this run: {' '.join(r.notes)}")
    tokens = r.time.tokens_per_second * r.time.seconds_per_step
    found = stack_factor(log, r.time, tokens, f"{args.log} ({log.format})")
    sys.stdout.write(explanation(found, r.time) + "\n")
    if args.out:
        save(found, args.out)
        sys.stdout.write(f"Written to {args.out}: give it as --stack-factor {args.out}\n")
    return 0


def _network(word: str | None) -> str | float | None:
    """A number of bytes/s, or a name."""
    if word is None:
        return None
    try:
        return float(word)
    except ValueError:
        return word


def _described(args: argparse.Namespace) -> tuple[ModelConfig, Plan]:
    """The model and the plan that the arguments describe."""
    from estimator.describe.hf import from_hf  # noqa: PLC0415 - only here
    from estimator.describe.presets import preset  # noqa: PLC0415 - only here

    named = (
        from_hf(Path(args.model)) if args.model.endswith(".json") or os.path.isdir(args.model) else preset(args.model)  # noqa: PTH112 - Path.is_dir raises where a name is too long to be a path
    )
    given = vars(args)
    model = named.replace(**{f.name: given[f.name] for f in fields(ModelConfig) if given.get(f.name) is not None})
    wanted = {f.name: given[f.name] for f in fields(Plan) if given[f.name] is not None}
    several = max(given["count"] or 1, wanted.get("data_parallel", 1)) > 1
    if several and SHARDING_SPELLINGS.get(wanted.get("sharding"), wanted.get("sharding")) in FULLY_SHARDED:
        wanted.setdefault("precision", "bf16-fsdp")  # what people shard with; the first line of the answer says it
    return model, Plan(**wanted)


def _asked(args: argparse.Namespace) -> Estimate:
    """The estimate that the arguments ask for."""
    from estimator.answers.estimates import estimate  # noqa: PLC0415 - sympy, which --help does without
    from estimator.answers.logs import load  # noqa: PLC0415 - likewise

    model, plan = _described(args)
    return estimate(
        model,
        plan,
        args.gpu,
        mfu=args.mfu,
        steps=args.steps,
        global_batch_size=args.global_batch_size,
        count=args.count,
        network=_network(args.network),
        network_latency=args.network_latency,
        attention_kernel=args.attention_kernel,
        overlap=args.overlap,
        wide=args.wide,
        stack_factor=load(args.stack_factor) if args.stack_factor else None,
    )


def _run(args: argparse.Namespace) -> int:
    from estimator.answers.estimates import max_batch_size, replicated  # noqa: PLC0415 - sympy, which --help does without

    if args.max_batch:
        model, plan = _described(args)
        sys.stdout.write(f"{max_batch_size(model, replicated(plan, args.count), args.gpu)}\n")
        return 0
    r = _asked(args)
    if args.json:
        json.dump(r.to_dict(), sys.stdout, indent=1, allow_nan=False)
        sys.stdout.write("\n")
    elif args.formulas:
        _formulas(r)
    else:
        _tables(args.model, r, max_batch_size(r.model, r.plan, args.gpu))
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


def _tables(name: str, r: Estimate, largest: int) -> None:
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
        f"{p.optimizer} ({p.implementation(r.account.device)})",
        highlight=False,
    )
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
    if r.time is not None:
        _time(r.time, console)
    for note in r.notes:
        console.print(note, highlight=False)


def _time(t: Time, console: Console) -> None:
    run = f"; {t.steps:,} steps: {t.hours:,.0f} hours ({t.days:,.0f} days)" if t.steps else ""
    each = f" ({t.tokens_per_second_per_accelerator:,.0f} each)" if t.count > 1 else ""
    what = "time predicted:" if t.predicted else "time at"
    console.print(
        f"{what} {t.mfu:.0%} of {t.peak_flops / 1e12:g} TFLOP/s: {t.seconds_per_step:,.4g} s a step, "
        f"{t.tokens_per_second:,.0f} tokens/s{each}{run}",
        highlight=False,
    )
    if t.interval is None:
        return
    shares = ", ".join(f"{name} {part / t.seconds_per_step:.0%}" for name, part in t.parts.items() if part)
    low, high = (seconds / (t.steps or 1) for seconds in (t.interval.low, t.interval.high))
    console.print(f"  of a step: {shares}", highlight=False)
    console.print(f"  between {low:,.4g} and {high:,.4g} s a step: {t.interval.source}", highlight=False)
    console.print(f"  {t.origin}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
