"""Memory of a step on a device: the peak and what holds it, the timeline, and what the allocator adds on CUDA."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.accounting.recorded import RecordedAccount
from estimator.accounting.trace import Trace
from estimator.describe.checks import ConfigError
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ONE, as_sizes, evaluate
from estimator.memory.allocator import GRANULE, reserved_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account, Values
    from estimator.eager.ledger import Where
    from estimator.hardware.accelerators import Accelerator

# cuBLAS's workspace of one handle and stream, inside memory_allocated: PyTorch's default CUBLAS_WORKSPACE_CONFIG,
# 4096 KiB x 2 + 16 KiB x 8, and 32 MiB from compute capability 9 on (aten/src/ATen/cuda/CublasHandlePool.cpp).
CUBLAS_WORKSPACE = 8_519_680
CUBLAS_WORKSPACE_HOPPER = 32 * 2**20
HOPPER_AND_LATER = ("hopper", "blackwell")
# The CUDA context, outside the allocator: 290 to 670 MB in PyTorch's threads (PR 86509, issues 107667 and 109888).
CONTEXT_BYTES = (290_000_000, 670_000_000)
# NCCL's buffers of one communicator, outside of both: 544 MiB on two and 688 MiB on four A100s with NVLink
# (github.com/NVIDIA/nccl/issues/964), about 1.6 GB (issues/864). They grow with channels and connections, not with the
# number of accelerators beyond two nodes (issues/986).
NCCL_BYTES = (544 * 2**20, 1_600_000_000)


VERDICTS = ("fits", "fits but tight", "does not fit")


@dataclass(frozen=True, eq=False)
class Timeline:
    """A step, event by event. Every array has one entry an event; bytes are those alive after it.

    Attributes:
        live: live bytes.
        categories: live bytes by what they are for; they add up to `live`.
        delta: bytes that the event allocates (or, negative, frees).
        event: index of the event in the ledger, in which a few turns of blocks stand for all.
        turn: which repetition of its middle turn the event is in, 0 of those that happen once.
        turns: how many turns each group of blocks has.
        peak: index of the first event at which `live` is greatest.
        start: live bytes before the first event, which are those after the last.
    """

    live: NDArray[np.int64]
    categories: Mapping[str, NDArray[np.int64]]
    delta: NDArray[np.int64]
    event: NDArray[np.intp]
    peak: int
    start: int
    account: Account | RecordedAccount
    sizes: Mapping[str, int]
    turn: NDArray[np.intp]
    turns: Sequence[int]

    def __len__(self) -> int:
        return len(self.live)

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """The block that each event happens in, -1 outside of them."""
        traced, stack = self.account.traced, self.account.traced.stack
        labels = [e.where.block for e in traced.ledger.events]
        counts = traced.repetitions(self.sizes)
        backward = [e.where.phase is Phase.BACKWARD for e in traced.ledger.events]
        found = np.full(len(self), -1, dtype=np.int64)
        for at, (event, turn) in enumerate(zip(self.event.tolist(), self.turn.tolist(), strict=True)):
            block = labels[event]
            if block is not None:
                group = stack.repeats(block)
                real = turn if group is None or not backward[event] else counts[group] - 1 - turn
                found[at] = stack.real_index(block, self.turns, real)
        return found

    def where(self, index: int) -> Where:
        """Phase, module, block and operator of an event."""
        where = self.account.traced.ledger.events[self.event[index]].where
        if where.block is None:
            return where
        block = int(self.blocks[index])
        return where._replace(block=block, module=where.module.replace(f"blocks.{where.block}", f"blocks.{block}", 1))

    @cached_property
    def phases(self) -> NDArray[np.str_]:
        """The phase of each event."""
        names = np.array([e.where.phase.value for e in self.account.traced.ledger.events])
        return names[self.event]


def timeline(account: Account | RecordedAccount, sizes: Mapping[str, int], granule: int = 1) -> Timeline:
    """The step at `sizes`; storages are rounded up to `granule` bytes each."""
    traced = account.traced
    size = traced.class_bytes(sizes, granule)
    index, turn = traced.repeated(sizes)
    delta = (size[traced.klass] * traced.sign)[index]
    live = delta.cumsum()
    first = int(np.flatnonzero(index >= traced.step)[0])
    category = np.array([list(Category).index(c) for _, c in traced.classes])[traced.klass][index]
    by = {c.value: np.where(category == i, delta, 0).cumsum()[first:] for i, c in enumerate(Category)}
    start = int(live[first - 1])
    return Timeline(
        live=live[first:],
        categories=by,
        delta=delta[first:],
        event=index[first:],
        peak=int(live[first:].argmax()),
        start=start,
        account=account,
        sizes=sizes,
        turn=turn[first:],
        turns=account.turns(sizes),
    )


@dataclass(frozen=True, eq=False)
class Memory:
    """Bytes of one accelerator in a steady step. The first nine are at the peak; the eight parts add up to it.

    Attributes:
        peak: live tensor bytes at the moment when they are most.
        parameters, gradients, optimizer, activations, temporary, inputs, buffers, communication: its parts.
        where: phase, module, block and operator of the peak.
        allocated: on CUDA, the peak with each block rounded to 512 bytes, and the cuBLAS workspace.
        workspace: that workspace.
        context: (least, most) bytes that the CUDA context takes outside the allocator.
        nccl: (least, most) bytes that NCCL's communicators take outside of it, one for each axis of the mesh.
        reserved: on CUDA, what the allocator has asked of the device after two steps (`allocator`, a model).
        reserved_expandable: the same with expandable segments.
        nvidia_smi: (least, most) bytes that the driver shows for the process: reserved, the context and NCCL's.
        capacity: bytes that a framework sees on the accelerator; None if only bytes were asked about.
    """

    peak: int
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    inputs: int
    buffers: int
    communication: int
    where: Where
    allocated: int
    workspace: int
    context: tuple[int, int]
    nccl: tuple[int, int]
    capacity: int | None
    account: Account | RecordedAccount
    sizes: Mapping[str, int]

    @cached_property
    def host(self) -> int:
        """The most bytes that the host keeps for this accelerator (`Plan.offload`), at any moment of the step.

        Tensors' bytes: CUDA's allocator of pinned memory rounds each block up to a power of two
        (aten/src/ATen/core/CachingHostAllocator.h).
        """
        ledger = self.account.traced.ledger
        if not ledger.host_events:
            return 0
        traced = Trace(replace(ledger, events=ledger.host_events), self.account.traced.stack)
        index, _ = traced.repeated(self.sizes)
        return int((traced.class_bytes(self.sizes, 1)[traced.klass] * traced.sign)[index].cumsum().max())

    @property
    def needed(self) -> int:
        """What must be free for the step to run: allocated bytes, and the middles of the context's spread and NCCL's.

        Not the reserved bytes: before the allocator gives up it returns its empty segments to the device.
        """
        return self.allocated + sum(self.context) // 2 + sum(self.nccl) // 2

    @property
    def fits(self) -> bool:
        """Whether `needed` is within the capacity.

        Raises:
            ConfigError: no accelerator was given.
        """
        if self.capacity is None:
            raise ConfigError("accelerator = None: whether a step fits can be said of an accelerator only")
        return self.needed <= self.capacity

    @property
    def can_tip(self) -> dict[str, int]:
        """Bytes that may come on top of `needed`, by what takes them: the rest of each spread, and fragmentation.

        Fragmentation is what the allocator reserves beyond what is allocated at the peak; it returns empty segments
        before it gives up, but not those that are in use in part.
        """
        found = {
            "the CUDA context": self.context[1] - sum(self.context) // 2,
            "NCCL's buffers": self.nccl[1] - sum(self.nccl) // 2,
            "fragmentation": self.reserved - self.allocated,
        }
        return {name: nbytes for name, nbytes in found.items() if nbytes}

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`; tight is what fits only if less than all of `can_tip` comes on top.

        Raises:
            ConfigError: no accelerator was given.
        """
        if not self.fits:
            return "does not fit"
        assert self.capacity is not None
        return "fits" if self.needed + sum(self.can_tip.values()) <= self.capacity else "fits but tight"

    @cached_property
    def logits(self) -> int:
        """Bytes at the peak of the logits and of what a loss makes of them whole: of tensors of (B, T, V).

        T is `Plan.logits_to_keep` where that is less than all.
        """
        a = self.account
        if isinstance(a, RecordedAccount):  # which of its tensors are logits, nobody knows
            return 0
        letters = a.shapes.letters
        alike = a.shapes.product(letters[name] for name in ("B", "T_l" if a.recipe.keeps_last else "T", "V"))
        if alike == ONE:
            return 0
        return int(a.pieces[a.ruling(self.sizes)].live.coefficient(alike)) * evaluate(alike, self.sizes)

    @cached_property
    def reserved(self) -> int:
        """What the allocator has asked of the device after two steps; on the CPU, what is allocated."""
        if self.account.device != "cuda":
            return self.allocated
        return max(reserved_bytes(self.account, self.sizes, self.workspace), self.allocated)

    @cached_property
    def reserved_expandable(self) -> int:
        """The same under `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`."""
        if self.account.device != "cuda":
            return self.allocated
        return max(reserved_bytes(self.account, self.sizes, self.workspace, expandable=True), self.allocated)

    @cached_property
    def messages(self) -> tuple[int, int]:
        """(whole parameters, all else) of `communication`: what `fully_shard` gathers, and gradients on their way."""
        traced = self.account.traced
        made = {id(e.storage): e.where.op for e in traced.ledger.events if e.sign > 0}
        gathered = np.array(
            [
                e.storage.category is Category.COMMUNICATION and made[id(e.storage)].startswith("FSDP all_gather")
                for e in traced.ledger.events
            ]
        )
        index, _ = traced.repeated(self.sizes)
        until = index[: len(index) - len(self.timeline) + self.timeline.peak + 1]
        delta = traced.class_bytes(self.sizes, 1)[traced.klass] * traced.sign * gathered
        whole = int(delta[until].sum())
        return whole, self.communication - whole

    @property
    def nvidia_smi(self) -> tuple[int, int]:
        """(least, most) bytes that the driver shows for the process."""
        least, most = (own + shared for own, shared in zip(self.context, self.nccl, strict=True))
        return self.reserved + least, self.reserved + most

    @cached_property
    def timeline(self) -> Timeline:
        """The step, event by event."""
        return timeline(self.account, self.sizes)

    @property
    def parts(self) -> dict[str, int]:
        """The eight parts of the peak."""
        return {c.value: getattr(self, c.value) for c in Category}

    def to_dict(self) -> dict[str, Any]:
        """Plain fields; the account and its timeline are left out."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("account", "sizes", "where")}
        plain |= {"where": self.where._asdict(), "needed": self.needed, "context": list(self.context)}
        plain |= {"nccl": list(self.nccl), "can_tip": self.can_tip}
        plain |= {"verdict": None if self.capacity is None else self.verdict}
        plain |= {"host": self.host}
        plain |= {"logits": self.logits, "reserved": self.reserved, "reserved_expandable": self.reserved_expandable}
        return plain | {"nvidia_smi": list(self.nvidia_smi)}


def recorded_memory(account: RecordedAccount, accelerator: Accelerator | None) -> Memory:
    """The memory of a recorded step, on `accelerator` if there is one."""
    return memory(account, account, {}, accelerator)


def memory(
    account: Account | RecordedAccount,
    values: Values | RecordedAccount,
    sizes: Mapping[str, int],
    accelerator: Accelerator | None,
) -> Memory:
    """The memory of a step whose figures are `values`, on `accelerator` if there is one."""
    cuda = account.device == "cuda"
    workspace, context, nccl = beside(account, accelerator)
    return Memory(
        peak=values.peak_bytes,
        **values.peak_categories,
        where=values.peak_where,
        allocated=values.peak_bytes if not cuda else rounded_peak(account, sizes) + workspace,
        workspace=workspace,
        context=context,
        nccl=nccl,
        capacity=accelerator.memory_bytes if accelerator is not None else None,
        account=account,
        sizes=sizes,
    )


def beside(
    account: Account | RecordedAccount, accelerator: Accelerator | None
) -> tuple[int, tuple[int, int], tuple[int, int]]:
    """(cuBLAS's workspace, the context's least and most bytes, NCCL's): what a step takes beside its tensors."""
    if account.device != "cuda":
        return 0, (0, 0), (0, 0)
    communicators = len({message.axis for message in account.traced.ledger.messages})
    late = accelerator is not None and accelerator.architecture.lower() in HOPPER_AND_LATER
    workspace = CUBLAS_WORKSPACE_HOPPER if late else CUBLAS_WORKSPACE
    return workspace, CONTEXT_BYTES, (communicators * NCCL_BYTES[0], communicators * NCCL_BYTES[1])


def needed(account: Account, sizes: Mapping[str, Any], accelerator: Accelerator | None) -> NDArray[np.int64]:
    """(points,): `Memory.needed` at each point of `sizes`, numbers or arrays of one length in the account's class."""
    workspace, context, nccl = beside(account, accelerator)
    granule = GRANULE if account.device == "cuda" else 1
    return rounded_peaks(account, sizes, granule) + workspace + sum(context) // 2 + sum(nccl) // 2


def rounded_peaks(account: Account, sizes: Mapping[str, Any], granule: int = GRANULE) -> NDArray[np.int64]:
    """(points,): `rounded_peak` at each point of `sizes`, numbers or arrays of one length."""
    traced, values = account.traced, as_sizes(sizes)
    columns = [np.atleast_1d(np.asarray(n)).astype(np.int64) for n in traced.rounded_classes(values, granule)]
    times = [np.atleast_1d(np.asarray(values.value(n))).astype(np.int64) for n in traced.stack.repetitions]
    points = max(map(len, (*columns, *times)))
    size = np.stack([np.broadcast_to(column, points) for column in columns])
    live = traced.moment_counts[:, 0] @ size
    for at, turns in enumerate(times, 1):
        live += (traced.moment_counts[:, at] @ size) * turns
    return np.asarray(live.max(0))


def rounded_peak(account: Account | RecordedAccount, sizes: Mapping[str, int], granule: int = GRANULE) -> int:
    """The peak if every storage takes a multiple of `granule` bytes, over all moments of the step, exactly."""
    traced = account.traced
    size = traced.class_bytes(sizes, granule)
    times = np.array([1, *traced.repetitions(sizes)], dtype=np.int64)
    return int(((traced.moment_counts @ size) @ times).max())
