"""Tables as CSV that a spreadsheet reads as they are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FORMULAS = ("=", "+", "-", "@")  # what a spreadsheet takes for the beginning of one


def csv_of(frame: pd.DataFrame, *, index: bool = True) -> str:
    """A table as CSV; no text in it is taken for a formula."""
    plain: Any = frame.reset_index() if index else frame.copy()
    for name in plain:
        plain[name] = [harmless(x) for x in plain[name]]
    return str(plain.to_csv(index=False))


def harmless(cell: object) -> object:
    """A cell of a table; a text that a spreadsheet would take for a formula begins with an apostrophe."""
    if not isinstance(cell, str):
        return cell
    text = " ".join(cell.splitlines())
    return f"'{text}" if text.lstrip().startswith(FORMULAS) else text
