"""What `tools/device_check.py` measured of a card, as a profile of it: `estimate MODEL --gpu device.toml`.

Each part of what is on file for the card is moved by the middle of how far its predictions are off. What the check does
not measure, links and the network, stays as it is. Needs no torch.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from estimator.describe.catalogue import to_toml
from estimator.timing.roofline import efficiency

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from estimator.hardware.accelerators import Accelerator
    from estimator.studies.device import Difference
    from estimator.timing.roofline import Flash

ALIGNED = 8  # elements of 16 bits that begin where every kernel can read them


def faster(rows: Sequence[Difference]) -> float:
    """How many times as fast as predicted the card is, the middle of some figures; 1 where there are none."""
    found = [r.predicted / r.measured for r in rows if r.predicted is not None and r.predicted > 0]
    return median(found) if found else 1.0


def _odd(what: str) -> bool:
    """Whether a product ("x w^T 8192 x 1024 x 50257 bfloat16") has a dimension at which rows begin at odd places."""
    return any(int(word) % ALIGNED for word in what.split() if word.isdigit())


def profile(found: Mapping[str, Any], a: Accelerator, rows: Sequence[Difference]) -> str:
    """A profile in TOML.

    Args:
        found: the file of the check.
        a: the card, which is in the catalogue.
        rows: its figures beside their predictions.
    """
    e = efficiency(a)

    def of(section: str, kept: Callable[[str], bool] = bool) -> float:
        return faster([r for r in rows if r.section == section and kept(r.what)])

    half = of("products", lambda what: "float32" not in what and not _odd(what))
    odd = of("products", lambda what: "float32" not in what and _odd(what))
    moving = of("operators")
    flash = {name: _flash(kernel, name, rows) for name, kernel in e.flash.items()}
    host = found["host"]
    measured = replace(
        e,
        origin=f"Measured by tools/device_check.py on {found['date']} with PyTorch {found['torch']}; links as before: "
        f"{e.origin}",
        matmul=min(half * e.matmul, 1.0),
        single=min(of("products", lambda what: "float32" in what) * e.single, 1.0),
        unaligned=min(odd / half * e.unaligned, 1.0),
        memory=tuple((at, moving * fraction) for at, fraction in e.memory),
        walk={name: moving * rate for name, rate in e.walk.items()},
        flash=flash,
        host=host["with_backward"],
        checkpoint=host["checkpoint"],
    )
    calibration = {name: _plain(value) for name, value in asdict(measured).items()}
    fields = {name: value for name, value in a.to_dict().items() if name not in ("id", "aliases", "profile")}
    return to_toml({**fields, "name": f"{a.name}, measured", "calibration": calibration}) + "\n"


def _flash(kernel: Flash, name: str, rows: Sequence[Difference]) -> Flash:
    """A fused attention at the speed at which it was timed, forward and with backward."""
    timed = [r for r in rows if r.section == "attention" and r.what.startswith(f"{name} ")]
    forward, both = (faster([r for r in timed if r.what.endswith(way)]) for way in ("forward", "both"))
    return replace(
        kernel,
        forward=tuple(min(forward * x, 1.0) for x in kernel.forward),
        backward=tuple(min(both * x, 1.0) for x in kernel.backward),
    )


def _plain(value: Any) -> Any:
    """For TOML: tuples as lists."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, tuple | list) else value
