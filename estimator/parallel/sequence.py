"""Sequence parallelism as PyTorch's DTensor does it: a rank has its part of the tokens between the shared matrices.

`SequenceParallel`, `PrepareModuleInput` and `PrepareModuleOutput` of torch/distributed/tensor/parallel, and what
`redistribute` runs: functional collectives over the dimension of tokens, which is not the first, so that what is
gathered or scattered is put in another order by a copy (torch/distributed/_functional_collectives.py). On the CPU gloo
works in buffers of its own. Shapes: (B, T/t, d) on a rank, (B, T, d) whole.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from estimator.eager.autograd import attach, record
from estimator.eager.letters import ONE
from estimator.eager.tensor import Tensor, arguments, op
from estimator.parallel.placement import TENSOR
from estimator.parallel.tensor import share

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from estimator.eager.letters import Size


class Module(Protocol):
    """What is asked of a module here: its parameters, and a place for how DTensor hands it its input."""

    layout: Callable[..., Any] | None

    def parameters(self) -> Iterator[Tensor]:
        """In PyTorch's order."""


def over_part(module: Module, *, local: bool) -> None:
    """`SequenceParallel`: `module` works on a rank's part of the tokens, or of the heads.

    Its weights' gradients are sums over the ranks. What it hands on is a DTensor, or with `local` a rank's own tensor.
    """
    for p in module.parameters():
        p.partial = True

    def run(call: Callable[..., Tensor], x: Tensor) -> Tensor:
        with arguments((x,)) as results:
            with x.machine.dtensors():
                out = call(_viewed(x))
            results.append(_viewed(out) if local else out)
        return results[0]

    module.layout = run


def of_whole(module: Module, whole: Size) -> None:
    """`PrepareModuleInput`: the first argument of `module` is gathered, to `whole` tokens."""

    def run(call: Callable[..., Any], x: Tensor, *rest: Any) -> Any:
        with arguments((x, *rest)) as results:
            results.append(call(gathered(x, whole), *rest))
        return results[0]

    module.layout = run


def to_whole(module: Module, whole: Size) -> None:
    """`SequenceParallel` and `PrepareModuleOutput`: what `module` hands on is gathered, and the same on all ranks."""
    over_part(module, local=False)
    inner = module.layout
    assert inner is not None
    module.layout = lambda call, x: gathered(inner(call, x), whole, partial_gradient=False)


@op
def _viewed(x: Tensor) -> Tensor:
    """`DTensor.from_local` of a rank's own part, or `to_local`: views, and so are their gradients."""
    node = record("_FromTorchTensorBackward", (x,), lambda _, grad: [grad])
    return attach(node, x.view(x.shape, x.stride))


@op
def gathered(x: Tensor, whole: Size, *, partial_gradient: bool = True) -> Tensor:
    """`redistribute` of `Shard(1)` to `Replicate`.

    Its gradient is a part of a sum on each rank, which is scattered as it is added up; or the same on all, of which
    each takes its tokens.
    """
    taken = partial(_reduce_scattered if partial_gradient else _own_tokens)
    with x.machine.dtensors():
        node = record("RedistributeBackward", (x,), lambda _, grad: [taken(grad)])
    return attach(node, _all_gathered(x, whole))


@op
def scattered(x: Tensor) -> Tensor:
    """`redistribute` of a `Partial` to `Shard(1)`, asynchronously; its gradient is gathered, and so too."""
    whole = x.shape[1]
    node = record("RedistributeBackward", (x,), lambda _, grad: [_all_gathered(grad, whole, waits=False)])
    return attach(node, _reduce_scattered(x))


@op
def cut(x: Tensor) -> Tensor:
    """`redistribute` of `Replicate` to `Shard(1)`; its gradient is gathered."""
    whole = x.shape[1]
    node = record("RedistributeBackward", (x,), lambda _, grad: [_all_gathered(grad, whole)])
    return attach(node, _own_tokens(x))


def _own_tokens(x: Tensor) -> Tensor:
    """`Shard._replicate_to_shard`: a copy of a rank's own."""
    b, whole, d = x.shape
    out = x.machine.empty((b, share(x.machine, whole), d), x.dtype)
    x.machine.kernel("clone", (out,), (out,))
    return out


def _all_gathered(x: Tensor, whole: Size, *, waits: bool = True) -> Tensor:
    """`all_gather_single` over the tokens: into a buffer in the order of ranks, which a cat brings into theirs.

    With one sequence a view does, and what need not be waited for at once has its input until it is.
    """
    machine = x.machine
    b, _, d = x.shape
    shape = (b, whole, d)
    ranks = machine.empty(shape, x.dtype).hold()
    machine.collective("all-gather", TENSOR, ranks, waits="step")
    if machine.device == "cpu":  # gloo receives into one more
        machine.empty(shape, x.dtype).discard()
    if b is ONE:
        if not waits:
            machine.unwaited[ranks.storage] = x.hold().drop
        ranks.owners -= 1
        return ranks
    out = machine.empty(shape, x.dtype)
    machine.kernel("cat", (ranks,), (out,))
    ranks.drop()
    return out


def _reduce_scattered(x: Tensor) -> Tensor:
    """`reduce_scatter_single` over the tokens, of a cat of each rank's in the order of ranks."""
    machine = x.machine
    b, whole, d = x.shape
    ranks = machine.empty(x.shape, x.dtype).hold()
    machine.kernel("cat", (x,), (ranks,))
    out = machine.empty((b, share(machine, whole), d), x.dtype)
    machine.collective("reduce-scatter", TENSOR, ranks, waits="step")
    copy = machine.empty(x.shape, x.dtype).hold() if machine.device == "cpu" else None  # gloo's, which it reduces
    ranks.drop()
    if copy is not None:
        copy.drop()
    return out
