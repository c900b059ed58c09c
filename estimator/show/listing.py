"""estimate list: the names that the other commands take."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from estimator.describe.families import family_groups
from estimator.describe.presets import preset_groups
from estimator.hardware.accelerators import accelerator, accelerators
from estimator.hardware.networks import networks
from estimator.show.commands import Parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WHAT = ("models", "families", "accelerators", "networks")


def run(argv: Sequence[str]) -> int:
    """`estimate list [models|families|accelerators|networks]`."""
    parser = Parser(
        prog="estimate list", description="Print the names that the other commands take.", allow_abbrev=False
    )
    parser.add_argument("what", nargs="?", choices=WHAT, help="only these (default: all)")
    wanted = parser.parse_args(argv).what
    for what in WHAT:
        if wanted in (None, what):
            rows = "".join(f"  {group}: {', '.join(names)}\n" for group, names in _groups(what).items())
            sys.stdout.write(f"{what}:\n{rows}")
    return 0


def _groups(what: str) -> Mapping[str, Sequence[str]]:
    if what == "models":
        return preset_groups()
    if what == "families":
        return family_groups()
    if what == "networks":
        return {"between nodes": networks()}
    vendors: dict[str, list[str]] = {}
    for id_ in accelerators():
        vendors.setdefault(accelerator(id_).vendor, []).append(id_)
    return vendors
