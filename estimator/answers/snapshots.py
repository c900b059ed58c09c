"""PyTorch's memory snapshots (`torch.cuda.memory._dump_snapshot`), read as data, and a measured timeline from them.

A snapshot is a pickle of dicts, lists, strings and numbers. A pickle can also name functions to call: here it cannot.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from estimator.describe.checks import ConfigError, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# What an entry of a trace does to allocated bytes; the actions of segments and of the second half of a free do nothing.
SIGNS = {"alloc": 1, "free_completed": -1}
LIBRARIES = ("torch/", "/torch/", "transformers/trainer")  # files that are nobody's own code


class Plain(pickle.Unpickler):
    """Reads plain containers, strings and numbers alone."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Every class and function is refused."""
        raise ConfigError(f"snapshot: it names {shown(f'{module}.{name}')}, and a snapshot is plain data; not opened")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What the allocator of one device did.

    Attributes:
        live: allocated bytes after each allocation and free on record.
        delta: what each of them changes.
        addresses: where each of them is.
        frames: of each of them the frames of Python that were running, the innermost first.
        reserved: bytes of the segments at the end.
        start: allocated bytes before the first.
    """

    live: NDArray[np.int64]
    delta: NDArray[np.int64]
    addresses: Sequence[int]
    frames: Sequence[Sequence[Mapping[str, Any]]]
    reserved: int
    start: int

    @property
    def peak(self) -> int:
        """The most bytes that are allocated at any time on record."""
        return int(self.live.max())

    def held_at_peak(self) -> dict[str, int]:
        """Bytes at the peak by the line of source that allocated them, most first; they add up to the peak."""
        end = int(self.live.argmax()) + 1
        found: dict[str, int] = {"before the recording": self.start}
        born: dict[int, str] = {}  # by address
        for delta, address, frames in zip(self.delta[:end].tolist(), self.addresses, self.frames, strict=False):
            if delta > 0:
                born[address] = _line(frames)
            line = born.get(address, "before the recording")
            found[line] = found.get(line, 0) + delta
            if delta < 0:
                born.pop(address, None)
        return dict(sorted(((line, size) for line, size in found.items() if size), key=lambda item: -item[1]))


def _line(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost frame that is not torch's."""
    files = [(str(f.get("filename", "")), f.get("line", 0)) for f in frames]
    own = next((f for f in files if f[0].endswith(".py") and not any(x in f[0] for x in LIBRARIES)), None)
    return "no line on record" if own is None else f"{own[0]}:{own[1]}"


def read_snapshot(path: str | Path, device: int = 0) -> Snapshot:
    """The snapshot in a file, of one of its devices.

    Raises:
        ConfigError: there is no such file, it is no snapshot, it has no history of that device, or it is a pickle that
            would call something.
    """
    try:
        with Path(path).open("rb") as file:
            found = Plain(file).load()
    except OSError as error:
        raise ConfigError(f"snapshot = {shown(str(path))}: {error.strerror}") from error
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"snapshot = {shown(str(path))}: is no pickle ({error})") from error
    if not isinstance(found, dict) or not {"segments", "device_traces"} <= found.keys():
        raise ConfigError(
            f"snapshot = {shown(str(path))}: must have segments and device_traces, as torch.cuda.memory._dump_snapshot "
            "writes them"
        )
    traces = found["device_traces"]
    if device >= len(traces) or not any(e.get("action") in SIGNS for e in traces[device]):
        raise ConfigError(
            f"snapshot = {shown(str(path))}: has no history of device {device}; record it with "
            "torch.cuda.memory._record_memory_history() before the step"
        )
    entries = [e for e in traces[device] if e.get("action") in SIGNS]
    delta = np.array([SIGNS[e["action"]] * int(e["size"]) for e in entries], dtype=np.int64)
    segments = [s for s in found["segments"] if s.get("device", 0) == device]
    end = sum(int(s.get("allocated_size", 0)) for s in segments)
    start = end - int(delta.sum())
    return Snapshot(
        start + delta.cumsum(),
        delta,
        [int(e["addr"]) for e in entries],
        [e.get("frames", ()) for e in entries],
        sum(int(s.get("total_size", 0)) for s in segments),
        start,
    )
