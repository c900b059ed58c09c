"""What is assumed where the code asks a tensor for its values, which meta tensors do not have: never in silence."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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


@dataclass
class Assumptions:
    """All that were made, counted.

    Attributes:
        libraries: folders whose code is not the user's.
        counts: how often each was made.
    """

    libraries: Sequence[str]
    counts: Counter[Assumption] = field(default_factory=Counter)

    def make(self, what: str) -> None:
        """Note one more, at the line that is running."""
        frame = sys._getframe(1)  # noqa: SLF001 - the only way to ask who calls
        while frame.f_back is not None and self._is_library(frame.f_code.co_filename):
            frame = frame.f_back
        self.counts[Assumption(what, frame.f_code.co_filename, frame.f_lineno)] += 1

    def number(self, x: Tensor) -> bool | int | float:
        """`x.item()`: true, or 1."""
        kind = "bool" if x.dtype.is_floating_point is False and x.dtype.itemsize == 1 else str(x.dtype)
        self.make(f"{'true' if kind == 'bool' else '1'} for a number of {kind.removeprefix('torch.')}")
        if kind == "bool":
            return True
        return 1.0 if x.dtype.is_floating_point else 1

    def _is_library(self, file: str) -> bool:
        return file.startswith("<") or any(file.startswith(folder) for folder in self.libraries)
