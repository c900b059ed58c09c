"""Write docs/time.md: how the time of a step is predicted, what every constant comes from, and how far off it is.

    python tools/time_doc.py

The tables are made here from the data and the judge; the words around them are in
tools/time.template.md.
"""

from __future__ import annotations

from pathlib import Path

from estimator.describe.catalogue import read_data
from estimator.studies import ablation, cards, nearness, operators, published_report

ROOT = Path(__file__).parents[1]


def constants() -> str:
    """`data/constants.toml` as rows of a table."""
    return "".join(
        f"| {where} | {name} | {entry['kind']} | {entry['source']} |\n"
        for where, entries in read_data("constants").items()
        for name, entry in entries.items()
    )


def text() -> str:
    """The whole document."""
    kept = (ROOT / "validation" / "2026-11-26-published-before.md").read_text(encoding="utf-8")
    template = (ROOT / "tools" / "time.template.md").read_text(encoding="utf-8")
    return template.format(
        after=published_report.table(),
        plain=published_report.plain(),
        coverage=published_report.coverage(),
        before=kept[kept.index("| stack |") :],
        nearness=nearness.table(),
        calibrated=published_report.calibrated_table(),
        ablation=ablation.table(),
        operators=operators.report().split("\n", 1)[0] + "\n\n" + operators.speeds(),
        cards=cards.table(),
        constants=constants(),
    )


if __name__ == "__main__":
    (ROOT / "docs" / "time.md").write_text(text(), encoding="utf-8")
