"""The C library's heap: memory that a step frees is memory that the next one asks for."""

from __future__ import annotations

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, in place of giving it back to the system; whether there is a glibc that could.

    By default it gives back a large block at once and the end of the heap as it empties. A step that allocates its
    activations and gradients anew then waits for the system to map and zero every page of them again.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_TRIM_THRESHOLD, NEVER) and library.mallopt(M_MMAP_MAX, 0))
