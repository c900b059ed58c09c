"""The words of `--help`, where tyro looks for them: in the docstrings of the classes that hold the options."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import TYPE_CHECKING

from estimator.describe.settings import settings

if TYPE_CHECKING:
    from estimator.describe.settings import Setting


def describe(*classes: type) -> None:
    """Give each class a docstring that says what its fields are.

    A declared setting has its words in its declaration; and `python -OO` strips docstrings, which are then read from
    the source, where it lies beside the program.
    """
    for cls in classes:
        if declared := settings(cls):
            words = "".join(f"    {name}: {_words(setting)}\n" for name, setting in declared.items())
            cls.__doc__ = f"{cls.__name__}.\n\nAttributes:\n{words}"
        elif sys.flags.optimize > 1:  # in place of the one that `dataclass` makes of the signature
            cls.__doc__ = _in_source(cls)


def _words(setting: Setting) -> str:
    """What a setting is, and what it may be."""
    return f"{setting.meaning} One of {', '.join(setting.choices)}." if setting.choices else setting.meaning


def _in_source(cls: type) -> str | None:
    try:
        tree = ast.parse(inspect.getsource(inspect.getmodule(cls) or cls))
    except OSError:  # only compiled files are here
        return None
    node = next(x for x in ast.walk(tree) if isinstance(x, ast.ClassDef) and x.name == cls.__name__)
    return ast.get_docstring(node)
