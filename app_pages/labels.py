"""What inputs are called, and what each is, in the words of the library's declarations."""

from __future__ import annotations

from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.run import Run
from estimator.describe.settings import Setting, settings

LABELS = {"gpu": "Accelerator"}  # what no declaration knows


def declared(name: str) -> Setting | None:
    """The declaration of a field of a model, a plan or a run."""
    for cls in (Plan, Run, ModelConfig):
        if name in settings(cls):
            return settings(cls)[name]
    return None


def label(name: str) -> str:
    """What the input of a field is called on the page."""
    said = declared(name)
    return LABELS.get(name) or (said.label if said else "") or name.replace("_", " ").capitalize()


def explained(name: str, otherwise: str = "") -> str:
    """What a field is, for the help beside its input; `otherwise` where nothing declares it."""
    said = declared(name)
    return said.markdown if said else otherwise
