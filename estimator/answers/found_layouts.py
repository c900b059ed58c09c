"""What a search over layouts finds: each layout that fits, with its figures, and why the others are not among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.timing.intervals import regime
from estimator.timing.roofline import PARTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd

    from estimator.describe.plan import Plan


@dataclass(frozen=True, slots=True)
class Option:
    """A layout that fits.

    Attributes:
        plan: the plan, with every searched field and the accumulation that the global batch takes.
        needed: bytes on the accelerator that holds the most (`Memory.needed`).
        headroom: bytes that are left of its memory.
        parts: seconds of a step by part (`estimator.timing.roofline.PARTS`).
        tokens_per_second: of one accelerator.
        mfu: model FLOPs utilisation.
        dollars: of a billion tokens; None where no price is on file.
        best: no other layout is both faster and leaves more room.
    """

    plan: Plan
    needed: int
    headroom: int
    parts: Mapping[str, float]
    tokens_per_second: float
    mfu: float
    dollars: float | None
    best: bool = False

    @property
    def seconds(self) -> float:
        """Of an optimizer step."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return regime(self.parts)

    def behind(self, first: Option) -> str:
        """Why this is slower than `first`: the parts of a step that take longer, the worst two."""
        more = {name: self.parts[name] - first.parts[name] for name in PARTS}
        worst = sorted((name for name in more if more[name] > 0.001 * first.seconds), key=lambda name: -more[name])[:2]
        return ", ".join(f"{name} +{more[name] / first.seconds:.1%}" for name in worst)


@dataclass(frozen=True, slots=True)
class Layouts:
    """The layouts of a run.

    Attributes:
        options: those that fit, the fastest first.
        refused: how many others there are, by reason.
        smallest: the least number of these accelerators on which a step of this global batch fits at all; None if
            `MOST` do not suffice.
        network: what was taken between nodes, a sentence.
    """

    options: tuple[Option, ...]
    refused: Mapping[str, int]
    smallest: int | None
    network: str

    def to_frame(self) -> pd.DataFrame:
        """One row a layout, the fastest first; `attrs` has `refused`, `smallest` and `network`."""
        import pandas as pd  # noqa: PLC0415 - half a second that only this needs

        rows = [
            {
                "data_parallel": o.plan.data_parallel,
                "tensor_parallel": o.plan.tensor_parallel,
                "pipeline_parallel": o.plan.pipeline_parallel,
                "context_parallel": o.plan.context_parallel,
                "expert_parallel": o.plan.expert_parallel,
                "sharding": o.plan.sharding,
                "shard_group": o.plan.shards,
                "precision": o.plan.precision,
                "sequence_parallel": o.plan.sequence_parallel,
                "vocabulary_parallel": o.plan.vocabulary_parallel,
                "batch_size": o.plan.batch_size,
                "grad_accumulation": o.plan.grad_accumulation,
                "checkpointing": o.plan.checkpointing,
                "seconds_per_step": o.seconds,
                "tokens_per_second_per_accelerator": o.tokens_per_second,
                "mfu": o.mfu,
                "needed": o.needed,
                "headroom": o.headroom,
                "dollars_per_billion_tokens": o.dollars,
                "bound": o.bound,
                "behind": o.behind(self.options[0]),
                "best": o.best,
            }
            for o in self.options
        ]
        frame = pd.DataFrame(rows)
        frame.attrs |= {"refused": dict(self.refused), "smallest": self.smallest, "network": self.network}
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready."""
        frame = self.to_frame()
        rows = [{str(k): _plain(x) for k, x in row.items()} for row in frame.to_dict("records")]
        return {str(k): x for k, x in frame.attrs.items()} | {"layouts": rows}


def _plain(x: Any) -> Any:
    return x.item() if isinstance(x, np.generic) else x
