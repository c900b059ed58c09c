"""Float32 master weights of a model in half precision, as `trainer.optim.precision.Masters` keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import add_wider
from estimator.eager.ledger import Category
from estimator.eager.tensor import FLOAT32, Tensor, converted
from estimator.optim.updates import at_parameter, zero_grad

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.eager.tensor import Shape


class Masters:
    """Pairs of a parameter and its copy; the copies are what the optimizer sees.

    `padded` are the shapes that their storages have, which a last shard does not fill. With `fp32_gradients` a
    parameter's gradient is added to its master's as soon as it is there, and is gone.
    """

    def __init__(self, parameters: Sequence[Tensor], padded: Sequence[Shape], *, fp32_gradients: bool) -> None:
        self.fp32_gradients = fp32_gradients
        self.pairs = []
        for p, shape in zip(parameters, padded, strict=True):
            with at_parameter(p, "master"):
                full = p.machine.empty(shape, FLOAT32, category=Category.OPTIMIZER)
                master = Tensor(p.machine, full.storage, p.shape, full.stride, FLOAT32).hold()
                full.discard()
                if fp32_gradients:
                    master.grad = p.machine.empty(p.shape, FLOAT32, category=Category.GRADIENT).hold()
                    p.after_accumulation = adds_to(master.grad)
            self.pairs.append((p, master))

    @property
    def masters(self) -> list[Tensor]:
        """The copies, in the order of the parameters."""
        return [master for _, master in self.pairs]

    def take_gradients(self) -> None:
        """`master.grad = p.grad.float(); p.grad = None`."""
        for p, master in self.pairs:
            if p.grad is not None:
                with at_parameter(p, "float"):
                    master.grad = converted(p.grad, FLOAT32).hold()
                    p.grad.drop()
                    p.grad = None

    def write_back(self) -> None:
        """`p.copy_(master)`, and the masters' gradients are cleared."""
        for p, master in self.pairs:
            with at_parameter(p, "copy_"):
                p.machine.kernel("copy_", (master,), (p,))
                if self.fp32_gradients:
                    assert master.grad is not None
                    p.machine.kernel("zero_", (), (master.grad,))
        if not self.fp32_gradients:
            zero_grad(self.masters)


def adds_to(total: Tensor) -> Callable[[Tensor], None]:
    """A hook that adds a parameter's gradient to `total`, which may be wider, as soon as it is there, and drops it."""

    def hook(p: Tensor) -> None:
        assert p.grad is not None
        add_wider(total, p.grad)
        p.grad.drop()
        p.grad = None

    return hook
