"""Output that cannot be written, or that nobody reads any more: quiet, or one sentence."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def guarded(called: str, command: Callable[[], int]) -> int:
    """What `command` returns; 0 where its reader has gone, 1 where its output cannot be written.

    Args:
        called: the command's name, for the message.
        command: writes to standard output, and returns an exit status.

    Raises:
        OSError: of a file that was to be read.
    """
    if sys.stdout is None:  # `estimate ... >&-`: nobody listens
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it is open until the end
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where what goes wrong can still be said
    except BrokenPipeError:  # `estimate ... | head` has read enough
        _abandon()
        return 0
    except OSError as error:
        if error.filename is not None:
            raise
        _abandon()
        sys.stderr.write(f"{called}: error: the output cannot be written ({error.strerror or error})\n")
        return 1


def _abandon() -> None:
    """What is left to be written goes nowhere: Python would try again at its end, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
