"""What every optimizer's step is made of: where its updates are noted, its state, zeroing of gradients."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from estimator.eager.ledger import Category
from estimator.eager.ops import python_number
from estimator.eager.tensor import FLOAT32, Dtype, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Shape


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
    supports_scaling = False  # torch's `_step_supports_amp_scaling`: the fused implementations

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        if parameters:
            self.machine = parameters[0].machine
        self.states = []
        for p in parameters:
            with at_parameter(p, "state"):
                if self.counts_steps_in_tensors and self.keeps_steps_on_device:
                    self.new_state()
                self.states.append(self.new_states(p))

    @classmethod
    def of_each(cls, parameters: Sequence[Tensor]) -> list[Optimizer]:
        """One for each parameter."""
        return [cls([p]) for p in parameters]

    def new_states(self, p: Tensor) -> list[Tensor]:
        """A parameter's state."""
        return [self.new_state(*shape, dtype=p.dtype) for shape in self.state_shapes(p)]

    def new_state(self, *shape: Size, dtype: Dtype = FLOAT32) -> Tensor:
        """A tensor that the optimizer keeps from step to step."""
        return self.machine.empty(shape, dtype, category=Category.OPTIMIZER).hold()

    def state_shapes(self, p: Tensor) -> list[Shape]:
        """The shapes of a parameter's state."""
        return [p.shape] * self.moments

    def count_step(self) -> None:
        """`step_t += 1`, where the counts are in the memory that we account."""
        if self.keeps_steps_on_device:
            with python_number(self.machine, FLOAT32):
                pass

    @property
    def keeps_steps_on_device(self) -> bool:
        """torch.optim keeps step counts in CPU tensors, unless fused."""
        return self.machine.device == "cpu"

    def step(self) -> None:
        """One update of all parameters."""
        raise NotImplementedError
