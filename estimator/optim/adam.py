"""The steps of torch.optim.Adam and AdamW, in each implementation, and of the bundled trainer's AdamW."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from estimator.eager.ops import elementwise, in_place_with_number, with_number
from estimator.optim.updates import Optimizer, at_parameter, in_place

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.eager.tensor import Tensor


class LoopAdamW(Optimizer):
    """torch.optim.AdamW(foreach=False): `_single_tensor_adam`. The last parameter's denominator lives on as a local."""

    moments = 2
    counts_steps_in_tensors = True
    decays = True

    def step(self) -> None:
        denominator: Tensor | None = None
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "Adam loop"):
                self.count_step()
                if self.decays:
                    in_place_with_number("mul_", p)
                in_place("lerp_", m, p.grad, arithmetic=3)
                in_place_with_number("mul_", v)
                in_place("addcmul_", v, p.grad, arithmetic=3)
                root = elementwise("sqrt", v).hold()
                before, denominator = denominator, with_number("div", root).hold()
                root.drop()
                in_place_with_number("add_", denominator)
                if before is not None:
                    before.drop()
                in_place("addcdiv_", p, m, denominator, arithmetic=3)
        if denominator is not None:
            denominator.drop()


class ForeachAdamW(Optimizer):
    """torch.optim.AdamW(foreach=True): `_multi_tensor_adam`. All square roots are alive at once."""

    moments = 2
    counts_steps_in_tensors = True
    decays = True

    def step(self) -> None:
        self.count_step()
        if self.decays:
            self.for_each(lambda p, *_: in_place_with_number("mul_", p))
        self.for_each(lambda p, m, _: in_place("lerp_", m, p.grad, arithmetic=3))
        self.for_each(lambda _, __, v: in_place_with_number("mul_", v))
        self.for_each(lambda p, _, v: in_place("addcmul_", v, p.grad, arithmetic=3))
        roots = self.for_each(lambda _, __, v: elementwise("sqrt", v).hold())
        self.for_each(lambda _, __, ___, root: in_place_with_number("div_", root), roots)
        self.for_each(lambda _, __, ___, root: in_place_with_number("add_", root), roots)
        self.for_each(lambda p, m, _, root: in_place("addcdiv_", p, m, root, arithmetic=3), roots)
        self.for_each(lambda *of: of[-1].drop(), roots)

    def count_step(self) -> None:
        """`torch._foreach_add_(steps, torch.tensor(1.0))`: the number is a tensor once, not for each parameter."""
        with at_parameter(self.parameters[0], "Adam foreach"):
            if self.keeps_steps_on_device:
                self.machine.empty(()).hold().drop()

    def for_each(self, kernel: Callable[..., Any], *more: list[Tensor]) -> list[Any]:
        """One `torch._foreach_` function: its kernel on (parameter, both moments, ...) of one after the other."""
        found = []
        for p, states, *others in zip(self.parameters, self.states, *more, strict=True):
            with at_parameter(p, "Adam foreach"):
                found.append(kernel(p, *states, *others))
        return found


class FusedAdamW(Optimizer):
    """torch.optim.AdamW(fused=True): one kernel, no temporaries; its step counts are on the parameters' device."""

    moments = 2
    supports_scaling = True
    counts_steps_in_tensors = True
    decays = True

    @property
    def keeps_steps_on_device(self) -> bool:
        return True

    def step(self) -> None:
        self.count_step()
        self.update()

    def update(self) -> None:
        """The kernel, on one parameter after the other."""
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "Adam fused"):
                self.machine.kernel(
                    "_fused_adamw_", (p, p.grad, m, v), (p, m, v), arithmetic=(13 + self.decays) * p.numel
                )


class BundledAdamW(FusedAdamW):
    """`trainer.optim.optimizers.AdamW`: the fused kernel; the count is a tensor only while that runs."""

    counts_steps_in_tensors = False
    supports_scaling = False

    def step(self) -> None:
        with at_parameter(self.parameters[0], "AdamW bundled"):
            count = self.machine.empty(()).hold()
        self.update()
        count.drop()


class LoopAdam(LoopAdamW):
    """torch.optim.Adam(foreach=False), without its weight decay, which is 0 unless asked for."""

    decays = False


class ForeachAdam(ForeachAdamW):
    """torch.optim.Adam(foreach=True)."""

    decays = False


class FusedAdam(FusedAdamW):
    """torch.optim.Adam(fused=True)."""

    decays = False
