"""What an optimizer's step does to memory: torch.optim.AdamW's three implementations and the bundled trainer's own."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from estimator.eager.ledger import Category
from estimator.eager.ops import elementwise, in_place_with_number, python_number, with_number
from estimator.eager.sizes import LETTER
from estimator.eager.tensor import FLOAT32, Locals, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.sizes import Size


@contextmanager
def at_parameter(p: Tensor, op: str) -> Iterator[None]:
    """What happens in this context is the update of `p`."""
    where = p.storage.where
    with p.machine.ledger.at(where.module, where.block, op):
        yield


def in_place(name: str, x: Tensor, *reads: Tensor, arithmetic: int) -> None:
    """One fused in-place kernel over x that does `arithmetic` operations an element."""
    x.machine.kernel(name, (x, *reads), (x,), arithmetic=arithmetic * x.numel)


def zero_grad(parameters: Sequence[Tensor]) -> None:
    """`optimizer.zero_grad()`: gradients become None."""
    for p in parameters:
        if p.grad is not None:
            with at_parameter(p, "zero_grad"):
                p.grad.drop()
            p.grad = None


class Optimizer:
    """Parameters and their state, which exists before the steady step that is accounted."""

    moments = 0  # state tensors of a parameter's shape
    counts_steps_in_tensors = False

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.machine = parameters[0].machine
        self.states = []
        for p in parameters:
            with at_parameter(p, "state"):
                if self.counts_steps_in_tensors and self.keeps_steps_on_device:
                    self.machine.empty((), FLOAT32, category=Category.OPTIMIZER).hold()
                self.states.append(
                    [self.machine.empty(p.shape, p.dtype, category=Category.OPTIMIZER).hold() for _ in range(self.moments)]
                )

    @property
    def keeps_steps_on_device(self) -> bool:
        """torch.optim keeps step counts in CPU tensors, unless fused."""
        return self.machine.device == "cpu"

    def step(self) -> None:
        """One update of all parameters."""
        raise NotImplementedError


class LoopAdamW(Optimizer):
    """torch.optim.AdamW(foreach=False): `_single_tensor_adam`. The last parameter's denominator lives on as a local."""

    moments = 2
    counts_steps_in_tensors = True

    def step(self) -> None:
        denominator: Tensor | None = None
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "AdamW loop"):
                _count_step(self)
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


def _count_step(optimizer: Optimizer) -> None:
    if optimizer.keeps_steps_on_device:
        with python_number(optimizer.machine, FLOAT32):
            pass


class ForeachAdamW(Optimizer):
    """torch.optim.AdamW(foreach=True): `_multi_tensor_adam`. All square roots are alive at once."""

    moments = 2
    counts_steps_in_tensors = True

    def step(self) -> None:
        _count_step(self)
        roots = []
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "AdamW foreach"):
                in_place("mul_", p, arithmetic=1)
                in_place("lerp_", m, p.grad, arithmetic=3)
                in_place("mul_", v, arithmetic=1)
                in_place("addcmul_", v, p.grad, arithmetic=3)
                roots.append(elementwise("sqrt", v).hold())
        for p, (m, _), root in zip(self.parameters, self.states, roots, strict=True):
            with at_parameter(p, "AdamW foreach"):
                in_place_with_number("div_", root)
                in_place_with_number("add_", root)
                in_place("addcdiv_", p, m, root, arithmetic=3)
        for p, root in zip(self.parameters, roots, strict=True):
            with at_parameter(p, "AdamW foreach"):
                root.drop()


class FusedAdamW(Optimizer):
    """torch.optim.AdamW(fused=True): one kernel, no temporaries; its step counts are on the parameters' device."""

    moments = 2
    counts_steps_in_tensors = True

    @property
    def keeps_steps_on_device(self) -> bool:
        return True

    def step(self) -> None:
        with python_number(self.machine, FLOAT32):
            pass
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "AdamW fused"):
                self.machine.kernel("_fused_adamw_", (p, p.grad, m, v), (p, m, v), arithmetic=14 * p.numel)


class BundledAdamW(Optimizer):
    """`trainer.optim.AdamW`: slice by slice through one scratch, which lives for the step."""

    moments = 2

    def step(self) -> None:
        with at_parameter(self.parameters[0], "AdamW bundled"):
            scratch = self.machine.empty((LETTER["z"],)).hold()
        for p, (m, v) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "AdamW bundled"):
                in_place_with_number("mul_", p)
                in_place("lerp_", m, p.grad, arithmetic=3)
                in_place_with_number("mul_", v)
                in_place("addcmul_", v, p.grad, arithmetic=3)
                with python_number(self.machine, p.dtype):
                    self.machine.kernel("sqrt", (v,), (v,), arithmetic=2 * p.numel)
                in_place("addcdiv_", p, m, p.grad, arithmetic=3)
        scratch.drop()


class SGD(Optimizer):
    """`trainer.optim.SGD`: one in-place kernel a parameter, no state, no temporaries."""

    def step(self) -> None:
        for p in self.parameters:
            assert p.grad is not None
            with at_parameter(p, "SGD"):
                in_place("add_", p, p.grad, arithmetic=2)


OPTIMIZERS: dict[tuple[str, str], type[Optimizer]] = {
    ("adamw", "loop"): LoopAdamW,
    ("adamw", "foreach"): ForeachAdamW,
    ("adamw", "fused"): FusedAdamW,
    ("adamw", "bundled"): BundledAdamW,
    ("sgd", "bundled"): SGD,
}


def clip_gradients(parameters: Sequence[Tensor]) -> None:
    """`trainer.clip.gradient_clipping`: a norm a parameter, the norm of those stacked, the factor in place.

    The scalars between norm and factor are less than the stack that is gone by then.
    """
    machine = parameters[0].machine
    with Locals() as v, machine.ledger.at("clipping", None, "gradient_clipping"):
        norms = []
        for p in parameters:
            assert p.grad is not None
            with at_parameter(p, "vector_norm"):
                norms.append(machine.empty(()).hold())
                machine.kernel("vector_norm", (p.grad,), (norms[-1],), arithmetic=2 * p.numel)
        stacked = machine.empty((_number_of(parameters),)).hold()
        v.norm = machine.empty(())
        stacked.drop()
        v.factor = machine.empty(())
        for p in parameters:
            assert p.grad is not None
            with at_parameter(p, "mul_"):
                in_place("mul_", p.grad, v.factor, arithmetic=1)
        for p, norm in zip(parameters, norms, strict=True):
            with at_parameter(p, "gradient_clipping"):
                norm.drop()


def _number_of(parameters: Sequence[Tensor]) -> Size:
    """How many parameters a model of any number of layers has: as many in each block as in the first."""
    outside = sum(p.storage.where.block is None for p in parameters)
    return outside + sum(p.storage.where.block == 0 for p in parameters) * LETTER["L"]
