"""Step times out of a training log, and what they say of a stack: measured over predicted, with its spread.

Read are a plain column of numbers, the trainer's metrics.jsonl, transformers' trainer_state.json, and the console lines
of torchtitan, Megatron-LM and nanoGPT. Needs no torch.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import statistics
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import sizes_for
from estimator.describe.catalogue import number
from estimator.describe.checks import ConfigError
from estimator.timing.intervals import regime
from estimator.timing.roofline import PARTS
from estimator.timing.speed import shape_of, step_times
from estimator.timing.stack import NINE_OF_TEN, Logged, Of, Shape, StackFactor, most_telling

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from estimator.answers.estimates import Estimate

LEAST = 3  # steps that a median needs
KNOWN = 0.6  # a factor is known whose deviation is below so much of what it was beforehand
NODE = 8  # by so many fewer or more accelerators messages differ
SMALL = 0.03  # a part of a step too small to be told apart
WARM = 1.5  # a first step longer than so many medians is warming up
LOG_LIMIT = 50_000_000  # bytes; a larger log is cut before it is given
# Words for what a figure is: seconds of a step, or tokens per second of one accelerator or of the job.
SECONDS, PER_ACCELERATOR, OF_THE_JOB = "seconds", "tokens/s of one accelerator", "tokens/s of the job"
COLUMNS = {
    "seconds": SECONDS,
    "step_time": SECONDS,
    "step_seconds": SECONDS,
    "step_time_s": SECONDS,
    "iteration_time_s": SECONDS,
    "tokens_per_second": OF_THE_JOB,
    "tokens_per_s": OF_THE_JOB,
    "train_tokens_per_second": OF_THE_JOB,
    "tokens_per_second_per_gpu": PER_ACCELERATOR,
    "tokens_per_s_per_gpu": PER_ACCELERATOR,
    "tps": PER_ACCELERATOR,
}
NUMBER = r"([\d,]+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
LINES = {  # the console lines of a trainer: what the figure is, its unit in seconds or tokens/s, and where it is
    "torchtitan": (PER_ACCELERATOR, 1.0, re.compile(rf"\bstep:\s*\d+.*?\btps:\s*{NUMBER}")),
    "Megatron-LM": (SECONDS, 1e-3, re.compile(rf"iteration\s+\d+.*?elapsed time per iteration \(ms\):\s*{NUMBER}")),
    "nanoGPT": (SECONDS, 1e-3, re.compile(rf"\biter\s+\d+:.*?\btime\s+{NUMBER}\s*ms")),
}
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Log:
    """What a log says of its steps.

    Attributes:
        format: whose log it is.
        what: `SECONDS`, `PER_ACCELERATOR` or `OF_THE_JOB`.
        values: one a step (or a line of several steps).
        together: steps that a single value is the mean of.
    """

    format: str
    what: str
    values: tuple[float, ...]
    together: int = 1

    @property
    def steps(self) -> int:
        """How many were measured, at least."""
        return len(self.values) * self.together

    def seconds(self, tokens: float, count: int) -> tuple[float, ...]:
        """Seconds of each step, of `tokens` tokens of the whole job on `count` accelerators, the warm ones alone."""
        rate = {PER_ACCELERATOR: count, OF_THE_JOB: 1}
        found = [x if self.what == SECONDS else tokens / (x * rate[self.what]) for x in self.values]
        middle = statistics.median(found)
        while len(found) > LEAST and found[0] > WARM * middle:
            del found[0]
        return tuple(found)


def read_log(path: str | Path) -> Log:
    """The steps of a log.

    Raises:
        ConfigError: it cannot be read, is in no known format, or has fewer than three steps.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LOG_LIMIT + 1)
    except OSError as error:
        raise ConfigError(f"log = {str(path)!r}: cannot be read ({error.strerror})") from None
    if len(content) > LOG_LIMIT:
        raise ConfigError(f"log = {str(path)!r}: must be at most {LOG_LIMIT:,} bytes; give the last lines of it")
    text = COLOUR.sub("", content.decode("utf-8", errors="replace"))
    readers: tuple[Callable[[str], Log | None], ...] = (_trainer_state, _metrics, _console, _column)
    for reader in readers:
        found = reader(text)
        if found is not None:
            break
    else:
        known = ", ".join(LINES)
        raise ConfigError(
            f"log = {str(path)!r}: no steps found; known are a column of seconds, metrics.jsonl, trainer_state.json "
            f"and the lines of {known}"
        )
    values = tuple(number("log", x, above=True) for x in found.values)
    if found.steps < LEAST:
        raise ConfigError(f"log = {str(path)!r}: {found.steps} steps of {found.format}; at least {LEAST} are needed")
    return replace(found, values=values)


def _figures(format_: str, records: Iterable[Mapping[str, Any]]) -> Log | None:
    """The first of `COLUMNS` that the records have."""
    kept = [r for r in records if isinstance(r, dict)]
    for name, what in COLUMNS.items():
        values = [float(r[name]) for r in kept if isinstance(r.get(name), int | float)]
        if values:
            return Log(format_, what, tuple(values))
    return None


def _trainer_state(text: str) -> Log | None:
    """transformers' trainer_state.json: its log_history.

    Its lines carry a rate where TrainingArguments asks for one, else no time at all but the last's, which is the mean
    of all steps (`speed_metrics` in trainer_utils.py).
    """
    try:
        state = json.loads(text)
    except ValueError:
        return None
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        return None
    history = [x for x in state["log_history"] if isinstance(x, dict)]
    found = _figures("transformers", history)
    if found is not None:
        return found
    timed = [(x["step"], x["train_runtime"]) for x in history if "step" in x and "train_runtime" in x]
    pairs = itertools.pairwise(timed)
    values = [(t1 - t0) / (s1 - s0) for (s0, t0), (s1, t1) in pairs if s1 > s0 and t1 > t0]
    if values:
        return Log("transformers", SECONDS, tuple(values))
    rate, steps = (
        next((x[name] for x in history[::-1] if x.get(name)), None) for name in ("train_steps_per_second", "step")
    )
    return Log("transformers", SECONDS, (1 / rate,), steps) if rate and isinstance(steps, int) else None


def _metrics(text: str) -> Log | None:
    """One JSON object a line, as the trainer here writes them."""
    records = []
    for line in text.splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return _figures("metrics.jsonl", records)


def _console(text: str) -> Log | None:
    for name, (what, unit, pattern) in LINES.items():
        values = [unit * float(x.replace(",", "")) for x in pattern.findall(text)]
        if values:
            return Log(name, what, tuple(values))
    return None


def _column(text: str) -> Log | None:
    """Numbers, one a line, of seconds; or a table with a header that says what they are."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        return None
    try:
        return Log("a column", SECONDS, tuple(float(line) for line in lines))
    except ValueError:
        pass
    reader = csv.DictReader(lines, delimiter="\t" if "\t" in lines[0] else ",")
    for name in reader.fieldnames or ():
        if name.strip() in COLUMNS:
            try:
                values = tuple(float(row[name]) for row in reader)
            except (ValueError, TypeError):
                return None
            return Log("a table", COLUMNS[name.strip()], values)
    return None


# ---- the factor


def logged(log: Log, r: Estimate, source: str) -> Logged:
    """What the log's steps take, beside what was predicted for them.

    Args:
        log: of a run.
        r: its prediction, without any factor.
        source: what to call the log.
    """
    time = r.time
    assert time is not None
    measured = log.seconds(time.tokens_per_second * time.seconds_per_step, time.count)
    # The deviation of a median of n values of a normal distribution is sqrt(pi / 2n) of theirs.
    several = len(measured) > 1
    spread = statistics.stdev(map(math.log, measured)) * math.sqrt(math.pi / 2 / len(measured)) if several else 0.0
    parts = tuple(time.parts[name] for name in PARTS)
    shape = shape_of(sizes_for(r.model, r.plan, threads=1), r.plan)
    return Logged(shape, parts, statistics.median(measured), spread, len(measured) * log.together, source)


def explanation(found: StackFactor, r: Estimate) -> str:
    """What the last log says, and where a factor can come from.

    Args:
        found: of all logs.
        r: the prediction for the last one, without any factor.
    """
    time = r.time
    assert time is not None
    assert time.spread is not None
    last = found.runs[-1]
    said = [
        f"Measured steps take {last.measured:.4g} s, {last.ratio:.3f} of the predicted {time.seconds_per_step:.4g} s."
    ]
    if time.spread[0] <= last.ratio <= time.spread[1]:
        said.append("That is within what published runs of other stacks show.")
    count = len(found.runs)
    said.append(f"By part, after {count} logged run{'s' if count > 1 else ''}, nine stacks of ten in brackets:")
    apart = True
    for name, (factor, now, before) in found.factors().items():
        share = time.parts[name] / time.seconds_per_step
        low, high = (factor * math.exp(side * NINE_OF_TEN * now) for side in (-1, 1))
        known = now < KNOWN * before
        apart &= known or share < SMALL
        said.append(
            f"  {name}, {share:.0%} of the prediction: {factor:.2f} of it ({low:.2f} to {high:.2f})"
            + ("" if known else ", hardly known")
        )
    if not apart:
        said.append(
            "Logs of other sizes tell the parts apart: another batch, sequence or number of nodes, each given with "
            "--stack-factor and what was written before."
        )
    said += telling(found, r)
    low, high = found.spread(time.parts, last.shape)
    said.append(f"Carried into further predictions; of this run, within {low:.2f} to {high:.2f} of it.")
    said.append(f"The step is {regime(time.parts)}.")
    said += [f"{assumption}." for assumption in r.assumptions if assumption.origin != "given"]
    return "\n".join(said)


def telling(found: StackFactor, r: Estimate) -> list[str]:
    """A sentence: which run near the last one, that needs no more memory, would tell most of all of them."""
    m, p = r.model, r.plan
    p = p.replace(grad_accumulation=-(-r.flops.sequences // (p.batch_size * p.data_parallel)))
    half, quarter, tokens = p.batch_size // 2, p.batch_size // 4, p.tokens(m) // 2
    near = {
        f"a micro-batch of {half}": {"batch_size": half},
        f"a micro-batch of {quarter}": {"batch_size": quarter},
        f"sequences of {tokens:,} tokens": {"seq_len": tokens},
        f"{p.accelerators // NODE:,} accelerators": {"data_parallel": p.data_parallel // NODE},
        f"{NODE * p.accelerators:,} accelerators": {"data_parallel": NODE * p.data_parallel},
    }
    runs: dict[str, Of] = {}
    for words, changes in near.items():
        try:
            plan = p.replace(**changes)
            spent = step_times(m, plan, r.accelerator, replace(r.setup, stack_factor=None))
            shape = shape_of(sizes_for(m, plan, threads=1), plan)
        except ConfigError:  # not a whole number of them, or not for this model and plan
            continue
        runs[words] = shape, tuple(float(spent[name][0]) for name in PARTS)
    if not runs:
        return []
    best = most_telling(list(runs.values()), 1, [(run.shape, run.parts) for run in found.runs])[0]
    return [f"Of runs near this one, one with {list(runs)[best]} would tell most, if you can log it."]


def save(found: StackFactor, path: str | Path) -> None:
    """Write a factor as TOML: the runs that it follows from.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = ["# By `estimate calibrate --log`: measured runs beside their predicted seconds by part.\n"]
    for run in found.runs:
        plain = {name: getattr(run, name) for name in ("measured", "spread", "steps", "source")}
        lines.append("\n[[runs]]\n")
        lines += [f"{name} = {json.dumps(value, allow_nan=False)}\n" for name, value in plain.items()]
        for name, names, values in (("shape", Shape._fields, run.shape), ("parts", PARTS, run.parts)):
            inside = ", ".join(f"{key} = {x!r}" for key, x in zip(names, values, strict=True))
            lines.append(f"{name} = {{ {inside} }}\n")
    try:
        Path(path).write_text("".join(lines), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out = {str(path)!r}: cannot be written ({error.strerror})") from None


def load(path: str | Path) -> StackFactor:
    """A factor as `estimate calibrate --log` wrote it.

    Raises:
        ConfigError: the file cannot be read, or is not what that command writes.
    """
    try:
        runs = tomllib.loads(Path(path).read_text(encoding="utf-8"))["runs"]
        found = tuple(
            Logged(
                Shape(*(number(name, run["shape"][name], above=True) for name in Shape._fields)),
                tuple(number(name, run["parts"][name]) for name in PARTS),
                number("measured", run["measured"], above=True),
                number("spread", run["spread"]),
                int(run["steps"]),
                str(run["source"]),
            )
            for run in runs
        )
        if not found or any(sum(run.parts) <= 0 for run in found):
            raise ValueError("no run with predicted seconds")  # noqa: TRY301 - said below with the file's name
    except OSError as error:
        raise ConfigError(f"stack_factor = {str(path)!r}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"stack_factor = {str(path)!r}: is not what `estimate calibrate --log` writes ({error})"
        ) from None
    return StackFactor(found)
