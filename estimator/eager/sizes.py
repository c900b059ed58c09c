"""Symbolic sizes: monomials in the legend's letters, in a polynomial ring, with the relations that a model obeys.

PyTorch decides by sizes in one way only that changes memory: a dimension of 1 is contiguous with anything. So a step is
executed once per *shape class*: which sizes are 1 (they are numbers in that class), and which products coincide
(h e = d in a model whose heads share its width, g k = h with grouped queries).
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from sympy import QQ
from sympy.polys.rings import ring

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from estimator.describe.model import ModelConfig

SHARES = ("d_D", "t_D", "q_D", "k_D", "f_D", "V_D", "C_D")  # rows of one of D accelerators: `row_counts`
BLOCKS = tuple(f"{name[0]}_8" for name in SHARES)  # blocks of a matrix's 8-bit states: as many rows by d
TILES = ("T_8", "T_32", "T_128", "e_32", "a_16", "a_32")  # what CUDA's attention kernels round up to
NAMES = (*"BTLdhkgefVCnswczpqurv", "D", *SHARES, *BLOCKS, *TILES)
RING, *_generators = ring(",".join(NAMES), QQ)
LETTER = dict(zip(NAMES, _generators, strict=True))
INDEX = {name: i for i, name in enumerate(NAMES)}
ONE = RING.one
ZERO = RING.zero

Size = Any  # sympy.polys.rings.PolyElement, untyped upstream; a dimension is one term, a number of bytes may be several

# A point in general position for ordering strides; any would do that keeps sizes apart, with h e = d and g k = h.
_GENERIC = {"B": 1013, "T": 1019, "L": 7, "k": 1033, "g": 1049, "e": 1064, "f": 1061, "V": 1063, "C": 1069}
_GENERIC |= {
    "n": 3,
    "s": 5,
    "w": 11,
    "c": 13,
    "z": 17,
    "p": 19,
    "q": 23,
    "u": 29,
    "h": 1033 * 1049,
    "d": 1033 * 1049 * 1064,
    "r": 37,
    "v": 41,
    "D": 31,
}
_GENERIC |= {name: 1087 + i for i, name in enumerate((*SHARES, *BLOCKS, *TILES))}


@lru_cache(maxsize=65536)
def times(count: int, size: Size) -> Size:
    """`count` times `size`, equal ones the same object: a ledger has thousands, and an account keeps its ledger."""
    return count * size


@lru_cache(maxsize=65536)
def generic_value(size: Size) -> int:
    """The value of `size` at a point in general position, to put strides in order."""
    return int(evaluate(size, _GENERIC))


def evaluate(size: Size, values: Mapping[str, int]) -> int:
    """The exact value of a polynomial in the legend's letters."""
    total = 0
    for exponents, coefficient in size.terms():
        term = coefficient
        for name, exponent in zip(NAMES, exponents, strict=True):
            if exponent:
                term *= values[name] ** exponent
        total += term
    assert total == int(total), f"{size} is not an integer at {values}"
    return int(total)


@dataclass(frozen=True)
class ShapeClass:
    """The sizes of a class of models and plans, as far as PyTorch's decisions depend on them.

    Attributes:
        ones: letters whose size is 1.
        narrow: head_dim is 2, so that a rotary half is 1 wide.
        shared_width: h e = d.
        grouped: fewer key/value heads than query heads (else k = h).
        uneven: which rows D accelerators cannot share evenly, by the letters of their shares.
    """

    ones: frozenset[str]
    narrow: bool
    shared_width: bool
    grouped: bool
    uneven: frozenset[str] = frozenset()

    @classmethod
    def at(cls, family: str, sizes: Mapping[str, int]) -> ShapeClass:
        """The class of the models of a family that have these sizes."""
        narrow = family == "llama" and sizes["e"] == 2
        ones = frozenset(name for name in "BTdhkefVC" if sizes[name] == 1)
        degenerate = family == "llama" and (narrow or "h" in ones)  # then the relation would tie numbers to letters
        shared = sizes["h"] * sizes["e"] == sizes["d"] and not degenerate
        uneven = frozenset(name for name, rows in row_counts(sizes).items() if rows % sizes["D"])
        return cls(ones, narrow, shared, sizes["k"] != sizes["h"], uneven)

    @classmethod
    def general(cls, sizes: Mapping[str, int]) -> ShapeClass:
        """The same with no size of 1 or 2: the class whose formulas keep every letter."""
        return cls(frozenset(), False, sizes["h"] * sizes["e"] == sizes["d"], sizes["k"] != sizes["h"])

    @cached_property
    def letters(self) -> dict[str, Size]:
        """What stands for each size in this class: its letter, a number, or the letter that it equals."""
        to = {name: ONE if name in self.ones else LETTER[name] for name in NAMES}
        if self.narrow:
            to["e"] = 2 * ONE
        if not self.grouped:
            to["k"], to["g"] = to["h"], ONE
        elif "k" in self.ones:
            to["g"] = to["h"]
        if self.shared_width and "h" in self.ones:
            to["e"] = to["d"]
        if self.shared_width and "e" in self.ones:
            to["h"] = to["d"]
            if not self.grouped:
                to["k"] = to["d"]
        return to

    @cached_property
    def relations(self) -> tuple[tuple[int, int, int], ...]:
        """(i, j, k): the product of letters i and j is letter k."""
        rules = []
        if self.grouped and "k" not in self.ones:
            rules.append(("g", "k", "h"))
        if self.shared_width and not self.ones & {"h", "e"}:
            rules.append(("h", "e", "d"))
        return tuple((INDEX[a], INDEX[b], INDEX[c]) for a, b, c in rules)

    def product(self, sizes: Iterable[Size]) -> Size:
        """The product in normal form: equal sizes are equal polynomials."""
        result = ONE
        for size in sizes:
            if size != ONE:
                result = result * size
        return self.normal(result)

    @cached_property
    def shares(self) -> dict[Size, str]:
        """By number of rows of a parameter, the letter of the rows that one of D accelerators holds."""
        return {self.product((rows,)): name for name, rows in reversed(row_counts(self.letters).items())}

    def share(self, rows: Size) -> Size:
        """The rows of one of D accelerators (the first, which has the most): rows / D, rounded up."""
        return ONE if rows == ONE else LETTER[self.shares[rows]]

    @cached_property
    def blocks(self) -> dict[Size, str]:
        """By number of elements of a matrix, the letter of the blocks that its 8-bit states are cut into."""
        rows = reversed(row_counts(self.letters).items())
        return {self.product((count, self.letters["d"])): f"{name[0]}_8" for name, count in rows}

    def is_uneven(self, rows: Size) -> bool:
        """Whether D accelerators cannot share so many rows evenly."""
        return rows == ONE or self.shares[rows] in self.uneven

    def smaller(self, a: Size, b: Size) -> Size:
        """The smaller side of a block's matrix; where that depends on the model, the letter that stands for it."""
        (x, m), (y, n) = a.LT, b.LT
        if x == y:
            return a if m <= n else b
        if ONE in (a, b):
            return ONE
        d, h, k, e, f = (self.letters[name] for name in "dhkef")
        named = {f: "u", self.product((k, e)): "q", self.product((h, e)): "p"}
        return LETTER[named[b if a == d else a]]

    def normal(self, size: Size) -> Size:
        """`size` with each relation applied as often as it can be."""
        for i, j, k in self.relations:
            if any(x[i] and x[j] for x in size):
                terms: dict[tuple[int, ...], Any] = {}
                for exponents, coefficient in size.terms():
                    x = list(exponents)
                    times = min(x[i], x[j])
                    x[i], x[j], x[k] = x[i] - times, x[j] - times, x[k] + times
                    terms[tuple(x)] = terms.get(tuple(x), 0) + coefficient
                size = RING.from_dict(terms)
        return size


def row_counts(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of rows that parameters have, by the letters of their shares."""
    d, e = sizes["d"], sizes["e"]
    rows = {"d_D": d, "t_D": 3 * d, "q_D": sizes["h"] * e, "k_D": sizes["k"] * e}
    return rows | {f"{name}_D": sizes[name] for name in "fVC"}


MASK_ALIGNMENT = 8  # aten/src/ATen/native/transformers/attention.cpp, mem_eff_alignment


def _attention_tiles(T: Any, e: Any, wide: int) -> Any:
    """Elements of a head's dq in the workspace of CUDA's memory-efficient attention, in tiles with 4 words of locks.

    Tiles are 64 x 64 for heads of up to 64, 128 x `wide` for those of up to 128 and 128 x 64 beyond, on devices whose
    shared memory holds them, as A100's and H100's does (mem_eff_attention/kernel_backward.h, workspace_elements_gq, and
    generate_kernels.py). What 16-bit heads wider than 128 keep of dk and dv is left out: a few tiles a head.
    """
    rows = np.where(e <= 64, 64, 128)
    columns = np.where((e <= 64) | (e > 128), 64, wide)
    return -(-T // rows) * -(-e // columns) * (rows * columns + 4)


# Scratch of the bundled trainer: trainer.model.loss.CPU_TILE and CHUNKS, trainer.optim.optimizers.CPU_SLICE and
# CUDA_SLICE, trainer.optim.eight_bit.BLOCK (a test compares).
LOSS_TILE = 2**21
STATE_BLOCK = 256
LOSS_CHUNKS = 8
LION_SLICE = {"cpu": 2**20, "cuda": 2**26}


def cpu_threads() -> int:
    """PyTorch's number of threads: its own answer if it is loaded in this process, else the cores we may use."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return int(torch.get_num_threads())
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sizes_of(
    m: ModelConfig,
    batch_size: int,
    seq_len: int,
    device: str = "cpu",
    threads: int | None = None,
    shards: int = 1,
) -> dict[str, int]:
    """The number behind each letter of the legend for a model.

    Args:
        m: the model.
        batch_size: sequences in a micro-batch.
        seq_len: tokens in each.
        device: "cpu" or "cuda".
        threads: CPU threads; None means `cpu_threads()`.
        shards: accelerators that share what is sharded (`Plan.shards`).
    """
    given = {
        "B": batch_size,
        "T": seq_len,
        "L": m.num_layers,
        "d": m.d_model,
        "h": m.num_heads,
        "k": m.kv_heads,
        "e": m.e,
        "f": m.f,
        "V": m.vocab_size,
        "C": m.context_length,
        "n": cpu_threads() if threads is None else threads,
        "D": shards,
    }
    return given | {name: int(x) for name, x in derived_letters(m.family, given, device).items()}


def derived_letters(family: str, given: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The letters that follow from the others, numbers or numpy arrays.

    The tile of the CPU's flash attention, `s` x `w`, is aten/src/ATen/native/cpu/FlashAttentionKernel.cpp's: 256, 64 or
    32 query rows from 768, from 192 and below, 512 key rows, never more than there are.
    """
    T, d = given["T"], given["d"]
    share = {name: -(-rows // given["D"]) for name, rows in row_counts(given).items()}
    shards = [share["V_D"] * d, share["f_D"] * d, share["d_D"] * given["f"], share["q_D"] * d]
    shards.append(share["d_D"] * given["h"] * given["e"])
    if family == "gpt2":
        shards += [share["C_D"] * d, share["t_D"] * d]
    return {
        "g": given["h"] // given["k"],
        "s": np.minimum(np.where(T >= 768, 256, np.where(T >= 192, 64, 32)), T),
        "w": np.minimum(512, T),
        "c": np.minimum(LOSS_TILE, given["B"] * T * given["V"]),
        "z": np.minimum(LION_SLICE[device], reduce(np.maximum, shards)),
        "p": np.minimum(d, given["h"] * given["e"]),
        "q": np.minimum(d, given["k"] * given["e"]),
        "u": np.minimum(d, given["f"]),
        "r": -(-given["B"] * T // LOSS_CHUNKS),
        "v": -(-given["V"] // LOSS_CHUNKS),
        "T_8": -(-T // MASK_ALIGNMENT) * MASK_ALIGNMENT,
        "T_32": -(-T // 32) * 32,
        "T_128": -(-T // 128) * 128,
        "e_32": np.where(given["e"] <= 128, -(-given["e"] // 32) * 32, -(-given["e"] // 64) * 64),
        "a_16": _attention_tiles(T, given["e"], wide=128),
        "a_32": _attention_tiles(T, given["e"], wide=64),
        **share,
        **{f"{name[0]}_8": -(-rows * d // STATE_BLOCK) for name, rows in row_counts(given).items()},
    }
