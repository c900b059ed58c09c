"""The forwards of the model families in eager ops, statement by statement those of `trainer.model.decoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.models.gpt2 import GPT2
from estimator.models.llama import Llama

if TYPE_CHECKING:
    from estimator.models.layers import Transformer

FAMILIES: dict[str, type[Transformer]] = {"gpt2": GPT2, "llama": Llama}
