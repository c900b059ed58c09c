"""What PyTorch says of CUDA memory: its out-of-memory messages and `torch.cuda.memory_summary()`, read.

The messages are those of c10/cuda/CUDACachingAllocator.cpp in torch 2.0 (and before), 2.1 (which writes "capacty") and
2.2 to 2.13; the summary is that of torch/cuda/memory.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from estimator.describe.checks import ConfigError, shown

UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}
SIZE = r"(\d+(?:\.\d+)?)\s*(bytes|B|[KMGTP]iB)"
WHOLE = ('a message of torch.OutOfMemoryError ("CUDA out of memory. Tried to allocate ...") or the table of '
         "torch.cuda.memory_summary()")  # fmt: skip

# What each figure of a message is, by the words around it.
FIGURES = {
    "tried": rf"Tried to allocate {SIZE}",
    "capacity": rf"(?:total capac(?:i)?ty of {SIZE}|{SIZE} total capacity)",
    "free": rf"(?:of which {SIZE} is free|; {SIZE} free)",
    "in_use": rf"this process has {SIZE} memory in use",
    "allocated": rf"(?:{SIZE} is allocated by PyTorch|{SIZE} already allocated)",
    "unallocated": rf"{SIZE} is reserved by PyTorch but unallocated",
    "reserved": rf"{SIZE} reserved in total by PyTorch",
    "allowed": rf"{SIZE} allowed",
}
OTHERS = re.compile(rf"Process \d+ has {SIZE} memory in use")
ROWS = {"allocated": "Allocated memory", "requested": "Requested memory", "reserved": "GPU reserved memory"}


@dataclass(frozen=True, slots=True)
class Message:
    """The figures of a message, in bytes; None where it has not said one.

    Attributes:
        kind: "message" or "summary".
        tried: what the failing allocation would have asked of the device.
        capacity: of the device.
        free: of the device.
        in_use: by this process, memory that is not PyTorch's included.
        others: by other processes.
        allocated: held by tensors, in the allocator's blocks; of a summary at its peak.
        reserved: asked of the device by the allocator; of a summary at its peak.
        now: of a summary, what is allocated as it is printed.
    """

    kind: str
    tried: int | None = None
    capacity: int | None = None
    free: int | None = None
    in_use: int | None = None
    others: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    now: int | None = None

    @property
    def unallocated(self) -> int | None:
        """Reserved by the allocator and not allocated."""
        return None if self.reserved is None or self.allocated is None else max(self.reserved - self.allocated, 0)

    @property
    def beside(self) -> int | None:
        """What this process holds outside of the allocator: the context, NCCL's buffers, other libraries."""
        used = self.in_use
        if used is None and self.capacity is not None and self.free is not None and self.others is None:
            used = self.capacity - self.free  # by whomever: no process is told apart
        return None if used is None or self.reserved is None else max(used - self.reserved, 0)


def read_message(text: str) -> Message:
    """The figures of the last message, or of the summary, in a text that may have other lines around.

    Raises:
        ConfigError: there is neither in it.
    """
    flat = " ".join(text.split())
    at = flat.rfind("Tried to allocate")
    if at >= 0:
        return _message(flat[at:])
    if "memory summary" in flat or "Allocated memory |" in flat:
        return _summary(text)
    raise ConfigError(f"message = {shown(flat)}: must be {WHOLE}")


def _message(text: str) -> Message:
    found: dict[str, int] = {}
    for name, pattern in FIGURES.items():
        match = re.search(pattern, text)
        if match is not None:
            number, unit = (x for x in match.groups() if x is not None)
            found[name] = round(float(number) * UNITS[unit])
    if "allocated" not in found:
        raise ConfigError(f"message = {shown(text)}: says nothing of what is allocated; must be {WHOLE}")
    others = [round(float(number) * UNITS[unit]) for number, unit in OTHERS.findall(text)]
    if "in_use" not in found and len(others) == 1:  # of itself, where the driver tells its number
        found["in_use"], others = others[0], []
    reserved = found.get("reserved")
    if "unallocated" in found:
        reserved = found["allocated"] + found["unallocated"]
    capacity = min(found[name] for name in ("capacity", "allowed") if name in found) if "capacity" in found else None
    return Message(
        "message",
        found["tried"],
        capacity,
        found.get("free"),
        found.get("in_use"),
        sum(others) or None,
        found["allocated"],
        reserved,
    )


def _summary(text: str) -> Message:
    found: dict[str, list[int]] = {}
    for name, label in ROWS.items():
        match = re.search(rf"\|\s*{label}\s*\|([^\n]*)", text)
        if match is not None:
            sizes = re.findall(r"(\d+)\s*(B|[KMGTP]iB)", match[1])
            found[name] = [int(number) * UNITS[unit] for number, unit in sizes]
    if any(len(found.get(name, ())) < 2 for name in ("allocated", "reserved")):
        raise ConfigError(
            f"message = {shown(' '.join(text.split()))}: a memory summary without its rows; must be {WHOLE}"
        )
    return Message("summary", allocated=found["allocated"][1], reserved=found["reserved"][1], now=found["allocated"][0])
