"""Data parallelism of whole parameters: one accelerator alone, DDP and its buckets, and ZeRO-1's shared update.

The docstrings have the names of torch/csrc/distributed/c10d/reducer.cpp. The collectives are NCCL's, which allocate
nothing that PyTorch counts, or on the CPU gloo's, which do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from estimator.eager.ledger import Category
from estimator.eager.letters import ZERO
from estimator.eager.ops import python_number
from estimator.eager.tensor import Locals, Tensor
from estimator.optim.clipping import clip_gradients, gradient_norms, number_of
from estimator.optim.updates import at_parameter, in_place, zero_grad
from estimator.parallel.expert import average
from estimator.parallel.placement import DATA, EXPERT, TENSOR, buckets, pieces, rows_on
from estimator.parallel.tensor import place_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Shape

HELD = Category.COMMUNICATION


class Model(Protocol):
    """What is asked of a model here, `estimator.models`' Transformer: its parts, and a place for their units."""

    machine: Machine
    blocks: Any
    unit: Any

    @property
    def buffers(self) -> list[Tensor]:
        """In PyTorch's order."""

    def parameters(self) -> Iterator[Tensor]:
        """In PyTorch's order."""


@dataclass(frozen=True)
class Sharing:
    """How accelerators share a step.

    Attributes:
        micro_batches: forward and backward passes in it.
        rank: which of those that share the shards is accounted.
        param_dtype: of parameters while they are whole, if not as they are kept (MixedPrecisionPolicy).
        reduce_dtype: in which gradients are summed, if not their own.
        replicated: several groups hold all the shards each (HSDP).
        reshard: among how many accelerators a block's parameters are shared from forward to backward, if not all.
        bucket_view: gradients are views of DDP's buckets.
        staged: a stage of a pipeline reduces gradients once its schedule is over, not in each backward.
        offload: shards, their gradients and the update are the host's.
        apart: the axes on which others have other parts of the model: of its matrices, or of its blocks.
    """

    micro_batches: int = 1
    rank: int = 0
    param_dtype: Dtype | None = None
    reduce_dtype: Dtype | None = None
    replicated: bool = False
    reshard: int | None = None
    bucket_view: bool = False
    staged: bool = False
    offload: bool = False
    apart: tuple[str, ...] = ()


class Replica:
    """A model that runs alone: the optimizer updates its parameters.

    Attributes:
        updated: what the optimizer updates.
        padded: the shapes that the storages of float32 copies of these have: full shards, also where one has less.
    """

    def __init__(self, model: Model, sharing: Sharing) -> None:
        self.machine, self.sharing = model.machine, sharing
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.updated: Sequence[Tensor] = self.parameters
        self.padded: Sequence[Shape] = [p.shape for p in self.parameters]
        self.last = sharing.micro_batches - 1
        # Experts of which each rank has a part have their whole gradient from the tokens that come to them.
        self.experts = [p for p in self.parameters if EXPERT in p.placement]
        self.exchanged = [p for p in self.parameters if EXPERT not in p.placement]

    def before_forward(self) -> None:
        """Before each micro-batch."""

    def after_schedule(self) -> None:
        """After the last backward of a stage of a pipeline: `perform_reduce_grad`."""

    def after_micro_batches(self) -> None:
        """After the last backward: among those that share the matrices gradients are laid out as their parameters."""
        place_gradients(self.parameters)

    def before_update(self) -> None:
        """Before the optimizer's step: `Weights.average_experts`."""
        average(self.experts)

    def sum_up(self, updated: Sequence[Tensor]) -> None:
        """After the gradients of what the optimizer updates are there in its own dtype."""

    def agree_on_overflow(self, found: Tensor) -> None:
        """An overflow in one part is an overflow in all (`trainer.optim.precision.ShardedScaler`)."""
        if TENSOR in self.sharing.apart:
            self.machine.collective("all-reduce", TENSOR, found, waits="step")

    def after_update(self) -> None:
        """After the optimizer's step: gradients become None."""
        zero_grad(self.updated)

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Clip the gradients of what the optimizer updates by their global norm."""
        if self.sharing.apart:
            clip_parts(parameters, self.sharing.apart)
        else:
            clip_gradients(parameters)


class Buckets(Replica):
    """DDP: a second copy of the gradients, in which they are summed over the accelerators and copied back.

    The buckets live as long as the model. Their bytes are noted here by block; how many there are, and so how many
    messages, is `estimator.parallel.placement.buckets`. With `gradient_as_bucket_view` a gradient becomes a view of its
    bucket as soon as it is in it: what is added up before, over micro-batches without a message, is a copy still.
    """

    def __init__(self, model: Model, sharing: Sharing) -> None:
        super().__init__(model, sharing)
        self.ready: list[Tensor] = []
        self.buffers = model.buffers
        self.buckets = []
        self.bucket_of: dict[Tensor, Tensor] = {}
        category = Category.GRADIENT if sharing.bucket_view else HELD
        for dtype in by_dtype(self.exchanged):
            for block, part in by_block([p for p in self.exchanged if p.dtype == dtype]).items():
                with self.machine.ledger.at("" if block is None else f"blocks.{block}", block, "DDP bucket"):
                    self.buckets.append(self.machine.empty((elements(part),), dtype, category=category).hold())
                self.bucket_of |= dict.fromkeys(part, self.buckets[-1])
                if sharing.bucket_view:
                    mine = [(p.storage.where, dtype.itemsize * p.numel) for p in part]
                    self.machine.ledger.gradients[self.buckets[-1].storage] = mine
        self.machine.on_gradient = self.gradient_ready
        self.machine.on_backward_end = self.after_backward

    @property
    def exchanges(self) -> bool:
        """Gradients are exchanged in the last micro-batch only (`no_sync`)."""
        return self.machine.ledger.micro_batch == self.last

    def before_forward(self) -> None:
        """`_sync_buffers`: once a step the model's buffers are broadcast, through a flat copy."""
        if self.buffers and self.machine.ledger.micro_batch == 0:
            with self.machine.ledger.at("", None, "broadcast_coalesced"):
                flat = self.machine.empty((elements(self.buffers),), self.buffers[0].dtype, category=HELD).hold()
                self.machine.collective("broadcast", DATA, flat, waits="step")
                flat.drop()

    def gradient_ready(self, p: Tensor) -> None:
        """`mark_variable_ready_dense`: the gradient, divided by D, goes into its bucket."""
        if self.exchanges and p in self.bucket_of:  # not what a stage of a pipeline has received, nor experts
            assert p.grad is not None
            self.ready.append(p)
            with python_number(self.machine, p.dtype):
                self.machine.kernel("mul", (p.grad,), (p.grad,))
            if self.sharing.bucket_view:
                bucket, grad = self.bucket_of[p], p.grad
                p.grad = Tensor(p.machine, bucket.storage, p.shape, p.machine.contiguous(p.shape), p.dtype).hold()
                grad.drop()

    def after_backward(self) -> None:
        """`finalize_backward`: the sums go back into the gradients."""
        if self.exchanges:
            stack = self.machine.stack
            for ready in by_dtype(self.ready).values():  # a bucket has one dtype
                whole = sum((stack.times(p.storage.where.block) * p.numel for p in ready), ZERO)
                with self.machine.ledger.at("", None, "all_reduce_bucket"):
                    self.machine.collective(
                        "all-reduce", DATA, ready[0], waits="update", elements=whole, count=buckets(ready)
                    )
            for p in () if self.sharing.bucket_view else self.exchanged:
                assert p.grad is not None
                with at_parameter(p, "finalize_bucket_dense"):
                    self.machine.kernel("copy_", (p.grad,), (p.grad,))


class MainGradients(Replica):
    """Gradients that are added up in fp32 and summed over the accelerators as they are, without buckets.

    `trainer.parallel.distributed.World.mean`, after the last micro-batch.
    """

    def sum_up(self, updated: Sequence[Tensor]) -> None:
        """An all-reduce of each, and its mean."""
        for p in updated:
            assert p.grad is not None
            with at_parameter(p, "all_reduce"):
                self.machine.collective("all-reduce", DATA, p.grad, waits="step")
                with python_number(self.machine, p.grad.dtype):
                    self.machine.kernel("div_", (p.grad,), (p.grad,))


class ShardedUpdate(Buckets):
    """ZeRO-1: DDP, and each accelerator updates its rows of every parameter, then all broadcast theirs, in place."""

    def __init__(self, model: Model, sharing: Sharing) -> None:
        super().__init__(model, sharing)
        self.updated = [self._rows(p, sharing.rank) for p in self.parameters]
        self.padded = [self._rows(p, 0).shape for p in self.parameters]

    def before_update(self) -> None:
        """The rows' gradients are rows of the gradients, which they keep."""
        for rows, p in zip(self.updated, self.parameters, strict=True):
            assert p.grad is not None
            rows.grad = self._rows(p.grad, self.sharing.rank)
        zero_grad(self.parameters)

    def agree_on_overflow(self, found: Tensor) -> None:
        """Ask the others."""
        self.machine.collective("all-reduce", DATA, found, waits="step")

    def after_update(self) -> None:
        """`Weights.spread`: all broadcast their rows of each parameter, in place."""
        for p in self.parameters:
            with at_parameter(p, "broadcast"):
                self.machine.collective("broadcast", DATA, p, waits="step", count=pieces(p.shape[0]))
        super().after_update()

    def _rows(self, x: Tensor, rank: int) -> Tensor:
        """The rows of x of an accelerator, a view."""
        rows = rows_on(self.machine, x.shape[0], rank)
        return Tensor(x.machine, x.storage, (rows, *x.shape[1:]), x.stride, x.dtype).hold()

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """Each accelerator has its rows' part of the norm."""
        clip_parts(parameters, (DATA,))


def clip_parts(parameters: Sequence[Tensor], axes: Sequence[str]) -> None:
    """`trainer.parallel.distributed.Weights.clip`: norms, squared and summed over the accelerators; one factor.

    Of the matrices that are cut along the tensor axis, and of experts that are shared out, the squares are summed over
    their axis; of all else its ranks have the same. Then all are summed over the other `axes`.
    """
    machine = parameters[0].machine
    cut = next((axis for axis in (TENSOR, EXPERT) if axis in axes), "")
    groups = [[p for p in parameters if (cut in p.placement) is has] for has in (True, False)]
    with machine.ledger.at("clipping", None, "Weights.clip"), Locals() as v:
        for has, group in zip((True, False), groups, strict=True):
            if not group:
                continue
            squares = _squared(group)
            if has:
                machine.collective("all-reduce", cut, squares, waits="step")
            v.squares = squares
        for axis in axes:
            if axis != cut:
                machine.collective("all-reduce", axis, v.squares, waits="step")
        for p in parameters:
            assert p.grad is not None
            with at_parameter(p, "_foreach_mul_"):
                in_place("mul_", p.grad, arithmetic=1)


def _squared(parameters: Sequence[Tensor]) -> Tensor:
    """The sum of the squares of the norms of their gradients, a scalar."""
    machine, count = parameters[0].machine, number_of(parameters)
    norms = gradient_norms(parameters)
    dtype = norms[0].dtype
    stacked = machine.empty((count,), dtype).hold()
    for p, norm in zip(parameters, norms, strict=True):
        with at_parameter(p, "vector_norm"):
            norm.drop()
    squares = machine.empty((count,), dtype).hold()
    stacked.drop()
    out = machine.empty((), dtype)
    squares.drop()
    return out


def by_block(parameters: Sequence[Tensor]) -> dict[int | None, list[Tensor]]:
    """The parameters of each block, and under None all others."""
    groups: dict[int | None, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(p.storage.where.block, []).append(p)
    return groups


def by_dtype(parameters: Sequence[Tensor]) -> dict[Dtype, list[Tensor]]:
    """The parameters of each dtype."""
    groups: dict[Dtype, list[Tensor]] = {}
    for p in parameters:
        groups.setdefault(p.dtype, []).append(p)
    return groups


def elements(tensors: Sequence[Tensor]) -> Size:
    """Of all of them together."""
    return sum((t.numel for t in tensors), ZERO)
