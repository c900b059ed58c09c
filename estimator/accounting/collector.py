"""Python's collector of reference cycles, put off while many accounts are made.

An account is a hundred thousand small objects without a cycle: it goes when the last reference to it goes. The
collector walks all accounts again each time that their number has grown by a quarter, which took most of the time of
an advice.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = Lock()
_putting_off = 0


@contextmanager
def collected_later() -> Iterator[None]:
    """No cycles are looked for in this context, nor in any other thread as long as one is in it.

    A process that has turned the collector off itself finds it off afterwards.
    """
    global _putting_off  # noqa: PLW0603 - the collector is the process's
    with _lock:
        ours = bool(_putting_off) or gc.isenabled()
        _putting_off += ours
        gc.disable()
    try:
        yield
    finally:
        with _lock:
            _putting_off -= ours
            if ours and not _putting_off:
                gc.enable()
