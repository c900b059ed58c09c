"""What is assumed where the code asks a tensor for its values, which meta tensors do not have: never in silence."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from estimator.describe.checks import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


OVERFLOW = (
    "_amp_foreach_non_finite_check_and_unscale_"  # a loss scaler's, which skips the update where it has found any
)
NO = ("any", "isnan", "isinf", "isneginf", "isposinf")  # operators that look for what is not expected
AGAIN_AND_AGAIN = 100_000
DEALT = "each chosen as often as any other"  # what is assumed of a router's choices


class Assumption(NamedTuple):
    """An answer that was made up, and the line of source that asked.

    Attributes:
        what: the answer, in words.
        file, line: where it was asked for.
    """

    what: str
    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.what}: {self.file}:{self.line}"


def operator(made: str) -> tuple[str, int]:
    """(the name, the elements of the first argument) of what would have made a storage (`made_of` in recorder.cpp)."""
    name, _, elements = made.removeprefix("aten::").rpartition(":")
    return name.partition(".")[0], int(elements or 0)


@dataclass
class Assumptions:
    """All that were made, counted.

    Attributes:
        libraries: folders whose code is not the user's.
        counts: how often each was made.
        fixed: the same, of the step that is recorded alone.
        notes: what else is not as it would be, a sentence each.
    """

    libraries: Sequence[str]
    counts: Counter[Assumption] = field(default_factory=Counter)
    fixed: dict[Assumption, int] = field(default_factory=dict)
    notes: dict[str, None] = field(default_factory=dict)

    def make(self, what: str) -> None:
        """Note one more, at the line that is running."""
        frame = sys._getframe(1)  # noqa: SLF001 - the only way to ask who calls
        while frame.f_back is not None and self._is_library(frame.f_code.co_filename):
            frame = frame.f_back
        made = Assumption(what, frame.f_code.co_filename, frame.f_lineno)
        self.counts[made] += 1
        if self.counts[made] > AGAIN_AND_AGAIN:
            raise ConfigError(f"{made}: the code asks for it again and again, and goes on only with another value")

    def number(self, made: str, kind: str) -> float:
        """The value of a tensor that `made` would have computed: no element is, all elements are, or else 1.

        A loss scaler has found no overflow: the update is not skipped.

        Raises:
            ConfigError: the same line has asked so often that the answer must keep it in a loop.
        """
        name, _ = operator(made)
        if kind == "Dealt":
            self.make(f"{DEALT}, for the choices of {name}")
            return 0.0
        value = 0.0 if (kind == "Bool" and name in NO) or name == OVERFLOW else 1.0
        answer = ("false", "true")[int(value)] if kind == "Bool" else f"{value:.0f}"
        self.make(f"{answer} for a value of {name or 'unknown origin'} ({kind.lower()})")
        return value

    def numbers(self, made: str, x: Tensor) -> list[Any]:
        """`x.tolist()`: counts come out even, and anything else one by one as `number` has it."""
        name, elements = operator(made)
        if name == "bincount" and x.dim() == 1:
            self.make(f"even counts of {elements} in {len(x)} for values of bincount")
            return [elements // len(x) + (i < elements % len(x)) for i in range(len(x))]
        kind = "Bool" if x.dtype == torch.bool else str(x.dtype).removeprefix("torch.")
        one = bool if x.dtype == torch.bool else float if x.dtype.is_floating_point else int
        found = np.array([one(self.number(made, kind)) for _ in range(x.numel())]).reshape(x.shape)
        return found.tolist()

    def _is_library(self, file: str) -> bool:
        return file.startswith("<") or any(file.startswith(folder) for folder in self.libraries)
