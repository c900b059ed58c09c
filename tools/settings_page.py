"""Write docs/settings.md anew from the declarations: `python tools/settings_page.py`."""

from __future__ import annotations

from dataclasses import MISSING
from pathlib import Path

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import Needs, Setting, settings

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
START = """# Settings

Every setting, as it is declared in `estimator/describe/`. In Python they are the fields of `est.Plan`, the arguments of
`est.estimate` and the fields of a `ModelConfig`; on the command line `--batch-size 4` and the like; in a link of the
page `?batch_size=4`. `python tools/settings_page.py` makes this page.
"""
PARTS = {
    "The plan: how a step is run": Plan,
    "The run: on how many accelerators, for how long": Run,
    "The model's sizes": ModelConfig,
}


def default(setting: Setting) -> str:
    """What holds where nobody says it."""
    if setting.default is MISSING:
        return "must be given"
    if setting.default is None:
        return setting.optional or "none"
    shown = {True: "yes", False: "no"}.get(setting.default) if setting.kind == "flag" else None
    return shown or f"`{setting.default!r}`".replace("'", '"')


def goes_with(need: Needs) -> str:
    """What a setting cannot go without, and why."""
    when = f"{', '.join(map(str, need.values))}: " if need.values else ""
    why = need.why.replace("{", "").replace("!r}", "").replace("}", "")
    allowed = need.say or f"{need.other} {', '.join(map(str, need.allowed))}"
    return f"{when}{allowed} ({why})"


def row(setting: Setting) -> str:
    """A line of the table."""
    said = setting.meaning
    said += "".join(f"<br>`{name}`: {words}" for name, words in setting.choices.items())
    said += "".join(f"<br>`{other}` is `{name}`" for other, name in setting.spellings.items())
    needs = "<br>".join(goes_with(need) for need in setting.needs)
    cells = (f"`{setting.name}`", said, default(setting), needs)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    found = [START]
    for title, cls in PARTS.items():
        found += [f"## {title}\n", "| setting | what it is | default | only with |", "|---|---|---|---|"]
        found += [row(setting) for setting in settings(cls).values()]
        found.append("")
    return "\n".join(found)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
