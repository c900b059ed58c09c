"""What a predicted time rests on beside the plan, each with what another choice would change."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from estimator.accounting.accounts import account, sizes_for
from estimator.describe.run import WIDE
from estimator.hardware.accelerators import cluster
from estimator.hardware.networks import network, slowest
from estimator.timing.kernels import FUSED
from estimator.timing.mesh import between
from estimator.timing.roofline import efficiency
from estimator.timing.speed import FUSED_ATTENTION, Setup, shape_of, step_times

if TYPE_CHECKING:
    from collections.abc import Mapping

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator


@dataclass(frozen=True, slots=True)
class Assumption:
    """One of the things that a predicted time rests on.

    Attributes:
        name: what it is about.
        value: what was taken.
        origin: who said so: "given", "assumed", or where it comes from.
        others: other values, each with the change of a step's time that it would bring, as a part of it: -0.09 is a
            step that is 9 % shorter.
    """

    name: str
    value: str
    origin: str
    others: Mapping[str, float]

    def __str__(self) -> str:
        """Return a line: network between nodes: 12.5 GB/s (assumed; 9 % less with 25 GB/s)."""
        others = [f"{changed} with {value}" for changed, value in self._changed()]
        return f"{self.name}: {self.value} ({'; '.join((self.origin, *others))})"

    def changes(self) -> list[str]:
        """Each other value with what it would change: 25 GB/s: 9 % less."""
        return [f"{value}: {changed}" for changed, value in self._changed()]

    def _changed(self) -> list[tuple[str, str]]:
        found = []
        for value, change in self.others.items():
            percent = round(abs(change) * 100)
            found.append((f"{percent} % {'more' if change > 0 else 'less'}" if percent else "the same", value))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        return asdict(self) | {"others": dict(self.others)}


def assumptions(m: ModelConfig, p: Plan, a: Accelerator, setup: Setup) -> tuple[Assumption, ...]:
    """What carries the predicted time of a step and is not in the plan.

    Args:
        m: what is trained.
        p: how, on `p.accelerators` of them.
        a: the accelerator.
        setup: what was said beside the plan.

    Raises:
        ConfigError: as for `estimator.timing.speed.step_times`.
    """
    setup = setup.of(p)
    own, shape = setup.stack_factor, shape_of(sizes_for(m, p, threads=1), p)

    def seconds(changed: Setup) -> float:
        spent = step_times(m, p, a, replace(changed, stack_factor=None))
        return sum(float(x[0]) for x in (spent if own is None else own.by_parts(spent, shape)).values())

    now = seconds(setup)

    def others(changed: Mapping[str, Setup]) -> dict[str, float]:
        return {value: seconds(other) / now - 1 for value, other in changed.items()}

    found = []
    e = efficiency(a)
    fused = account(m, p, a.device).fused_kernel
    if fused in FUSED_ATTENTION:
        kernel = setup.kernel(fused, e) or e.attention
        timed = {name: replace(setup, attention=name) for name in e.flash if name != kernel}
        version = "" if setup.torch_version is None else f" {setup.torch_version[0]}.{setup.torch_version[1]}"
        origin = "given" if setup.attention else f"as PyTorch{version} picks"
        found.append(Assumption("attention kernel", kernel, origin, others(timed)))
    plain, merged = "eager, one launch each", "fused by torch.compile"
    if p.compile:
        found.append(Assumption("elementwise kernels", merged, "given", {}))
    else:
        compiled = replace(setup, variant=replace(setup.variant, fused=FUSED.fused))
        found.append(Assumption("elementwise kernels", plain, "given", others({merged: compiled})))
    if p.product_dtype in ("bf16", "fp16"):
        wide = " and ".join(sorted(setup.variant.wide)) or "nothing"
        more = {} if setup.variant.wide else {" and ".join(WIDE): frozenset(WIDE)}
        changed = {name: replace(setup, variant=replace(setup.variant, wide=parts)) for name, parts in more.items()}
        origin = "given" if setup.variant.wide else "assumed, as the trainer here"
        found.append(Assumption("computed in fp32", wide, origin, others(changed)))
    group = cluster(a, p.accelerators, between=between(a, setup.network))
    if group.nodes > 1:
        assert group.between is not None
        rates = {f"{x * group.between / 1e9:g} GB/s": replace(setup, network=x * group.between) for x in (0.5, 2)}
        origin = network(setup.network).source if setup.network is not None else "assumed"
        value = f"{group.between / 1e9:g} GB/s an accelerator"
        found.append(Assumption("network between nodes", value, origin, others(rates)))
    if group.count > 1:
        part = slowest(group.count, setup.deviation)
        origin = "timed on other GPUs" if setup.deviation is None else "given"
        alike = {"all alike": replace(setup, deviation=0.0)}
        found.append(Assumption("the slowest accelerator", f"{part:.1%} behind", origin, others(alike)))
    if p.data_parallel > 1:
        while_, after = "while backward goes on", "when backward is over"
        value, other = (while_, after) if setup.overlap else (after, while_)
        origin = "as DDP does" if setup.overlap else "given"
        change = others({other: replace(setup, overlap=not setup.overlap)})
        found.append(Assumption("gradients are summed", value, origin, change))
    if a.boost_clock is not None:
        clock = e.clock * a.boost_clock if setup.clock is None else setup.clock
        slower = {f"{0.9 * clock / 1e6:,.0f} MHz": replace(setup, clock=0.9 * clock)}
        usual = "the datasheet's" if e.clock == 1 else "timed on this card"
        origin = usual if setup.clock is None else "given"
        found.append(Assumption("clock", f"{clock / 1e6:,.0f} MHz", origin, others(slower)))
    if own is not None:
        spent = step_times(m, p, a, replace(setup, stack_factor=None))
        factor = sum(float(x[0]) for x in own.calibrated(spent, shape).values()) / sum(
            float(x[0]) for x in spent.values()
        )
        found.append(Assumption("factor of your stack", f"{factor:.3f}", own.source, {"none": 1 / factor - 1}))
    return tuple(found)
