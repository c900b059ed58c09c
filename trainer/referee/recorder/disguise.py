"""Meta tensors that say they are on the device: code that asks gets the answer it would get there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

if TYPE_CHECKING:
    from collections.abc import Callable

META = torch.device("meta")


class Disguise(TorchFunctionMode):
    """Inside, a meta tensor's `device` is the device's, and what is made on the device is made of meta.

    A function mode is above autograd, which it leaves as it is.

    Args:
        device: "cpu" or "cuda".
        everything: tensors of which nobody says where they are made are the device's too; they are on a CPU.
    """

    def __init__(self, device: str, *, everything: bool) -> None:
        super().__init__()
        self.device, self.everything = torch.device(device), everything
        self.constructors = _device_constructors()
        t = torch.Tensor
        self.answers: dict[Callable[..., Any], Any] = {
            _getter(t, "device"): torch.device(device, 0) if device != "cpu" else self.device,
            _getter(t, "is_meta"): False,
            _getter(t, "is_cpu"): device == "cpu",
            _getter(t, "is_cuda"): device == "cuda",
        }
        self.moves = {t.cpu: torch.device("cpu"), t.cuda: torch.device("cuda")}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """One call of a function of torch."""
        more = kwargs or {}
        if func in self.answers and args[0].is_meta:
            return self.answers[func]
        if func is torch.Tensor.backward:  # inside of `func` the mode is off, and backward may run modules again
            with self:
                return self._backward(*args, **more)
        if func in self.moves:
            target = self.moves[func]
            return args[0] if args[0].is_meta and target.type == self.device.type else self._there(args[0], target)
        if func in self.constructors:
            asked = more.get("device")
            if self._is_ours(asked) if asked is not None else self.everything:
                more = {**more, "device": META}
        elif func is torch.Tensor.to or "device" in more:
            args = tuple(META if isinstance(x, str | torch.device) and self._is_ours(x) else x for x in args)
            more = {name: META if name == "device" and self._is_ours(x) else x for name, x in more.items()}
        return func(*args, **more)

    def _backward(self, loss: torch.Tensor, gradient: Any = None, *args: Any, **more: Any) -> None:
        torch.autograd.backward(loss, gradient, *args, **more)

    def _is_ours(self, device: Any) -> bool:
        try:
            return device is not None and torch.device(device).type == self.device.type
        except RuntimeError:  # a string that is no device's: of `Tensor.to` that is its own error
            return False

    def _there(self, x: torch.Tensor, target: torch.device) -> torch.Tensor:
        return x.to(META if target.type == self.device.type else target)


def _getter(of: type, name: str) -> Any:
    return getattr(of, name).__get__
