"""A recorded step as the project's own account: memory, timeline and allocator take it as they take a symbolic one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from estimator.accounting.trace import Trace
from estimator.eager.ledger import Category, Phase
from estimator.eager.repetition import Group, Stack

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from estimator.eager.ledger import Ledger, Where


@dataclass(frozen=True, eq=False)
class RecordedAccount:
    """The account of one step at its own sizes: every figure is a number.

    Attributes:
        ledger: what happened.
        device: whose rules.
        checkpoints: how often backward runs modules again.
    """

    ledger: Ledger
    device: str
    checkpoints: int = 0

    @cached_property
    def traced(self) -> Trace:
        """The ledger as arrays; nothing in it stands for anything else."""
        return Trace(self.ledger, Stack((Group(("",), 1),)))

    def turns(self, _: Mapping[str, int]) -> tuple[int, ...]:
        """Groups of blocks that a few turns stand for: none."""
        return (1,)

    @cached_property
    def delta(self) -> NDArray[np.int64]:
        """Bytes that each event allocates or, negative, frees; the setup's first."""
        return np.array([e.sign * nbytes(e.storage.nbytes.number) for e in self.ledger.events], dtype=np.int64)

    @cached_property
    def peak(self) -> int:
        """Index of the first event of the step at which most bytes are alive."""
        setup = sum(e.where.phase is Phase.SETUP for e in self.ledger.events)
        return setup + int(self.delta.cumsum()[setup:].argmax())

    @property
    def peak_bytes(self) -> int:
        """Bytes that are alive then."""
        return int(self.delta[: self.peak + 1].sum())

    @property
    def peak_where(self) -> Where:
        """Phase, module and operator of that allocation."""
        return self.ledger.events[self.peak].where

    @cached_property
    def alive(self) -> dict[tuple[str, str], int]:
        """Bytes alive at the peak by (category, module)."""
        found: dict[tuple[str, str], int] = {}
        for event, delta in zip(self.ledger.events[: self.peak + 1], self.delta.tolist(), strict=False):
            key = event.storage.category.value, event.storage.where.module
            found[key] = found.get(key, 0) + delta
        return {key: size for key, size in found.items() if size}

    @property
    def peak_categories(self) -> dict[str, int]:
        """Bytes alive at the peak by what they are for; they add up to the peak."""
        found = dict.fromkeys((c.value for c in Category), 0)
        for (category, _), size in self.alive.items():
            found[category] += size
        return found

    @property
    def peak_modules(self) -> dict[str, int]:
        """Bytes alive at the peak by the module that made them; they add up to the peak."""
        found: dict[str, int] = {}
        for (_, module), size in self.alive.items():
            found[module] = found.get(module, 0) + size
        return dict(sorted(found.items(), key=lambda item: -item[1]))


def nbytes(number: object) -> int:
    """The bytes of a storage of a recorded ledger, which are a number."""
    assert number is not None
    return int(number)  # type: ignore[call-overload]  # a Fraction or an int
