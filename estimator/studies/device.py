"""What a person's card did (`tools/device_check.py`) beside what is predicted for it: a table of differences.

    validate-estimates --import device.json     (or python -m estimator.studies.device device.json)

Needs no torch: the file may come from another machine. Bytes are compared by that device's own rules; seconds where the
card is in the catalogue, or a profile is given.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.accounting.accounts import account, sizes_for
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.eager import letters
from estimator.eager.ledger import Gemm, Phase
from estimator.eager.letters import ONE, ZERO
from estimator.eager.tensor import BFLOAT16, FLOAT32
from estimator.hardware.accelerators import accelerator
from estimator.memory.device import memory
from estimator.studies.device_profile import profile
from estimator.studies.operators import SIZES, Timed, predicted_seconds
from estimator.timing.kernels import Row, Table
from estimator.timing.roofline import efficiency, kernel_seconds
from estimator.timing.speed import step_times

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.hardware.accelerators import Accelerator

FILE_LIMIT = 20_000_000  # bytes
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Difference:
    """One figure: what was measured there and what is predicted here; None where nothing can be."""

    section: str
    what: str
    measured: float
    predicted: float | None

    @property
    def error(self) -> float | None:
        """Predicted over measured, less 1."""
        return None if self.predicted is None else self.predicted / self.measured - 1


def read(path: str | Path) -> dict[str, Any]:
    """A file of `tools/device_check.py`.

    Raises:
        ConfigError: it cannot be read, or is another file.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(FILE_LIMIT + 1)
        found = json.loads(content) if len(content) <= FILE_LIMIT else None
    except OSError as error:
        raise ConfigError(f"import = {str(path)!r}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"import = {str(path)!r}: is not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("kind") != "device_check":
        raise ConfigError(f"import = {str(path)!r}: must be a file that tools/device_check.py wrote")
    return found


def card(found: dict[str, Any], gpu: str | None = None) -> Accelerator | None:
    """The accelerator of a file: as given, else by its driver's name; None where it is unknown."""
    if gpu is not None:
        return accelerator(gpu)
    try:
        return accelerator(found["name"]) if found["device"] == "cuda" else None
    except ConfigError:
        return None


def differences(found: dict[str, Any], a: Accelerator | None) -> Iterator[Difference]:
    """Every figure of a file beside its prediction."""
    yield from _memory(found, a)
    for row in found["products"]:
        what = f"{row['way']} {row['m']} x {row['k']} x {row['n']} {row['dtype']}"
        yield Difference("products", what, row["seconds"], None if a is None else _product(row, a))
    for row in found["attention"]:
        if "error" not in row:
            for way, share in (("forward", (2,)), ("both", (2, 5))):
                what = f"{row['kernel']} {row['B']} x {row['heads']} x {row['T']} x {row['head_dim']} {way}"
                yield Difference("attention", what, row[way], None if a is None else _attention(row, share, a))
    for row in found["operators"]:
        for way, mode in (("forward", "forward"), ("both", "full")):
            what = f"{row['operator']} {' x '.join(map(str, row['shape']))} {row['dtype']} {way}"
            yield Difference("operators", what, row[way], None if a is None else _operator(row, mode, a))
    for name, seconds in found["host"].items():
        e = None if a is None else efficiency(a)
        predicted = None if e is None else e.checkpoint if name == "checkpoint" else e.host
        yield Difference("host", f"one operator, {name}", seconds, predicted)
    for row in found["steps"]:
        if "error" not in row:
            m, p = ModelConfig(**row["model"]), Plan(**row["plan"])
            what = f"{m.family} {m.num_layers} x {m.d_model}, {p.batch_size} x {p.tokens(m)}, {p.precision}"
            seconds = None if a is None else sum(float(x[0]) for x in step_times(m, p, a).values())
            yield Difference("steps", what, row["seconds"], seconds)


def _memory(found: dict[str, Any], a: Accelerator | None) -> Iterator[Difference]:
    device = found["device"]
    for row in found["memory"]:
        if "error" in row:
            continue
        m, p = ModelConfig(**row["model"]), Plan(**row["plan"])
        sizes = sizes_for(m, p, threads=found["threads"])
        form = account(m, p, device)
        values = form.values(sizes)
        told = {"peak_bytes": values.peak_bytes}
        if device == "cuda":
            held = memory(form, values, sizes, a)
            told |= {"allocated_bytes": held.allocated, "reserved_bytes": held.reserved}
        defaults = Plan()
        changed = [f"{k}={v}" for k, v in p.to_dict().items() if v != getattr(defaults, k)]
        for name, predicted in told.items():
            if row.get(name) is not None:
                yield Difference("memory", f"{m.family}, {', '.join(changed)}: {name}", row[name], predicted)


def _table(rows: list[Row]) -> Table:
    return Table(rows, [(1,)] * len(rows), {}, (), None)


def _product(row: dict[str, Any], a: Accelerator) -> float:
    m, k, n = letters.T, letters.d, letters.f
    sizes = {"T": row["m"], "d": row["k"], "f": row["n"]}
    shape = {"x w^T": (m, n, k), "g w": (m, k, n), "g^T x": (n, k, m)}[row["way"]]
    width = BYTES[row["dtype"]]
    steps = {"x w^T": (k, k, n), "g w": (n, k, k), "g^T x": (n, k, k)}[row["way"]]
    leading = tuple(dict.fromkeys(steps)) if width == 2 else ()
    gemm = Gemm(ONE, *shape)
    nbytes = width * (gemm.m * gemm.k + gemm.k * gemm.n + gemm.m * gemm.n)
    table = _table([Row("matmul", "mm", Phase.FORWARD, "first", gemm, width, nbytes, ZERO, leading=leading)])
    e = efficiency(a)
    try:
        return float(kernel_seconds(table, table.at(sizes), a, e, sizes=sizes).sum()) + e.gap
    except ConfigError:
        return float("nan")


def _attention(row: dict[str, Any], products: tuple[int, ...], a: Accelerator) -> float | None:
    e = efficiency(a)
    if row["kernel"] not in e.flash:
        return None
    b, t, width = letters.h, letters.T, letters.e
    sizes = {"h": row["B"] * row["heads"], "T": row["T"], "e": row["head_dim"]}
    found = []
    for count in products:
        name = "flash_attention" if count == 2 else "flash_attention_backward"
        gemm = Gemm(b, t, t, count * width)
        moved = (4 if count == 2 else 8) * 2 * b * t * width
        found.append(Row("attention", name, Phase.FORWARD, "first", gemm, 2, moved, ZERO))
    table = _table(found)
    seconds = kernel_seconds(table, table.at(sizes), a, e, sizes=sizes, kernel=row["kernel"])
    return float(seconds.sum()) + e.gap * len(found)


def _operator(row: dict[str, Any], mode: str, a: Accelerator) -> float | None:
    name, shape = row["operator"], row["shape"]
    sizes = dict.fromkeys(SIZES, 1)
    if name in ("rms_norm", "layer_norm", "softmax"):
        sizes |= {"T": shape[0], "d": shape[1]}
    else:
        return None  # rope is of queries alone there, and the others are no published operator
    dtype = BFLOAT16 if row["dtype"] == "bfloat16" else FLOAT32
    return predicted_seconds(Timed(name, "torch", mode, "speed", a.id, dtype, sizes, 1.0))


def report(found: dict[str, Any], a: Accelerator | None) -> str:
    """The table of differences, in Markdown: each section's median, then every figure."""
    rows = list(differences(found, a))
    lines = [
        f"# {found['name']}, PyTorch {found['torch']}, {found['date']}\n",
        f"Predicted as {a.id}.\n"
        if a is not None
        else "The card is not in the catalogue: seconds are not predicted.\n",
        "| section | figures | equal | median error | worst |\n|---|---:|---:|---:|---:|",
    ]
    for section in dict.fromkeys(r.section for r in rows):
        errors = [r.error for r in rows if r.section == section and r.error is not None and np.isfinite(r.error)]
        count = sum(r.section == section for r in rows)
        shown = "- | -" if not errors else f"{np.median(np.abs(errors)):.1%} | {np.abs(errors).max():.1%}"
        equal = sum(x == 0 for x in errors)
        lines.append(f"| {section} | {count} | {equal} | {shown} |")
    if found.get("context"):
        held = ", ".join(f"{name} {value:,}" for name, value in found["context"].items())
        lines.append(f"\nBeside tensors: {held}.")
    if found["skipped"]:
        lines.append(f"\nNot finished in time: {', '.join(found['skipped'])}.")
    lines.append("\n| section | what | measured | predicted | error |\n|---|---|---:|---:|---:|")
    for r in rows:
        exact = r.section == "memory"
        both = [f"{x:,.0f} B" if exact else f"{1e3 * x:,.4g} ms" for x in (r.measured, r.predicted) if x is not None]
        error = "" if r.error is None else f"{r.error:+.1%}" if r.error else "equal"
        lines.append(f"| {r.section} | {r.what} | {both[0]} | {both[1] if len(both) > 1 else ''} | {error} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command: print the table, and write it and the file's rows where it is told; 0 when done."""
    parser = argparse.ArgumentParser(
        prog="validate-estimates --import",
        description="A file of tools/device_check.py beside what is predicted for its card.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=Path, help="what tools/device_check.py wrote")
    parser.add_argument("--gpu", help="the accelerator, or a profile (default: by the driver's name)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table, rows and a profile of the card to DIR")
    args = parser.parse_args(argv)
    try:
        found = read(args.file)
        a = card(found, args.gpu)
        text = report(found, a)
    except ConfigError as error:
        parser.error(str(error))
    sys.stdout.write(text)
    if args.out is None:
        return 0
    stem = f"{found['date']}-device-{re.sub(r'[^a-z0-9]+', '-', found['name'].lower()).strip('-')}"
    rows = [
        {"section": r.section, "what": r.what, "measured": r.measured, "predicted": r.predicted}
        for r in differences(found, a)
    ]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{stem}.md").write_text(text, encoding="utf-8")
        (args.out / f"{stem}.json").write_text(
            json.dumps({**found, "rows": rows}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        if a is not None and a.profile is None:
            (args.out / f"{stem}.toml").write_text(profile(found, a, list(differences(found, a))), encoding="utf-8")
            sys.stderr.write(f"A profile of the card: estimate MODEL --gpu {args.out / stem}.toml\n")
    except OSError as error:
        parser.error(f"cannot write {error.filename!r}: {error.strerror}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
