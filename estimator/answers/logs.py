"""Step times out of a training log, and what they say of a stack: measured over predicted, with its spread.

Read are a plain column of numbers, the trainer's metrics.jsonl, transformers' trainer_state.json, and the console lines
of torchtitan, Megatron-LM and nanoGPT. Needs no torch.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import statistics
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import number, read_data
from estimator.describe.checks import ConfigError
from estimator.timing.speed import StackFactor, regime

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from estimator.answers.estimates import Estimate
    from estimator.timing.speed import Time

LEAST = 3  # steps that a median needs
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
    """

    format: str
    what: str
    values: tuple[float, ...]

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
    if len(values) < LEAST:
        raise ConfigError(f"log = {str(path)!r}: {len(values)} steps of {found.format}; at least {LEAST} are needed")
    return Log(found.format, found.what, values)


def _figures(format_: str, records: Iterable[Mapping[str, Any]]) -> Log | None:
    """The first of `COLUMNS` that the records have."""
    kept = [r for r in records if isinstance(r, dict)]
    for name, what in COLUMNS.items():
        values = [float(r[name]) for r in kept if isinstance(r.get(name), int | float)]
        if values:
            return Log(format_, what, tuple(values))
    return None


def _trainer_state(text: str) -> Log | None:
    """transformers' trainer_state.json: its log_history, where steps carry a rate; else times between its steps."""
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
    if not values:
        values = [1 / x["train_steps_per_second"] for x in history if x.get("train_steps_per_second")]
    return Log("transformers", SECONDS, tuple(values)) if values else None


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


def stack_factor(log: Log, time: Time, tokens: float, source: str) -> StackFactor:
    """What the log's steps take over what `time` predicts for them.

    The spread is that of the steps themselves and of what published stacks keep of a factor from one configuration to
    another (`data/residuals.toml`, calibrated), whichever is wider.
    """
    measured = log.seconds(tokens, time.count)
    ratios = sorted(x / time.seconds_per_step for x in measured)
    middle = statistics.median(ratios)
    kept = read_data("residuals")["calibrated"]
    low, high = min(ratios[0], kept["low"] * middle), max(ratios[-1], kept["high"] * middle)
    return StackFactor(middle, low, high, len(ratios), source)


def explanation(found: StackFactor, r: Estimate) -> str:
    """Where a factor can come from: what each part would have to take for the prediction to be right."""
    time = r.time
    assert time is not None
    said = [
        (
            f"Measured steps take {found.factor:.3f} of the predicted {time.seconds_per_step:.4g} s "
            f"({found.low:.3f} to {found.high:.3f} is carried into further predictions)."
        )
    ]
    assert time.spread is not None
    if time.spread[0] <= found.factor <= time.spread[1]:
        said.append("That is within what published runs of other stacks show.")
    missing = (found.factor - 1) * time.seconds_per_step
    for name, seconds in sorted(time.parts.items(), key=lambda item: -item[1]):
        wanted = seconds + missing
        if seconds > 0.02 * time.seconds_per_step and wanted > 0:
            share = seconds / time.seconds_per_step
            said.append(
                f"{name}, {share:.0%} of the prediction: alone it would have to take {wanted / seconds:.2f} of it."
            )
    said.append(f"The step is {regime(time.parts)}.")
    said += [f"{assumption}." for assumption in r.assumptions if assumption.origin != "given"]
    return "\n".join(said)


def save(found: StackFactor, path: str | Path) -> None:
    """Write a factor as TOML.

    Raises:
        ConfigError: the file cannot be written.
    """
    lines = [f"{name} = {json.dumps(value, allow_nan=False)}\n" for name, value in asdict(found).items()]
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
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        factor, low, high = (number(name, table[name], above=True) for name in ("factor", "low", "high"))
        return StackFactor(factor, low, high, int(table["steps"]), str(table["source"]))
    except OSError as error:
        raise ConfigError(f"stack_factor = {str(path)!r}: cannot be read ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"stack_factor = {str(path)!r}: is not what `estimate calibrate --log` writes ({error})"
        ) from None
