"""Hold the recorder against real steps of other people's modules, and against the symbolic step, on this CPU.

    python tools/check_recorder.py table                 # every module, at three sizes, with its recipes: ten minutes
    python tools/check_recorder.py table --seconds 600   # as much of it as that allows; the same again goes on
    python tools/check_recorder.py table --only bert t5  # some of the modules
    python tools/check_recorder.py report                # docs/recorder.md, from what is on file
    python tools/check_recorder.py recipes 200           # our own models: random decoders and recipes, so many seeds
    python tools/check_recorder.py layouts 10            # ranks of random layouts of ours, each recorded alone
    python tools/check_recorder.py forms                 # closed forms of 14 modules, each at sizes not used

`table` keeps each result in validation/recorder.jsonl as soon as there is one, and leaves out what is there already.
Compared are the peak, what autograd saves, the parameters and the optimizer's state, in bytes, and every event.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

import trainer
from estimator.describe.checks import ConfigError
from trainer.referee.measure import build_step
from trainer.referee.recorder.recording import DEVICES
from trainer.referee.recorder.truth import judged

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "exact"), str(ROOT / "tools")]
from random_parts import draw  # noqa: E402 - a module of the tests
from recorder_cases import prepared, table  # noqa: E402 - lies beside this
from recorder_forms import FORMS  # noqa: E402 - likewise
from recorder_layouts import LAYOUTS, against_account  # noqa: E402 - likewise
from recorder_report import key, on_file, report  # noqa: E402 - likewise
from recorder_symbolic import FIGURES, against_symbolic  # noqa: E402 - likewise

FILE = ROOT / "validation" / "recorder.jsonl"
LAID_OUT = ROOT / "validation" / "recorder_layouts.jsonl"
FORMED = ROOT / "validation" / "recorder_forms.jsonl"
SYMBOLIC = ROOT / "validation" / "recorder_symbolic.jsonl"
Case = tuple[str, tuple[int, int], str]


def compare(seconds: float, only: list[str], *, again: bool) -> bool:
    """Go on with the table; whether all of what was compared now is equal in each of the four figures."""
    until, every, equal = time.monotonic() + seconds, table(), True
    unknown = set(only) - {name for name, _, _ in every}
    if unknown:
        raise SystemExit(f"only = {', '.join(sorted(unknown))}: no module of that name")
    kept = {k: row for k, row in on_file(FILE).items() if not again or _is_equal(row)}
    wanted = [case for case in every if (not only or case[0] in only) and key(*case) not in kept]
    gc.collect()
    gc.freeze()  # each comparison collects garbage several times, and the libraries are none
    for i, case in enumerate(wanted):
        if time.monotonic() > until:
            print(f"{len(wanted) - i} are left.", flush=True)
            break
        row = _row(case)
        equal &= _is_equal(row)
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(key(*case), "equal" if _is_equal(row) else row, flush=True)
    return equal


def _is_equal(row: dict[str, Any]) -> bool:
    return "differences" in row and not any(row["differences"].values())


def _row(case: Case) -> dict[str, Any]:
    name, (B, T), recipe = case
    row: dict[str, Any] = {"module": name, "batch_size": B, "seq_len": T, "recipe": recipe, "torch": torch.__version__}
    try:
        truth = judged(*prepared(*case))
    except Exception as error:  # noqa: BLE001 - whatever it is, it goes into the table
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    if truth.own_routing is not None:
        row["own_routing"] = truth.peak[0] - truth.own_routing
    return row | {
        "peak": truth.peak[1],
        "differences": truth.differences,
        "events": truth.events[1],
        "first": None if truth.first is None else [truth.first, len(truth.runs[1])],
        "assumed": sum(truth.recording.assumptions.values()),
    }


def recipes(count: int, device: str, *, keep: bool) -> bool:
    """Random decoders and recipes of ours: the recorder and the symbolic step; whether all figures are equal."""
    total, refused, alike = 0, 0, Counter[str]()
    for seed in range(count):
        m, p = draw(Random(seed))  # noqa: S311 - no secret
        try:
            recording = trainer.record(lambda m=m, p=p: build_step(m, p, device), device=device)
            found = against_symbolic(m, p, recording)
        except ConfigError as error:
            refused += 1
            print(f"seed {seed}: {error}", flush=True)
            continue
        total += 1
        alike.update(name for name, (ours, theirs) in found.items() if ours == theirs)
        off = {name: pair for name, pair in found.items() if pair[0] != pair[1] and name != "events"}
        if off:
            print(f"seed {seed}: {off} (recorded, symbolic) {m!r} {p!r}", flush=True)
    row = {"device": device, "torch": torch.__version__, "seeds": count, "refused": refused, "equal": dict(alike)}
    if keep:
        others = SYMBOLIC.read_text(encoding="utf-8").splitlines() if SYMBOLIC.exists() else []
        rows = {r["device"]: r for r in map(json.loads, others)} | {device: row}
        SYMBOLIC.write_text("".join(json.dumps(r) + "\n" for r in rows.values()), encoding="utf-8")
    print(f"{total} compared, {refused} refused; equal: {', '.join(f'{n} {alike[n]}' for n in FIGURES)}.")
    return all(alike[name] == total for name in FIGURES if name != "events")


def layouts(count: int, device: str, only: list[str], seed: int, *, keep: bool) -> bool:
    """Ranks of random layouts of ours: the recorder and the symbolic step; whether all figures are equal."""
    unknown = set(only) - set(LAYOUTS)
    if unknown:
        raise SystemExit(f"only = {', '.join(sorted(unknown))}: the layouts are {', '.join(LAYOUTS)}")
    alike = True
    for name in only or LAYOUTS:
        found = against_account(name, range(seed, seed + count), device)
        done = [x for x in found if x.recorded is not None]
        equal = [x for x in done if x.recorded == x.accounted]
        row = {"layout": name, "device": device, "ranks": LAYOUTS[name][0], "torch": torch.__version__}
        row |= {"compared": len(done), "equal": len(equal), "refused": len(found) - len(done)}
        print(row, flush=True)
        for x in (x for x in done if x not in equal):
            alike = False
            print(f"  seed {x.seed} rank {x.rank}: {x.recorded} recorded, {x.accounted} in the account: {x.said}")
        if keep:
            with LAID_OUT.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return alike


def forms(only: list[str]) -> bool:
    """The closed forms of others' modules, each against a real step at sizes not used; whether all peaks are equal."""
    equal = True
    for name, (build, sizes, unseen) in FORMS.items():
        if only and name not in only:
            continue
        began = time.perf_counter()
        found = trainer.closed_forms(build, sizes)
        real = judged(partial(build, **unseen)).peak[1]
        row = {
            "module": name,
            "sizes": sizes,
            "unseen": unseen,
            "recordings": found.points,
            "pieces": len(found.pieces),
        }
        row |= {"torch": torch.__version__, "form": found.evaluate(**unseen), "real": real}
        row["seconds"] = round(time.perf_counter() - began, 1)
        equal &= row["form"] == real
        with FORMED.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(name, row["form"], real, f"{row['seconds']} s", flush=True)
    return equal


def main() -> int:
    """The command; 0 if all are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    tabled = what.add_parser("table", help="recorder against real steps")
    tabled.add_argument("--seconds", type=float, default=7200.0, help="begin no further case after so many")
    tabled.add_argument("--only", nargs="*", default=[], metavar="MODULE")
    tabled.add_argument("--again", action="store_true", help="those that are on file and not equal, too")
    what.add_parser("report", help="write docs/recorder.md")
    drawn = what.add_parser("recipes", help="against the symbolic step")
    drawn.add_argument("count", type=int)
    drawn.add_argument("--device", choices=DEVICES, default="cpu", help="whose rules")
    drawn.add_argument("--keep", action="store_true", help=f"in validation/{SYMBOLIC.name}")
    laid = what.add_parser("layouts", help="ranks of layouts against the symbolic step")
    laid.add_argument("count", type=int, help="random cases of each, the first and the last rank of each")
    laid.add_argument("--device", choices=DEVICES, default="cpu", help="whose rules")
    laid.add_argument("--only", nargs="*", default=[], metavar="LAYOUT")
    laid.add_argument("--seed", type=int, default=0, help="of the first case")
    laid.add_argument("--keep", action="store_true", help=f"in validation/{LAID_OUT.name}")
    formed = what.add_parser("forms", help="closed forms against real steps at sizes not used")
    formed.add_argument("--only", nargs="*", default=[], metavar="MODULE")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if args.what == "report":
        (ROOT / "docs" / "recorder.md").write_text(report(FILE, FORMED, SYMBOLIC, LAID_OUT), encoding="utf-8")
        return 0
    if args.what == "layouts":
        return 0 if layouts(args.count, args.device, args.only, args.seed, keep=args.keep) else 1
    if args.what == "forms":
        return 0 if forms(args.only) else 1
    if args.what == "table":
        return 0 if compare(args.seconds, args.only, again=args.again) else 1
    return 0 if recipes(args.count, args.device, keep=args.keep) else 1


if __name__ == "__main__":
    sys.exit(main())
