"""docs/recorder.md, from the results of `tools/check_recorder.py table` on file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Row = dict[str, Any]


def key(name: str, size: tuple[int, int], recipe: str) -> str:
    """What tells one comparison from another."""
    return f"{name} | {size[0]} x {size[1]} | {recipe}"


def on_file(file: Path) -> dict[str, Row]:
    """The last result of each comparison."""
    if not file.exists():
        return {}
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {key(r["module"], (r["batch_size"], r["seq_len"]), r["recipe"]): r for r in rows}


def report(file: Path, formed: Path, symbolic: Path, laid_out: Path) -> str:
    """The page: the comparisons with real steps, of our own with the symbolic step, and of closed forms."""
    rows = list(on_file(file).values())
    modules: dict[str, list[Row]] = {}
    for row in rows:
        modules.setdefault(row["module"], []).append(row)
    done = [r for r in rows if "differences" in r]
    equal = [r for r in done if not any(r["differences"].values())]
    events = [r for r in equal if r["first"] is None]
    said = (
        f"{len(equal)} of {len(rows)} comparisons of {len(modules)} modules are equal; in {len(events)} of them each "
        "allocation and each free of the step is, too."
    )
    how = (
        "Written by `python tools/check_recorder.py report` from `validation/recorder.jsonl`, where "
        "`python tools/check_recorder.py table` keeps what it found. Each line is a module at three sizes (2 sequences "
        "of 40 tokens, 3 of 24, 1 of 63) and with several recipes, the first of which is AdamW's loop in fp32. A "
        "comparison is equal if four figures are, to the byte: the peak, what autograd saves in a forward, the "
        "parameters and the optimizer's state. The judge of the peak is the profiler, and of what is saved "
        "`saved_tensors_hooks`, both in a real step on a CPU with torch "
        f"{', '.join(sorted({r['torch'] for r in rows}))}, oneDNN off and one thread."
    )
    lines = [
        "# The recorder against real steps",
        "",
        how,
        "",
        said,
        "",
        *_routed([r for r in done if "own_routing" in r]),
        "| module | equal | every event | recipes | assumed | what differs |",
        "|---|---:|---:|---|---:|---|",
    ]
    lines += [_line(name, own) for name, own in modules.items()]
    return "\n".join([*lines, *_symbolic(symbolic), *_layouts(laid_out), *_forms(formed)]) + "\n"


def _routed(rows: Sequence[Row]) -> list[str]:
    """What was assumed of routers, and how far off it is where they choose for themselves."""
    if not rows:
        return []
    off = [r for r in rows if r["own_routing"]]
    largest = max(off, key=lambda r: abs(r["own_routing"]) / r["peak"], default=None)
    said = (
        f"{len(rows)} of them have experts whose rows follow from what a router chooses, which a recording does not "
        "know: it deals the choices out evenly, and says so with the line. The real step's choices are then dealt out "
        "likewise, so that like is compared with like: what is equal is the mechanism, given the assumption. With the "
        f"choices of the router itself, at random weights, {len(rows) - len(off)} of the {len(rows)} real steps have "
        "the recording's peak all the same"
    )
    if largest is not None:
        share = largest["own_routing"] / (largest["peak"] - largest["own_routing"])
        said += f"; of the others {largest['module']} is furthest off ({largest['own_routing']:+,} bytes, {share:+.1%})"
    return [said + ".", ""]


def _symbolic(file: Path) -> list[str]:
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return ["", "# The recorder against the symbolic step", *(line for row in rows for line in ("", _drawn(row)))]


def _drawn(row: Row) -> str:
    seeds, refused = row["seeds"], row["refused"]
    equal = ", ".join(f"{what} {count}" for what, count in row["equal"].items() if what != "events")
    own = "" if row["device"] == "cpu" else f" --device {row['device']}"
    last = (
        f"; in {row['equal']['events']} of them each allocation and each free is, too (what never makes a peak "
        "the symbolic step leaves out in places: the scalars of a norm, a loss over one class)."
        if row["device"] == "cpu"
        else ". No card was there: the dispatcher was told of one. What attention's kernels need is one rule of both."
    )
    how = f"`python tools/check_recorder.py recipes {seeds}{own} --keep` draws decoders and recipes of ours, by seed: "
    what = (
        "every part with every other, in every precision, optimizer, loss and checkpointing. Each is recorded, and "
        f"executed symbolically; the two share no code. Of {seeds - refused} draws ({refused} refused) are equal, to "
        f"the byte: {equal}{last}"
    )
    return how + what


def _layouts(file: Path) -> list[str]:
    if not file.exists():
        return []
    rows = {(r["layout"], r["device"]): r for r in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    said = (
        "`python tools/check_recorder.py layouts N --device DEVICE --keep` draws layouts of ours, by seed, and records "
        "their first and last rank, each alone, in a world whose other ranks are not there. Compared with the account "
        "of that rank, which the symbolic step makes: bytes of the peak, of parameters and of states, and of each kind "
        "of message how many and bytes in all. What the trainer refuses on CUDA is offload."
    )
    lines = ["", "## Layouts", "", said, ""]
    lines += ["| layout | ranks | whose rules | compared | equal | refused |", "|---|---:|---|---:|---:|---:|"]
    lines += [
        f"| {r['layout']} | {r['ranks']} | {r['device']} | {r['compared']} | {r['equal']} | {r['refused']} |"
        for r in rows.values()
    ]
    return lines


def _forms(file: Path) -> list[str]:
    rows = {r["module"]: r for r in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    said = (
        "`python tools/check_recorder.py forms` fits `trainer.closed_forms` to recordings at small sizes and holds "
        "each form against a real step, under the profiler, at sizes that nothing was fitted to."
    )
    lines = ["", "# Closed forms against real steps", "", said, ""]
    lines += ["| module | letters | recordings | sizes not used | closed form, bytes | real step, bytes |"]
    lines += ["|---|---|---:|---|---:|---:|"]
    for name, row in rows.items():
        unseen = ", ".join(f"{x} = {v}" for x, v in row["unseen"].items())
        own = f"{', '.join(row['sizes'])} | {row['recordings']} | {unseen}"
        lines.append(f"| {name} | {own} | {row['form']:,} | {row['real']:,} |")
    return lines


def _line(name: str, rows: Sequence[Row]) -> str:
    done = [r for r in rows if "differences" in r]
    equal = [r for r in done if not any(r["differences"].values())]
    events = sum(r["first"] is None for r in equal)
    recipes = len({r["recipe"] for r in rows})
    assumed = max((r["assumed"] for r in done), default=0)
    said: dict[str, int] = {}
    for row in rows:
        what = _difference(row)
        if what:
            said[what] = said.get(what, 0) + 1
    why = "; ".join(f"{what} ({count} of {len(rows)})" for what, count in said.items())
    return f"| {name} | {len(equal)} of {len(rows)} | {events} | {recipes} | {assumed} | {why} |"


def _difference(row: Row) -> str:
    """What is not equal, in words; empty if nothing is."""
    if "error" in row:
        return row["error"].replace("|", "/").rpartition("site-packages/")[2][:160]
    return ", ".join(f"{what} {off:+,}" for what, off in row["differences"].items() if off)
