"""The kernels of a step as one table: what each computes and moves, how often, at any sizes.

Equal launches are one row. A row's figures are polynomials in the legend's letters; a `Table` evaluates all of them at
one point or at ten thousand with two matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from estimator.eager.ledger import Category, Gemm, Phase
from estimator.eager.letters import ONE, ZERO, as_sizes
from estimator.timing.float8 import SCALED, Casts, multiplies

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from estimator.accounting.accounts import Account
    from estimator.accounting.recorded import RecordedAccount
    from estimator.accounting.trace import Trace
    from estimator.eager.ledger import Kernel
    from estimator.eager.letters import Size

KINDS = ("matmul", "attention", "elementwise", "optimizer")
FLASH = ("flash_attention", "flash_attention_backward", "masked_attention", "masked_attention_backward")


@dataclass(frozen=True, slots=True)
class Variant:
    """What of a step the ledger of a plain eager one does not say.

    Attributes:
        fused: parts of the step ("model", "loss") whose elementwise kernels are fused, as `torch.compile` fuses them.
        by_hand: a library has a kernel for each module, so that none spans two modules and the host still calls as many
            operators as an eager step does; else compiled code launches them.
        wide: what runs in fp32 though the model has 16 bits ("norm", "rotation"), as in most libraries: twice the
            bytes, a cast before and one after, and the same in backward.
        whole: of these, what no compiler fuses (complex numbers).
        apart: modules, by the last part of their names, whose kernels no library fuses.
        float8: how the scales of products in 8 bits are made ("tensorwise", "rowwise"); empty where there are none.
    """

    fused: frozenset[str] = frozenset()
    by_hand: bool = False
    wide: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    apart: frozenset[str] = frozenset()
    float8: str = ""


class Row(NamedTuple):
    """Equal kernels: of one kind, phase and shape."""

    kind: str
    name: str
    phase: Phase
    turn: str  # "first" micro-batch, "later" ones, or "step": once an optimizer step
    gemm: Gemm | None
    width: int  # bytes of one element of a matrix product's factors
    nbytes: Size
    listed: Size  # elements, where one launch goes over a list of tensors; else zero
    access: str = "plain"  # how it walks its operands (`estimator.eager.ledger.ACCESSES`)
    elements: Size = ZERO  # that it goes over one at a time, where it walks them otherwise than plainly
    leading: tuple[Size, ...] = ()  # steps from row to row of a product's matrices
    calls: int = 1  # of the host, for one launch
    float8: bool = False  # a product of factors of 8 bits


EAGER = Variant()
FUSED = Variant(frozenset({"model", "loss"}))  # as `torch.compile` fuses
FUSED_BY_HAND = Variant(FUSED.fused, by_hand=True)  # as Megatron's and apex's kernels are
HALF = 2  # bytes of 16 bits
ALIGNED = 8  # elements of 16 bits: the rows of every matrix must begin at 16 bytes for the fastest kernels
COLUMNS = ("b", "m", "n", "k", "nbytes", "listed", "elements")
# Elements of one launch over a list of tensors: 320 blocks of 65,536 (aten/src/ATen/native/cuda/MultiTensorApply.cuh,
# depth_to_max_blocks and kChunkSize). What also ends a launch, 30 to 110 tensors, is left out: such tensors are small.
LISTED = 320 * 65_536
TOTALS = ("parameters", "parameter_bytes", "gradient_bytes")


@lru_cache(maxsize=32)  # each keeps its account alive
def table(account: Account, variant: Variant = EAGER) -> Table:
    """The kernels of a step of `account`, run as `variant` says."""
    recipe = account.recipe
    listed = account.device == "cuda" and recipe.optimizer_impl in ("foreach", "fused")
    totals = {name: getattr(account.executed, name) for name in TOTALS}
    every = recipe.checkpoint_every if recipe.checkpointing != "none" else None
    return _table(account.traced, variant, listed, totals, every)


@lru_cache(maxsize=8)
def recorded_table(account: RecordedAccount, *, listed: bool, variant: Variant = EAGER) -> Table:
    """The kernels of a recorded step, on whatever device; `listed`: its optimizer goes over lists of tensors."""
    found = _table(account.traced, variant, listed, {}, None)
    found.checkpoints = account.checkpoints
    return found


def _table(traced: Trace, variant: Variant, listed: bool, totals: Mapping[str, Size], every: int | None) -> Table:
    stack = traced.stack
    counts: dict[Row, list[int]] = {}  # launches once, and for each repetition of each group of blocks
    for each, block in _rows(traced, variant):
        row = each if listed else each._replace(listed=ZERO)
        at = stack.repeats(block)
        launches = counts.setdefault(row, [0] * (1 + len(stack.repeated)))
        launches[0 if at is None else 1 + at] += 1
    return Table(list(counts), list(counts.values()), totals, stack.repetitions, every)


def _rows(traced: Trace, variant: Variant) -> Iterator[tuple[Row, int | None]]:
    """Every launch of the ledger as (row, block)."""
    last = _last_reads(traced)
    group: list[tuple[int, Kernel]] = []
    before: tuple[str, Kernel] | None = None  # what ran in fp32 just now
    casts = Casts(variant.float8)
    for at, kernel in enumerate(traced.ledger.kernels):
        if kernel.micro_batch > 1 and kernel.where.phase is not Phase.OPTIMIZER:  # as the one before it
            continue
        if group and not (_is_fused(kernel, variant) and _together(group[-1][1], kernel, variant)):
            yield from _fused(group, last, variant)
            casts.fuse(each for _, each in group)
            group = []
        if _is_fused(kernel, variant):
            group.append((at, kernel))
            continue
        part = _wide_part(kernel, variant)
        if before is not None and before[0] != part:
            yield _cast_row(before[1]), before[1].where.block
        if part and (before is None or before[0] != part):
            yield _cast_row(kernel), kernel.where.block
        before = (part, kernel) if part else None
        if variant.float8 and multiplies(kernel):
            for cast in casts.before(kernel):
                yield _row(cast), cast.where.block
            yield _row(casts.product(kernel))._replace(float8=True), kernel.where.block
            for scaled in casts.after(kernel):
                yield _row(scaled), scaled.where.block
            continue
        yield _row(kernel, _wide_bytes(kernel) if part else None), kernel.where.block
    if group:
        yield from _fused(group, last, variant)


ROTATING = ("mul", "sub", "add", "add_", "neg", "cat")


def _wide_part(kernel: Kernel, variant: Variant) -> str:
    """Which of `Variant.wide` a kernel of 16 bits belongs to; nothing where to none."""
    if not variant.wide or kernel.gemm is not None or kernel.where.phase is Phase.OPTIMIZER or not kernel.operands:
        return ""
    if kernel.operands[-1].storage.itemsize != HALF:
        return ""
    module = kernel.where.module.rpartition(".")[2]
    part = "norm" if module.endswith("norm") else "rotation" if _rotates(kernel, module) else ""
    return part if part in variant.wide else ""


def _rotates(kernel: Kernel, module: str) -> bool:
    return module == "attention" and kernel.name in ROTATING


def _wide_bytes(kernel: Kernel) -> Size:
    """Its bytes with operands of 16 bits in 32."""
    return sum((x.nbytes * (2 if x.storage.itemsize == HALF else 1) for x in kernel.operands), ZERO)


def _cast_row(kernel: Kernel) -> Row:
    """A cast of what a kernel writes between 16 and 32 bits."""
    out = kernel.operands[-1]
    cast = kernel._replace(name="_to_copy", access="cast", operands=(out, out))
    return _row(cast, 3 * out.nbytes)


def kind_of(kernel: Kernel) -> str:
    """One of `KINDS`: a batched product is attention's, whichever kernel does it, unless its batch is of experts."""
    if kernel.where.phase is Phase.OPTIMIZER:
        return "optimizer"
    if kernel.gemm is None:
        return "elementwise"
    return "matmul" if kernel.gemm.b == ONE or kernel.gemm.rows else "attention"


def _is_fused(kernel: Kernel, variant: Variant) -> bool:
    part = "loss" if kernel.where.module.startswith("loss") else "model"
    if part not in variant.fused or kind_of(kernel) != "elementwise":
        return False
    if kernel.where.module.rpartition(".")[2] in variant.apart:
        return False
    return not variant.whole or _wide_part(kernel, variant) not in variant.whole


def _together(a: Kernel, b: Kernel, variant: Variant) -> bool:
    if variant.by_hand and a.where.module != b.where.module:
        return False
    return (a.where.phase, a.micro_batch) == (b.where.phase, b.micro_batch)


def _last_reads(traced: Trace) -> dict[int, int]:
    """Storage -> index of the last kernel that reads it. What lives on for the optimizer is read later than all."""
    last = {}
    for at, kernel in enumerate(traced.ledger.kernels):
        for operand in kernel.operands:
            if not operand.written:
                last[id(operand.storage)] = at
    return last


def _fused(
    group: Sequence[tuple[int, Kernel]], last: Mapping[int, int], variant: Variant
) -> Iterator[tuple[Row, int | None]]:
    """One kernel for several: it reads once what comes from outside, and writes what is read afterwards.

    A library's kernel of fp32 is given its activation in fp32, and gives its gradient so: there is a cast before the
    one and after the other, and the kernel moves 2 bytes more of each element.
    """
    end, final = group[-1]
    made: set[int] = set()
    moved: dict[tuple[int, bool], Size] = {}
    for _, kernel in group:
        for storage, nbytes, written in kernel.operands:
            kept = storage.category in (Category.GRADIENT, Category.PARAMETER) or last.get(id(storage), -1) > end
            if kept if written else id(storage) not in made:
                moved.setdefault((id(storage), written), nbytes)
            if written:
                made.add(id(storage))
    nbytes = sum(moved.values(), ZERO)
    if variant.by_hand and (widest := _widest(group, variant)) is not None:
        yield _cast_row(widest), widest.where.block
        nbytes = nbytes + widest.operands[-1].nbytes
    row = _row(final._replace(name="fused"), nbytes)
    yield row._replace(calls=len(group) if variant.by_hand else 1), final.where.block


def _widest(group: Sequence[tuple[int, Kernel]], variant: Variant) -> Kernel | None:
    """Of the kernels of 16 bits in `Variant.wide` the one that writes most; None where none is."""
    those = [kernel for _, kernel in group if _wide_part(kernel, variant)]
    return max(those, key=lambda kernel: max(len(x) for x, _ in kernel.operands[-1].nbytes.terms), default=None)


def _row(kernel: Kernel, nbytes: Size | None = None) -> Row:
    """The row of a kernel, which may move other bytes than its own."""
    kind = kind_of(kernel)
    phase = kernel.where.phase
    turn = "step" if phase is Phase.OPTIMIZER else "later" if kernel.micro_batch else "first"
    width = kernel.operands[0].storage.itemsize if kernel.operands else 4
    on_a_list = kind == "optimizer" and kernel.gemm is None and kernel.operands
    listed = kernel.operands[0].nbytes / width if on_a_list else ZERO
    access = kernel.access if kind == "elementwise" and kernel.name != "fused" else "plain"
    elements = ZERO if access == "plain" else elements_of(kernel)
    leading = kernel.leading if width == 2 and kernel.name not in FLASH else ()
    moved = kernel.nbytes if nbytes is None else nbytes
    row = Row(kind, kernel.name, phase, turn, kernel.gemm, width, moved, listed, access, elements, leading)
    return row._replace(float8=kernel.name == SCALED)


def elements_of(kernel: Kernel) -> Size:
    """Elements that a kernel without a product goes over: of what it writes, of what it reduces where it is a sum."""
    operand = kernel.operands[0] if kernel.name == "sum" else kernel.operands[-1]
    return operand.nbytes / operand.storage.itemsize


class Table:
    """Rows of kernels, ready to evaluate.

    Attributes:
        rows: what differs between launches.
        kind, phase, width: of each row, its kind, its phase, bytes of an element of its factors.
        flash, backward, gemm: of each row, whether it is a fused attention, such a one's backward, any other product.
        float8: of each row, whether it is a product of factors of 8 bits.
        masked: of each row, whether it is a fused attention that reads a mask, and so computes every score.
        grouped: "m" and "k": of each row, whether that dimension of its product is an expert's rows.
        checkpoint_every: of the blocks every so many-th is recomputed; None where none is.
        checkpoints: what is recomputed in a step besides, in a recorded one.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        times: Sequence[Sequence[int]],
        totals: Mapping[str, Size],
        repetitions: Sequence[Size],
        checkpoint_every: int | None,
    ) -> None:
        self.rows = tuple(rows)
        self.checkpoint_every = checkpoint_every
        self.checkpoints = 0
        self._repetitions = repetitions
        self.kind = np.array([row.kind for row in rows])
        self.phase = np.array([row.phase for row in rows])
        self.width = np.array([row.width for row in rows])
        self.flash = np.array([row.name in FLASH for row in rows])
        self.backward = self.flash & np.array([row.name.endswith("_backward") for row in rows])
        self.masked = self.flash & np.array([row.name.startswith("masked") for row in rows])
        self.gemm = np.array([row.gemm is not None for row in rows]) & ~self.flash
        self.grouped = {
            name: np.array([row.gemm is not None and row.gemm.rows == name for row in rows]) for name in ("m", "k")
        }
        self.calls = np.array([row.calls for row in rows])
        self.float8 = np.array([row.float8 for row in rows])
        self._later = np.array([row.turn == "later" for row in rows])
        steps = {step: at for at, step in enumerate(dict.fromkeys(x for row in rows for x in row.leading))}
        self._steps = tuple(steps)
        self._has = np.zeros((len(self.rows), len(steps)), dtype=np.int64)
        for at, row in enumerate(rows):
            self._has[at, [steps[step] for step in row.leading]] = 1
        self._times = np.array(times, dtype=np.float64)
        self._totals = tuple(totals)
        shapes = [row.gemm or Gemm(ZERO, ZERO, ZERO, ZERO) for row in rows]
        columns = [getattr(shape, name) for name in COLUMNS[:4] for shape in shapes]
        moved = [getattr(row, name) for name in COLUMNS[4:] for row in rows]
        places: dict[Size, int] = {}  # of one of each: a tenth of all
        self._places = [places.setdefault(size, len(places)) for size in (*columns, *moved, *totals.values())]
        index: dict[tuple[int, ...], int] = {}
        terms = [
            (at, index.setdefault(x, len(index)), float(c)) for at, size in enumerate(places) for x, c in size.terms
        ]
        self._letters = sorted({i for x in index for i in x})
        self._exponents = np.array([[x.count(i) for i in self._letters] for x in index], dtype=np.float64)
        self._coefficients = np.zeros((len(places), len(index)))
        for at, monomial, coefficient in terms:
            self._coefficients[at, monomial] = coefficient

    def at(self, sizes: Mapping[str, Any]) -> dict[str, NDArray[np.float64]]:
        """`COLUMNS`, each (rows, points), and `TOTALS`, each (points,); sizes are numbers or arrays of one length.

        Through logarithms, so to some 13 digits: times need no more.
        """
        known = as_sizes(sizes)
        arrays = [np.atleast_1d(np.asarray(known.of(i), dtype=np.float64)) for i in self._letters]
        logs = np.log(np.stack(np.broadcast_arrays(*arrays))) if arrays else np.zeros((0, 1))  # numbers have no letters
        values = (self._coefficients @ np.exp(self._exponents @ logs))[self._places]
        count = len(self.rows)
        of_rows = {name: values[i * count : (i + 1) * count] for i, name in enumerate(COLUMNS)}
        return of_rows | dict(zip(self._totals, values[len(COLUMNS) * count :], strict=True))

    def stretches(
        self, sizes: Mapping[str, Any], micro_batches: Any
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(times, turns, later): what is launched together, how often it comes, and in how many micro-batches.

        A stretch is what is executed once (embedding, head, the outer blocks) or one repetition of a group of blocks.
        times: (rows, stretches), launches of each row in one turn; turns: (stretches, points); later: (rows, points).
        """
        known = as_sizes(sizes)
        turns = [np.ones(1), *(np.atleast_1d(known.value(count)) for count in self._repetitions)]
        micro_batches = np.atleast_1d(np.asarray(micro_batches, dtype=np.float64))
        later = np.where(self._later[:, None], micro_batches - 1, 1.0)
        return self._times, np.stack(np.broadcast_arrays(*turns)).astype(np.float64), later

    def launches(self, sizes: Mapping[str, Any], micro_batches: Any) -> NDArray[np.float64]:
        """(rows, points): how often each row is launched in an optimizer step."""
        times, turns, later = self.stretches(sizes, micro_batches)
        return np.asarray((times @ turns) * later)

    def unaligned(self, sizes: Mapping[str, Any]) -> NDArray[np.bool_]:
        """(rows, points or 1): products of 16 bits with a matrix whose rows do not begin at multiples of 16 bytes."""
        if not self._steps:
            return np.zeros((len(self.rows), 1), dtype=bool)
        known = as_sizes(sizes)
        odd = [np.atleast_1d(np.asarray(known.value(step)) % ALIGNED != 0) for step in self._steps]
        return np.asarray(self._has @ np.stack(np.broadcast_arrays(*odd)) > 0)

    def slower(self, factors: Mapping[str, float]) -> NDArray[np.float64]:
        """(rows,): the factor of each row's kernel, 1 where there is none."""
        return np.array([factors.get(row.name, 1.0) for row in self.rows])

    def walk(self, rates: Mapping[str, float]) -> NDArray[np.float64]:
        """(rows,): elements a clock by how each row's kernel walks its operands, infinite where that limits nothing."""
        return np.array([rates.get(row.access, np.inf) for row in self.rows])

    def pace(self, rates: Mapping[str, float]) -> NDArray[np.float64]:
        """(rows,): bytes/s of each row's kernel by its name and width ("gelu/2"), infinite where there is none."""
        return np.array([rates.get(f"{row.name}/{row.width}", np.inf) for row in self.rows])
