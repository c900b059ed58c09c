"""What would make a step of one's own code fit: changes that are tried, each by a recording of its own."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from estimator.describe.checks import ConfigError
from estimator.memory.device import recorded_memory
from estimator.show.formatting import size
from trainer.referee.recorder.recording import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from estimator.describe.plan import Plan
    from estimator.hardware.accelerators import Accelerator
    from estimator.memory.device import Memory


CHECKPOINTS, AUTOCAST = "checkpoints of its own", "--precision bf16-mixed"


def checkpointed(build: Callable[[], Any]) -> Callable[[], Any]:
    """The same with the checkpoints that transformers' models have of their own.

    Raises:
        ConfigError: the module has none.
    """

    def built() -> Any:
        found = build()
        module = found[0] if isinstance(found, tuple) else getattr(found, "model", found)
        enable = getattr(module, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ConfigError("the module has no gradient_checkpointing_enable")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers' next release has another name for it
            enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return found

    return built


def remedies(build: Callable[[], Any], plan: Plan, device: str, gpu: Accelerator, without: Memory) -> Iterator[str]:
    """A sentence of each change: what the step needs with it, and whether it fits; `without` is that of no change."""
    lasting = without.parameters + without.optimizer  # which checkpoints and autocast leave as they are
    kept = without.capacity is not None and lasting > without.capacity
    changes: list[tuple[str, Callable[[], Any], Plan]] = [(CHECKPOINTS, checkpointed(build), plan)]
    if plan.precision == "fp32":
        changes.append((AUTOCAST, build, plan.replace(precision="bf16-mixed")))
        changes.append(("--precision bf16", build, plan.replace(precision="bf16")))
    if plan.optimizer in ("adamw", "adam"):
        changes.append(("--optimizer adafactor", build, plan.replace(optimizer="adafactor", optimizer_impl="auto")))
        changes.append(("--optimizer sgd", build, plan.replace(optimizer="sgd", optimizer_impl="auto")))
    changes.append(("checkpoints, bf16 and adafactor", checkpointed(build), _least(plan)))
    for name, built, changed in changes:
        if kept and name in (CHECKPOINTS, AUTOCAST):
            yield f"{name}: does not fit, parameters and optimizer state alone take {size(lasting)}"
            continue
        try:
            memory = recorded_memory(record(built, changed, device, bytes_alone=True).account, gpu)
        except ConfigError as error:
            yield f"{name}: not tried, {error}"
            continue
        yield f"{name}: {size(memory.needed)}, which {memory.verdict}"


def _least(plan: Plan) -> Plan:
    return plan.replace(precision="bf16", optimizer="adafactor", optimizer_impl="auto")
