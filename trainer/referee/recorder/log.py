"""The log that the extension writes, read back: rows of numbers, and the operands of operators."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


class Kind(IntEnum):
    """What a row tells; recorder.cpp's names."""

    ALLOCATED = 0
    FREED = 1
    BEGUN = 2
    ENDED = 3
    MARKED = 4


class Mark(IntEnum):
    """What Python marks in the log."""

    MODULE = 0  # a module's forward begins: its number
    MODULE_END = 1
    UPDATE = 2  # an optimizer's step begins
    UPDATE_END = 3
    GRADIENT = 4  # a parameter's gradient lies in a storage: the storage, the parameter
    SAVED = 5  # autograd keeps a storage
    LET_GO = 6
    REMADE = 7  # a checkpoint has made a storage again, and keeps it
    MESSAGE = 8  # something is sent to other ranks: its place among `Log.sent`


# What an operator may be: a node of the autograd graph, a kernel of the device that has run, one that was left out.
RUN, NODE, LEFT_OUT = 1, 2, 3

ENGINE = "autograd::engine::evaluate_function: "

# c10::ScalarType's order (c10/core/ScalarType.h, whose numbers are part of torch's file formats).
DTYPES: dict[int, torch.dtype] = {
    0: torch.uint8, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.int64, 5: torch.float16, 6: torch.float32,
    7: torch.float64, 8: torch.complex32, 9: torch.complex64, 10: torch.complex128, 11: torch.bool, 15: torch.bfloat16,
    23: torch.float8_e5m2, 24: torch.float8_e4m3fn, 25: torch.float8_e5m2fnuz, 26: torch.float8_e4m3fnuz,
    27: torch.uint16, 28: torch.uint32, 29: torch.uint64,
}  # fmt: skip


class Operand(NamedTuple):
    """A tensor that an operator takes or returns.

    Attributes:
        storage: number of its storage; 0 of one that is not on record.
        dtype: of its elements.
        is_number: it was a Python number.
        known: its values are known.
        shape, stride: in elements.
    """

    storage: int
    dtype: torch.dtype
    is_number: bool
    known: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def is_contiguous(self) -> bool:
        """Row-major; the stride of a dimension of 1 does not matter."""
        following = 1
        for n, s in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if n != 1 and s != following:
                return self.numel == 0
            following *= n
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.dtype.itemsize


class Sent(NamedTuple):
    """A collective, or what is sent to one rank.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce", "broadcast", "all-to-all", "send" and the like.
        nbytes: of the whole tensors: what a gather gives, what a reduction takes, what more of an all-to-all goes or
            comes.
        dtype: of their elements.
        axis: the axis of the mesh, or what else its group is called.
        ranks: how many take part.
    """

    kind: str
    nbytes: int
    dtype: torch.dtype
    axis: str
    ranks: int


@dataclass(frozen=True)
class Log:
    """One recording, as it was written.

    Attributes:
        rows: (kind, a, b, c, d, e): ALLOCATED (storage, bytes); FREED (storage);
            BEGUN (name, sequence number, RUN, NODE, LEFT_OUT or 0, operands or -1, line or -1);
            ENDED (-, -, -, results or -1); MARKED (what, value, more).
        operands: where the operands of a kernel begin.
        names: of operators and nodes.
        lines: (file, line) of source.
        sent: messages to other ranks.
    """

    rows: list[tuple[int, ...]]
    operands: Sequence[int]
    names: Sequence[str]
    lines: Sequence[tuple[str, int]]
    sent: Sequence[Sent] = ()

    @classmethod
    def of(cls, extension: Any, sent: Sequence[Sent] = ()) -> Log:
        """What the extension has written, and the messages that it has the places of."""
        rows = np.frombuffer(extension.rows(), dtype=np.int64).reshape(-1, 6)
        operands = np.frombuffer(extension.operands(), dtype=np.int64)
        return cls(
            list(map(tuple, rows.tolist())), operands.tolist(), extension.names(), extension.lines(), tuple(sent)
        )

    def is_engine(self, name: int) -> bool:
        """Whether that is the engine, about to evaluate a node."""
        return self.names[name].startswith(ENGINE)

    def values(self, at: int) -> list[Any]:
        """The operands that begin there: an Operand, a number, a list of either, or None for anything else."""
        values, after = [], at + 1
        for _ in range(self.operands[at]):
            value, after = self._value(after)
            values.append(value)
        return values

    def _value(self, at: int) -> tuple[Any, int]:
        kind = self.operands[at]
        if kind == 1:
            storage, dtype, is_number, known, dims = self.operands[at + 1 : at + 6]
            shape, end = at + 6, at + 6 + 2 * dims
            shape_, stride = tuple(self.operands[shape : shape + dims]), tuple(self.operands[shape + dims : end])
            return Operand(storage, DTYPES.get(dtype, torch.uint8), bool(is_number), bool(known), shape_, stride), end
        if kind == 2:
            return self.operands[at + 1], at + 2
        if kind == 3:
            return float(np.array(self.operands[at + 1], dtype=np.int64).view(np.float64)), at + 2
        if kind == 4:
            count = self.operands[at + 1]
            return list(self.operands[at + 2 : at + 2 + count]), at + 2 + count
        if kind == 5:
            found, after = [], at + 2
            for _ in range(self.operands[at + 1]):
                value, after = self._value(after)
                found.append(value)
            return found, after
        return None, at + 1
