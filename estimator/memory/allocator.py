"""What PyTorch's CUDA caching allocator reserves for a step: its rules, run over the ledger's events.

The rules are c10/cuda/CUDACachingAllocator.cpp's with its default settings: requests are rounded to 512 bytes; the
smallest free block that is large enough is taken, and split if enough is left over; else a new segment is asked of
CUDA, of 2 MiB for requests of at most 1 MiB, of 20 MiB below 10 MiB, rounded up to 2 MiB above; freed neighbours in a
segment are merged; a segment is kept. With `PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True` each pool is one segment
that grows at its end by pages, so that what is free there is joined with what is added. Frees of equal blocks of
different layers may come in another order than here, another library's allocations are not known, and all is taken to
run on one stream, so `reserved` is a model.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

import numpy as np

from estimator.eager.ledger import Category, Phase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account
    from estimator.accounting.recorded import RecordedAccount

GRANULE = 512  # kMinBlockSize
SMALL = 2**20  # kSmallSize: the greatest request of the pool of small blocks; a large split must leave more
SMALL_SEGMENT = 2 * 2**20  # kSmallBuffer
LARGE_SEGMENT = 20 * 2**20  # kLargeBuffer
LARGE_BELOW = 10 * 2**20  # kMinLargeAlloc
ROUND_LARGE = 2 * 2**20  # kRoundLarge
FAR = 2**60  # where the large pool's growing segment begins, behind all of the small one's


def rounded(nbytes: int) -> int:
    """A request as the allocator serves it (`round_size`)."""
    return max(GRANULE, -(-nbytes // GRANULE) * GRANULE)


class Block:
    """A piece of a segment, free or not, between its neighbours in it."""

    __slots__ = ("after", "before", "free", "nbytes", "small", "start")

    def __init__(self, start: int, nbytes: int, *, small: bool) -> None:
        self.start, self.nbytes, self.small = start, nbytes, small
        self.free = True
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Segments and blocks of one device and stream.

    Args:
        expandable: whether each pool is one segment that grows (`expandable_segments:True`).

    Attributes:
        reserved: bytes of all segments, what `torch.cuda.memory_reserved` says.
        allocated: bytes of the blocks in use, `torch.cuda.memory_allocated`.
    """

    def __init__(self, *, expandable: bool = False) -> None:
        self.expandable = expandable
        self.reserved = self.allocated = 0
        self._last: dict[bool, Block | None] = {True: None, False: None}  # of the growing segments, by pool
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}  # (bytes, start), in order, by pool
        self._blocks: dict[int, Block] = {}  # by start

    def allocate(self, nbytes: int) -> Block:
        """`malloc`: a block of at least `nbytes`."""
        wanted = rounded(nbytes)
        block = self._taken(wanted, small=wanted <= SMALL)
        left = block.nbytes - wanted
        if left >= GRANULE if block.small or self.expandable else left > SMALL:
            self._split(block, wanted)
        block.free = False
        self.allocated += block.nbytes
        return block

    def free(self, block: Block) -> None:
        """`free`: back into its pool, one with its free neighbours."""
        self.allocated -= block.nbytes
        block.free = True
        before, after = block.before, block.after
        if before is not None and before.free:
            self._forget(before)
            block = self._merged(before, block)
        if after is not None and after.free:
            self._forget(after)
            block = self._merged(block, after)
        self._offer(block)

    def _merged(self, first: Block, second: Block) -> Block:
        del self._blocks[second.start]
        first.nbytes += second.nbytes
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        elif self.expandable:
            self._last[first.small] = first
        return first

    def _taken(self, wanted: int, *, small: bool) -> Block:
        """The best fit of the pool, or a new segment."""
        pool = self._free[small]
        at = bisect_left(pool, (wanted, -1))
        last = self._last[small]
        if last is not None and at + 1 < len(pool) and pool[at][1] == last.start:
            at += 1  # what can grow is the largest of all
        if at < len(pool):
            _, start = pool.pop(at)
            return self._blocks[start]
        if self.expandable:
            return self._grown(wanted, last, small=small)
        segment = SMALL_SEGMENT
        if not small:
            segment = LARGE_SEGMENT if wanted < LARGE_BELOW else -(-wanted // ROUND_LARGE) * ROUND_LARGE
        block = self._blocks[self.reserved] = Block(self.reserved, segment, small=small)
        self.reserved += segment
        return block

    def _grown(self, wanted: int, last: Block | None, *, small: bool) -> Block:
        """`try_allocate_expandable_block`: the end of the pool's segment, with as many pages as are missing."""
        page = SMALL_SEGMENT if small else LARGE_SEGMENT
        missing = wanted - (last.nbytes if last is not None and last.free else 0)
        added = -(-missing // page) * page
        self.reserved += added
        if last is not None and last.free:
            self._forget(last)
            last.nbytes += added
            return last
        start = FAR * (not small) if last is None else last.start + last.nbytes
        block = self._blocks[start] = self._last[small] = Block(start, added, small=small)
        block.before = last
        if last is not None:
            last.after = block
        return block

    def _split(self, block: Block, wanted: int) -> None:
        rest = Block(block.start + wanted, block.nbytes - wanted, small=block.small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        elif self.expandable:
            self._last[block.small] = rest
        block.after, block.nbytes = rest, wanted
        self._blocks[rest.start] = rest
        self._offer(rest)

    def _offer(self, block: Block) -> None:
        self._blocks[block.start] = block
        insort(self._free[block.small], (block.nbytes, block.start))

    def _forget(self, block: Block) -> None:
        pool = self._free[block.small]
        pool.pop(bisect_left(pool, (block.nbytes, block.start)))


def reserved_bytes(
    account: Account | RecordedAccount,
    sizes: Mapping[str, int],
    workspace: int,
    steps: int = 2,
    *,
    expandable: bool = False,
) -> int:
    """Bytes that the allocator has reserved after so many steps at `sizes`, cuBLAS's workspace among them.

    The optimizer's state is made in the first step, after the gradients, as torch.optim makes it. What is made and gone
    again before the first step never was: what is sharded is built on the meta device, and of it only the shards are
    made (`torch.device("meta")`, `fully_shard`, `to_empty`).
    """
    traced = account.traced
    nbytes = traced.class_bytes(sizes)
    events = traced.expand(sizes)
    setup, step = events[events < traced.step], events[events >= traced.step]
    phases = np.array([e.where.phase is Phase.OPTIMIZER for e in traced.ledger.events])
    late = np.array([e.storage.category is Category.OPTIMIZER for e in traced.ledger.events])
    update = int(np.argmax(phases[step]))
    allocator = CachingAllocator(expandable=expandable)
    live: dict[int, list[tuple[int, Block]]] = {}  # by size class, (storage, block), the youngest last

    def play(indices: NDArray[np.intp]) -> None:
        for i in indices:
            held, storage = live.setdefault(int(traced.klass[i]), []), id(traced.ledger.events[i].storage)
            if traced.sign[i] > 0:
                held.append((storage, allocator.allocate(int(nbytes[traced.klass[i]]))))
                continue
            if not held:  # what a module keeps from the step before, where it had another category
                alike = (live[k] for k in live if nbytes[k] == nbytes[traced.klass[i]] and live[k])
                held = next(alike)
            # A middle block may free what the block before it made: of the same size, under another name.
            own = next((at for at in range(len(held) - 1, -1, -1) if held[at][0] == storage), -1)
            allocator.free(held.pop(own)[1])

    passing = {id(e.storage) for e in traced.ledger.events[: traced.step] if e.sign < 0}
    lasting = np.array([id(e.storage) not in passing for e in traced.ledger.events[: traced.step]], dtype=bool)
    play(setup[~late[setup] & lasting[setup]])
    if workspace:
        allocator.allocate(workspace)
    for turn in range(steps):
        play(step[:update])
        if turn == 0:
            play(setup[late[setup]])
        play(step[update:])
    return allocator.reserved
