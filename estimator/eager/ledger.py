"""The ledger: everything a step does to memory, in order, and every kernel that it launches."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from estimator.eager.letters import ONE, ZERO, Size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.eager.sizes import Fact


class Phase(StrEnum):
    """When in a run something happens; SETUP is all that is alive before the step."""

    SETUP = "setup"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Category(StrEnum):
    """What bytes are for, over their whole life: a temporary that autograd saves is an activation from the start.

    COMMUNICATION is what collectives send and receive: DDP's buckets, and under FSDP all that is whole for a while.
    """

    PARAMETER = "parameters"
    GRADIENT = "gradients"
    OPTIMIZER = "optimizer"
    ACTIVATION = "activations"
    TEMPORARY = "temporary"
    INPUT = "inputs"
    BUFFER = "buffers"
    COMMUNICATION = "communication"


@dataclass(eq=False, slots=True)
class Storage:
    """One allocation, of elements of `itemsize` bytes; or `copies` of one, which together have `nbytes`.

    `owners` counts the tensors that share it; `hooked` says that saved_tensors_hooks sees it saved.
    """

    nbytes: Size
    itemsize: int
    category: Category
    where: Where
    owners: int = 0
    hooked: bool = False
    copies: Size = ONE
    host: bool = False  # in the host's memory


class Where(NamedTuple):
    """The place in the step: phase, module path, block index (None outside the blocks), operator."""

    phase: Phase
    module: str
    block: int | None
    op: str


class Event(NamedTuple):
    """An allocation (sign 1) or a free (sign -1), in the forward or backward of a micro-batch."""

    sign: int
    storage: Storage
    where: Where
    micro_batch: int


class Gemm(NamedTuple):
    """A batched matrix product (b, m, k) x (b, k, n).

    `rows` is "m" or "k" where the batch is of experts: the dimension that is an expert's rows, of which it is the mean.
    """

    b: Size
    m: Size
    n: Size
    k: Size
    rows: str = ""


class Operand(NamedTuple):
    """What a kernel reads or writes of a storage, in bytes."""

    storage: Storage
    nbytes: Size
    written: bool


# How a kernel walks its operands: all alike; some in another layout or broadcast; some in another floating dtype; both.
ACCESSES = ("plain", "strided", "cast", "cast-strided")


class Kernel(NamedTuple):
    """One launch: its matrix FLOPs (2 a multiply-add), other arithmetic, bytes moved, its shape, its turn."""

    name: str
    where: Where
    flops: Size
    arithmetic: Size
    nbytes: Size
    gemm: Gemm | None
    recompute: bool
    micro_batch: int
    repeated: Size  # of the FLOPs, those that repeat forward: all under a checkpoint, the scores in a flash backward
    operands: tuple[Operand, ...]  # what the bytes are of: fused, a kernel no longer moves what stays inside
    access: str = "plain"  # one of `ACCESSES`
    leading: tuple[Size, ...] = ()  # of a product, elements from one row of a matrix to the next (BLAS's lda, ldb, ldc)


# What cannot go on before a message has arrived: the step itself; the kernels of the unit whose parameters it gathers;
# the optimizer.
WAITS = ("step", "unit", "update")


@dataclass(frozen=True, slots=True)
class Message:
    """A collective, or several of a kind in a row.

    Attributes:
        kind: "all-gather", "reduce-scatter", "all-reduce", "broadcast" or "all-to-all".
        axis: the axis of the device mesh whose ranks take part.
        nbytes: bytes of the whole tensors, of all of them together: what a gather gives and what a reduction takes.
        count: how many there are.
        dtype, itemsize: of what is sent.
        waits: one of `WAITS`.
        where, micro_batch: when it is sent.
    """

    kind: str
    axis: str
    nbytes: Size
    count: Size
    dtype: str
    itemsize: int
    waits: str
    where: Where
    micro_batch: int


@dataclass(slots=True)
class Ledger:
    """Written by a run, read by `estimator.accounting.accounts`."""

    events: list[Event] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    host_events: list[Event] = field(default_factory=list)  # of the host's memory, where that is another
    host_kernels: list[Kernel] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    copies: list[tuple[Where, int, Size]] = field(default_factory=list)  # to and from the host: micro-batch, bytes
    saved: list[Storage] = field(default_factory=list)
    facts: dict[Fact, bool] = field(default_factory=dict)  # what the step asked of its sizes, and the answers
    parameters: list[tuple[Where, Size]] = field(default_factory=list)  # each one's place and number of elements
    trained: list[tuple[Where, Size]] = field(default_factory=list)  # those of them that are trained
    gradients: dict[Storage, list[tuple[Where, Size]]] = field(default_factory=dict)  # whose bytes are in a storage
    micro_batch: int = 0
    phase: Phase = Phase.SETUP
    module: str = ""
    block: int | None = None
    op: str = ""
    recompute: bool = False
    host: bool = False  # what is allocated and runs is the host's
    updates: bool = False  # what runs is the optimizer's, whatever the phase
    places: dict[Where, Where] = field(default_factory=dict)  # each place once: a seventh of what the events would have

    @property
    def here(self) -> Where:
        """The place that the next event will carry."""
        where = Where(self.phase, self.module, self.block, self.op)
        return self.places.setdefault(where, where)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Kernels in this context are the optimizer's, in the phase that the step is in."""
        before, self.updates = self.updates, True
        try:
            yield
        finally:
            self.updates = before

    def allocate(self, elements: Size, itemsize: int, category: Category, copies: Size = ONE) -> Storage:
        """A new storage of so many elements, or so many `copies` of one."""
        nbytes = itemsize * elements if copies is ONE else itemsize * elements * copies
        storage = Storage(nbytes, itemsize, category, self.here, copies=copies, host=self.host)
        if nbytes is not ZERO:
            self._events(storage).append(Event(1, storage, storage.where, self.micro_batch))
        return storage

    def free(self, storage: Storage) -> None:
        """The last owner of `storage` is gone."""
        if storage.nbytes is not ZERO:
            self._events(storage).append(Event(-1, storage, self.here, self.micro_batch))

    def _events(self, storage: Storage) -> list[Event]:
        """Those of the memory that a storage is in."""
        return self.host_events if storage.host else self.events

    def refill(self, storage: Storage) -> None:
        """A storage that was freed, but not forgotten, is allocated again (`untyped_storage().resize_`)."""
        self.events.append(Event(1, storage, self.here, self.micro_batch))

    @contextmanager
    def inside(self, module: str, block: int | None = None) -> Iterator[None]:
        """Everything in this context happens in the sub-module `module` (of block `block`, where it is one)."""
        before = self.module, self.block
        self.module = f"{before[0]}.{module}" if before[0] else module
        if block is not None:
            self.block = block
        try:
            yield
        finally:
            self.module, self.block = before

    @contextmanager
    def at(self, module: str, block: int | None, op: str) -> Iterator[None]:
        """Everything in this context happens at that place: the engine evaluates a node that was recorded there."""
        before = self.module, self.block, self.op
        self.module, self.block, self.op = module, block, op
        try:
            yield
        finally:
            self.module, self.block, self.op = before
