"""What goes wrong in somebody's code, as one sentence with its line."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from estimator.describe.checks import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]), "<")  # whose code is not the user's
LONGEST = 300  # characters of a message that are kept
REMEDIES = {  # what can be done about an operator, by a part of its name
    "nonzero": "how many places a mask has that is computed is not known: multiply with it, or make it an input",
    "slow_conv": "PyTorch has no kernel without data for a convolution in three dimensions, or with dilation in two",
}


@contextmanager
def said_by(what: str) -> Iterator[None]:
    """Raise whatever is raised within as a ConfigError that names the line of the user's; `what` was being run.

    Raises:
        ConfigError: in place of any error but itself, and of an exit.
    """
    try:
        yield
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:
        place = line_of(error)
        message = " ".join(str(error).split())
        if isinstance(error, NotImplementedError):
            message = message.partition(". ")[0]
            said = f"{place} wants values or a kernel that there is not without data ({message[:LONGEST]})"
            said += next((f"; {what}" for part, what in REMEDIES.items() if part in message), "")
        else:
            said = f"{place} raised {type(error).__name__}: {message[:LONGEST] or 'without a message'}"
        raise ConfigError(f"{what}: {said}") from error


def line_of(error: BaseException) -> str:
    """The innermost line of an error that is not a library's, or the innermost of all: its place and its text."""
    lines = [x for x in traceback.extract_tb(error.__traceback__) if x.filename != __file__]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    if not lines:
        return "it"
    own = next((x for x in reversed(lines) if not x.filename.startswith(LIBRARIES)), lines[-1])
    return f"{own.filename}:{own.lineno}: `{own.line}`"
