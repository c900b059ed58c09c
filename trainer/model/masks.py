"""Which earlier tokens a token sees: all, those in a window, or those in its chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from estimator.describe.model import ModelConfig


def attention_kinds(m: ModelConfig, end: int) -> dict[str, str]:
    """What each layer's attention comes down to for `end` tokens: one that all of them fit in is "full"."""
    sizes = {"full": None, "window": m.sliding_window, "chunk": m.attention_chunk}
    present = {layer.attention for layer in m.layers}
    return {kind: "full" if size is None or end <= size else kind for kind, size in sizes.items() if kind in present}


def build_mask(
    m: ModelConfig, kind: str, length: int, start: int, device: torch.device, *, naive: bool, end: int | None = None
) -> Tensor | None:
    """(T, start + T) for T new tokens after `start` old ones; None where `attend` needs none.

    With `end` the tokens are a part of a sequence of so many, (T, end), and the mask says which come before.
    For separate ops True is where a query must not look, for SDPA where it may: what each of them takes.
    """
    if not naive and kind == "full" and end is None and (start == 0 or length == 1):
        return None
    end = end or start + length
    every = torch.ones(length, end, dtype=torch.bool, device=device)
    if naive and kind == "full":
        return every.triu(start + 1)
    seen = every.tril_(start)
    if kind == "window":
        assert m.sliding_window is not None
        seen.triu_(start + 1 - m.sliding_window)
    if kind == "chunk":
        assert m.attention_chunk is not None
        chunk = torch.arange(end, device=device).div_(m.attention_chunk, rounding_mode="floor")
        seen.logical_and_(chunk[start : start + length, None] == chunk)
    return seen.logical_not_() if naive else seen
