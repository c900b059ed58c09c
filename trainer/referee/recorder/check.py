"""`estimate check`: whether a step of one's own code fits, and whose statement its peak is. It runs that code.

Nothing else of this project runs code that it is given: the page and `from_hf` read data.
"""

from __future__ import annotations

import argparse
import json
import linecache
import resource
import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from estimator.answers.recorded import estimate_recorded
from estimator.answers.snapshots import read_snapshot
from estimator.describe.checks import ConfigError, shown
from estimator.describe.plan import Plan
from estimator.describe.settings import choices
from estimator.eager.ledger import Phase
from estimator.hardware.accelerators import accelerator
from estimator.show.formatting import count, duration, size
from trainer.referee.recorder.beside import beside
from trainer.referee.recorder.builds import SIZES, config_at, of_config, of_file
from trainer.referee.recorder.recording import DEVICES, record
from trainer.referee.recorder.remedies import remedies
from trainer.referee.recorder.steps import PRECISIONS
from trainer.referee.recorder.truth import compare
from trainer.referee.recorder.world import one_rank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.answers.recorded import RecordedEstimate
    from estimator.answers.snapshots import Snapshot
    from estimator.memory.device import Memory
    from estimator.timing.recorded import RecordedTime
    from trainer.referee.recorder.recording import Recording

RUNS = "This runs {} on this machine, as no other command of `estimate` does: check only code that you trust."
BY = {
    "cpu": " by the CPU's rules (on CUDA kernels have other scratch, and half precision fewer copies)",
    "cuda": " by CUDA's rules, with the allocator's rounding, cuBLAS's workspace and the context",
}
# What of CUDA's is not known, by the operators that it is about.
UNKNOWN = {
    "conv": "Convolutions are counted as without cuDNN, whose workspaces are not known.",
    "lstm": "The LSTM is counted as without cuDNN, which keeps a reserve of its own for backward.",
    "gru": "The GRU is counted as without cuDNN, which keeps a reserve of its own for backward.",
    "sort": "What a sort has for itself is left out.",
    "embedding_dense_backward": "What the gradient of an embedding sorts indices in is left out.",
}
OTHERS = "Of the other ranks nothing is known: whole numbers that are read of what they send are this rank's own.\n"
MODULES = 12  # lines of the table of modules


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    p = argparse.ArgumentParser(
        prog="estimate check",
        description="Whether a step of your own code fits, and whose statement its peak is. It runs that code.",
    )
    p.add_argument(
        "code", nargs="?", metavar="FILE.py:FUNCTION", help="returns a module, (module, loss, inputs) or a step"
    )
    p.add_argument(
        "--hf", metavar="CONFIG", help="in its place, a config.json, of which transformers builds its own class"
    )
    p.add_argument("--gpu", default="a100-80gb-sxm", help="the accelerator (estimate list)")
    p.add_argument(
        "--device",
        choices=DEVICES,
        help="whose rules: by default the accelerator's; given to FUNCTION as device, if it takes it",
    )
    p.add_argument(
        "--batch-size",
        type=int,
        metavar="B",
        help="given to FUNCTION as batch_size, if it takes it; else its own default, or 1",
    )
    p.add_argument(
        "--seq-len", type=int, metavar="T", help="given to it as seq_len, likewise; else its own default, or 1024"
    )
    p.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=NUMBER", help="further arguments of FUNCTION, or fields of CONFIG"
    )
    recipes = choices(Plan)
    p.add_argument("--optimizer", choices=recipes["optimizer"], default="adamw")
    p.add_argument("--optimizer-impl", choices=recipes["optimizer_impl"], default="auto")
    p.add_argument("--precision", choices=PRECISIONS, default="fp32")
    p.add_argument("--grad-accumulation", type=int, default=1, metavar="N", help="micro-batches of a step")
    p.add_argument("--max-grad-norm", type=float, metavar="X", help="clip the gradients to this norm")
    p.add_argument(
        "--remedies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="try what makes a step fit that does not",
    )
    p.add_argument("--measure", action="store_true", help="run a real step on this CPU too, and compare every event")
    p.add_argument("--fake-world", type=int, metavar="N", help="as one rank of N, without the others")
    p.add_argument("--fake-rank", type=int, default=0, metavar="R", help="which of them: the first is 0")
    p.add_argument("--snapshot", metavar="FILE", help="of torch.cuda.memory._dump_snapshot: what a card really held")
    p.add_argument("--json", action="store_true", help="everything as JSON")
    return p


def run(argv: Sequence[str]) -> int:
    """`estimate check`; 0 where it fits, 1 where it does not.

    Raises:
        ConfigError: what is asked cannot be.
    """
    args = parser().parse_args(argv)
    for name in ("batch_size", "seq_len", "grad_accumulation"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name} = {getattr(args, name)}: must be 1 or more")
    if args.fake_world is not None:
        one_rank(args.fake_world, args.fake_rank)
    gpu = accelerator(args.gpu)
    device = args.device or (gpu.device if gpu.device in DEVICES else "cpu")
    build, name = _build(args, device)
    given = {f.name: getattr(args, f.name) for f in fields(Plan) if getattr(args, f.name, None) is not None}
    plan = Plan(**{name: value for name, value in given.items() if name not in ("batch_size", "seq_len")})
    if not args.json:
        sys.stdout.write(RUNS.format(name) + "\n\n")
    recording = record(build, plan, device)
    answer = estimate_recorded(recording, plan, gpu)
    memory = answer.memory
    if args.json:
        sys.stdout.write(json.dumps(_plain(recording, answer), indent=1) + "\n")
    else:
        sys.stdout.write(report(recording, memory, name, gpu.name))
        if args.fake_world is not None:
            sys.stdout.write(sent(recording) + OTHERS)
        sys.stdout.write(timed(answer.time, gpu.name, plan, alone=args.fake_world is None))
        if args.hf is not None and args.fake_world is None:
            sys.stdout.write("\nBeside the models here, of the same config.json:\n")
            for said in beside(config_at(args.hf, _sizes(args)), recording, plan, _tokens(args)):
                sys.stdout.write(f"  {said}\n")
        if args.remedies and not memory.fits:
            sys.stdout.write("\nWhat it needs with these changes (each is recorded; --no-remedies leaves them out):\n")
            for said in remedies(build, plan, device, gpu, memory):
                sys.stdout.write(f"  {said}\n")
                sys.stdout.flush()
    if args.snapshot:
        sys.stdout.write("\n" + beside_snapshot(memory, read_snapshot(args.snapshot)))
    if args.measure:
        sys.stdout.write("\n" + compare(build, plan) + "\n")
    return 0 if memory.fits else 1


def beside_snapshot(memory: Memory, snapshot: Snapshot) -> str:
    """What the allocator of a card held at most, by line, and what was expected of it."""
    off = snapshot.peak / memory.peak - 1
    said = (
        f"The snapshot's peak is {snapshot.peak:,} bytes allocated, in {snapshot.reserved:,} reserved at its end; the "
        f"step above comes to {memory.peak:,}: {off:+.2%}. What the snapshot holds at its peak, by line:"
    )
    lines = [said]
    lines += [f"  {size(held):>10}  {line}" for line, held in list(snapshot.held_at_peak().items())[:MODULES]]
    return "\n".join(lines) + "\n"


def _build(args: argparse.Namespace, device: str) -> tuple[Callable[[], Any], str]:
    """(what builds the step, what it is called)."""
    if (args.code is None) == (args.hf is None):
        raise ConfigError("code: give FILE.py:FUNCTION or --hf CONFIG, one of them")
    sizes = _sizes(args)
    if args.hf is not None:
        B, T = _tokens(args)
        return of_config(args.hf, B, T, **sizes), f"transformers' class of {args.hf} at {B:,} x {T:,} tokens"
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None} | sizes
    said = ", ".join(f"{name}={value}" for name, value in given.items()) or "its own sizes"
    return of_file(args.code, given, device), f"{args.code} with {said}"


def _tokens(args: argparse.Namespace) -> tuple[int, int]:
    """Sequences, and tokens of each, of a class of transformers."""
    return args.batch_size or SIZES["batch_size"], args.seq_len or SIZES["seq_len"]


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    """What --set gives."""
    sizes = {}
    for pair in args.set:
        name, _, value = pair.partition("=")
        try:
            sizes[name] = int(value)
        except ValueError as error:
            raise ConfigError(f"set = {shown(pair)}: must be NAME=NUMBER") from error
    return sizes


def report(recording: Recording, memory: Memory, name: str, gpu: str) -> str:
    """The answer in words and tables."""
    assert memory.capacity is not None
    need = f"{size(memory.needed)} of {size(memory.capacity)}"
    lines = [
        f"{name}: {count(recording.parameters)} parameters",
        f"{memory.verdict.capitalize()} on {gpu}: a step needs {need}{BY[recording.account.device]}.",
        "",
        f"The peak is {memory.peak:,} bytes ({size(memory.peak)}), {_place(recording, recording.account.peak)}",
    ]
    lines += _source(recording, recording.account.peak)
    lines += ["", "At the peak, by what it is for:"]
    lines += [f"  {what:14} {held:>18,}  {size(held):>10}" for what, held in recording.categories.items() if held]
    lines += ["", "By the module that made it:"]
    modules = list(recording.modules.items())
    width = max(len(module) for module, _ in modules[:MODULES])
    lines += [f"  {module or '(outside of modules)':{width}} {size(held):>10}" for module, held in modules[:MODULES]]
    if len(modules) > MODULES:
        rest = sum(held for _, held in modules[MODULES:])
        lines.append(f"  {f'{len(modules) - MODULES} others':{width}} {size(rest):>10}")
    lines += ["", "The step, phase by phase:"]
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER):
        at = recording.most_in(phase)
        if at is not None:
            lines.append(f"  {phase.value:10} {size(recording.live_at(at)):>10} at most, {_place(recording, at)}")
    counted = ((said, "once" if times == 1 else f"{times} times") for said, times in recording.assumptions.items())
    lines += ["", *(f"Assumed {often}: {said}." for said, often in counted)]
    lines += [f"{note[0].upper()}{note[1:]}." for note in recording.notes]
    lines += unknown(recording)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines.append(f"Recorded in {duration(recording.seconds)}; this process has taken {size(most)} of memory at most.")
    return "\n".join(lines) + "\n"


def sent(recording: Recording) -> str:
    """The messages of a step, by kind and axis of the mesh."""
    lines = [
        f"  {kind:14} {count:>6,} of {size(nbytes):>10} in all, {axis}"
        for (kind, axis), (count, nbytes) in recording.messages.items()
    ]
    return "\n".join(["Messages of this rank in a step, by the axis of the mesh:", *lines]) + "\n" if lines else ""


def unknown(recording: Recording) -> list[str]:
    """A sentence on each part of CUDA's kernels that the recording does not know, where it has such kernels."""
    if recording.account.device != "cuda":
        return []
    names = {kernel.name for kernel in recording.ledger.kernels}
    return [said for part, said in UNKNOWN.items() if any(part in name for name in names)]


def timed(time: RecordedTime, gpu: str, plan: Plan, *, alone: bool) -> str:
    """The step's time in words, by what takes it."""
    low, high = (duration(time.seconds * factor) for factor in time.spread)
    lines = [
        f"A step takes {duration(time.seconds)} on {gpu} by its kernels (a model: {low} to {high} in nine runs of "
        f"ten), an MFU of {time.mfu:.1%} of its {plan.product_dtype} peak."
        + ("" if alone else " Messages to other ranks are left out.")
    ]
    lines += [f"  {part:14} {duration(seconds):>10}" for part, seconds in time.parts.items() if seconds]
    return "\n".join(lines) + "\n"


def _place(recording: Recording, at: int) -> str:
    where, line = recording.ledger.events[at].where, recording.lines[at]
    said = f"in {where.phase} of {where.module or 'the step itself'} ({where.op})"
    return said + (f", {line}" if line is not None else "")


def _source(recording: Recording, at: int) -> list[str]:
    """The statement itself."""
    line = recording.lines[at]
    text = linecache.getline(line.file, line.number).strip() if line is not None else ""
    return [f"    {text}"] if text else []


def _plain(recording: Recording, answer: RecordedEstimate) -> dict[str, Any]:
    line = recording.peak_line
    return answer.memory.to_dict() | {
        "time": answer.to_dict()["time"],
        "parameters_number": recording.parameters,
        "line": None if line is None else {"file": line.file, "line": line.number},
        "modules": recording.modules,
        "assumptions": {str(said): times for said, times in recording.assumptions.items()},
        "notes": list(recording.notes),
        "messages": [
            {"kind": kind, "axis": axis, "count": count, "bytes": nbytes}
            for (kind, axis), (count, nbytes) in recording.messages.items()
        ],
        "seconds": recording.seconds,
    }
