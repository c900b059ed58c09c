"""The memory that this machine has to give."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int:
    """Bytes that a new process could use on `device`: free ones, and on the CPU those the kernel would give back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [pages]
    meminfo = Path("/proc/meminfo")  # Linux; elsewhere the machine's whole memory has to do
    if meminfo.exists():
        lines = (line.split() for line in meminfo.read_text(encoding="ascii").splitlines())
        limits += [1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:"]
    # A container's limit is its control group's (version 2), and the kernel's figure does not know it.
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()) != "max":
        limits.append(int(limit) - int((group / "memory.current").read_text()))
    return min(limits)
