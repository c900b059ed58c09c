"""An optimizer whose updates run in backward, parameter by parameter, so that no two gradients need be there at once.

PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward pass" (2023), and torchtune's
`optimizer_in_bwd`: `register_post_accumulate_grad_hook`, and one optimizer for each parameter.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from trainer.optim.eight_bit import AdamW8bit, take_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn


class InBackward(torch.optim.Optimizer):
    """One optimizer to the outside: all parameters' groups, one state, and a step that has nothing left to do.

    Args:
        parts: name -> the optimizer of that parameter alone.
        hooked: name -> the parameter whose gradient comes: that of the part, or the sharded one that it is a part of.
        gradient: what of the hooked parameter's gradient the part sees.

    Attributes:
        enabled: whether hooks do anything; a gradient stays where they do not.
    """

    def __init__(
        self,
        parts: Mapping[str, torch.optim.Optimizer],
        hooked: Mapping[str, nn.Parameter],
        gradient: Callable[[str, Tensor], Tensor] = lambda _, grad: grad,
    ) -> None:
        self.parts, self.gradient, self.enabled = dict(parts), gradient, True
        super().__init__([group for part in self.parts.values() for group in part.param_groups], {})
        self._at = {name: at for at, name in enumerate(self.parts)}
        eight_bit = [part for part in self.parts.values() if isinstance(part, AdamW8bit)]
        for part in eight_bit:
            part.tables = eight_bit[0].tables
        for name, p in hooked.items():
            p.register_post_accumulate_grad_hook(partial(self._update, name))  # type: ignore[no-untyped-call]  # torch's

    def _update(self, name: str, p: Tensor) -> None:
        if not self.enabled:
            return
        part, group = self.parts[name], self.param_groups[self._at[name]]
        part.param_groups, part.state = [group], self.state  # either may have been loaded since
        own = group["params"][0]
        assert p.grad is not None
        own.grad, grad = None, self.gradient(name, p.grad)
        p.grad, own.grad = None, grad
        del grad
        part.step()
        own.grad = None

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which makes every state tensor of the parameter's dtype: those of 8 bits are theirs again."""
        super().load_state_dict(state_dict)
        take_states(self, state_dict)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: backward has done it."""

    @property
    def tables(self) -> list[Tensor]:
        """What the parts look up, each once."""
        found = {id(t): t for part in self.parts.values() for t in getattr(part, "tables", ())}
        return list(found.values())


@contextmanager
def no_updates(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Gradients stay in this context, and parameters do not move in backward."""
    if not isinstance(optimizer, InBackward):
        yield
        return
    optimizer.enabled = False
    try:
        yield
    finally:
        optimizer.enabled = True
