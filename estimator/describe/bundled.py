"""What PyTorch's own way of sharing a model out goes with; Megatron's needs are `estimator.describe.megatron`'s."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.describe.settings import Needs

if TYPE_CHECKING:
    from collections.abc import Collection

BUNDLED = ("implementation", "bundled")


def known_with(*pairs: tuple[str, Collection[Any]]) -> tuple[Needs, ...]:
    """That each field has one of the values with which it is known."""
    return tuple(
        Needs(name, known, f"it is not known together with {name} = {{{name}!r}}", where=BUNDLED)
        for name, known in pairs
    )
