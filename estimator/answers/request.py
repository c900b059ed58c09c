"""A question as one object: its estimate, and the Python and the command that ask the same."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from estimator.answers.estimates import estimate
from estimator.describe.checks import ConfigError
from estimator.describe.plan import Plan
from estimator.describe.presets import preset, presets, written_from
from estimator.describe.run import Run
from estimator.describe.settings import settings

if TYPE_CHECKING:
    from estimator.answers.estimates import Estimate
    from estimator.describe.model import ModelConfig

# Fields that follow from others, unless they are given: parts hold what is said of ties and biases.
FOLLOWING = ("num_kv_heads", "head_dim", "d_ff", "parts", "pattern")


@dataclass(frozen=True, slots=True)
class Request:
    """A question to `estimator.estimate`, with the name that the model goes by.

    Attributes:
        name: a preset's name, or any other for a model of one's own.
        model, plan: what is trained, and how.
        gpu: an accelerator's id.
        count: accelerators.
        mfu: model FLOPs utilisation; None to have it predicted, where the library can.
        steps: optimizer steps of the run.
        global_batch_size: sequences in a step of the whole job.
        network, network_latency, attention_kernel, torch_version, clock, overlap, wide, padding: what a predicted time
            rests on (`settings(Run)` says what each is).
    """

    name: str
    model: ModelConfig
    plan: Plan
    gpu: str
    count: int = 1
    mfu: float | None = None
    steps: int | None = None
    global_batch_size: int | None = None
    network: str | float | None = None
    network_latency: float | None = None
    attention_kernel: str | None = None
    torch_version: str | None = None
    clock: float | None = None
    overlap: bool = True
    wide: tuple[str, ...] = ()
    padding: float = 0.0

    @property
    def run(self) -> dict[str, Any]:
        """The keyword arguments of `estimate` that are not at their defaults."""
        given = {name: getattr(self, name) for name in settings(Run)}
        usual = {name: setting.default for name, setting in settings(Run).items()} | {"count": 1}
        return {name: value for name, value in given.items() if value != usual[name]}

    @property
    def base(self) -> str | None:
        """The preset that the model is, or that it is written as a change of; None where it has parts of its own."""
        return self.name if self.name in presets() else written_from(self.model)

    def estimate(self) -> Estimate:
        """The answer, remembered.

        Raises:
            ConfigError: as `estimator.estimate`.
        """
        return _answer(self)

    def python(self) -> str:
        """Python that computes the same figures."""
        if self.base is None:
            given = {name: value for name, value in self.model.to_dict().items() if value is not None}
            model = f"est.ModelConfig({_keywords(given)})"
        else:
            changes = _differences(preset(self.base), self.model)
            model = f'est.preset("{self.base}")' + (f".replace({_keywords(changes)})" if changes else "")
        plan = _keywords(_differences(Plan(), self.plan))
        run = "".join(f", {name}={value!r}" for name, value in self.run.items())
        return "\n".join(
            (
                "import estimator as est",
                "",
                f"model = {model}",
                f"plan = est.Plan({plan})",
                f'r = est.estimate(model, plan, "{self.gpu}"{run})',
                "print(r.memory.needed, r.fits, r.time and r.time.hours)",
                f'print(est.max_batch_size(model, r.plan, "{self.gpu}"))',
            )
        )

    def command(self) -> str:
        """The `estimate` command that prints the same figures.

        A model with parts of its own is read from its config.json, wherever that lies.
        """
        words = ["estimate", self.base or "config.json", "--gpu", self.gpu]
        changes = _differences(preset(self.base), self.model) if self.base else {}
        changes |= _differences(Plan(), self.plan) | self.run
        for name, given in changes.items():
            flag = name.replace("_", "-")
            # A flag cannot say None; a window as long as the context is none.
            value = self.model.context_length if name == "sliding_window" and given is None else given
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", ",".join(value) if isinstance(value, tuple) else str(value)]
        return shlex.join(words)


@lru_cache(maxsize=16)  # each keeps its account, of some megabytes, alive
def _answer(request: Request) -> Estimate:
    return estimate(request.model, request.plan, request.gpu, **request.run)


def _differences(base: Any, other: Any) -> dict[str, Any]:
    """Fields of `other` that are not as in `base`, both models or both plans.

    A size of `base` that follows from another one (d_ff from d_model) follows here too, unless it is given.
    """
    if base.__class__ is Plan:
        return {f.name: getattr(other, f.name) for f in fields(base) if getattr(other, f.name) != getattr(base, f.name)}
    plain = [f.name for f in fields(base) if f.name not in FOLLOWING]
    changes = {name: getattr(other, name) for name in plain if getattr(other, name) != getattr(base, name)}
    try:
        following = base.replace(**changes)
    except ConfigError:  # only with the sizes that follow does it make a model
        following = base.replace(tie_embeddings=other.tie_embeddings, qkv_bias=other.qkv_bias)
    for name in FOLLOWING:
        if getattr(other, name) != getattr(following, name):
            changes[name] = getattr(other, name)
    return changes


def _keywords(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
