"""Products of the blocks' linear layers in 8 bits, as torchao's float8 training casts and multiplies in compiled code.

torchao saves what a layer is given in 16 bits, so memory is that of the same step without it; its casts are kernels
that move bytes. Which kernels these are, and what each moves, is torchao 0.18's own account of them
(torchao/testing/training/roofline_utils.py, get_tensor_memory_traffic_ovhd_s), with a scale for a whole tensor or for
each of its rows. A product wants both factors along its sum, so an input and a gradient of an output are written in two
layouts, for the two products that they are in, and a weight again in backward. What several layers read is cast once:
the compiler finds equal expressions. The first step of a scale, the greatest element, is part of the fused kernel that
makes the tensor, if such a one does.

With a scale for each row, products in backward go another way: without fast accumulation, which torchao leaves off
there (`Float8LinearConfig`), the kernel for such scales is so slow that the one without any is taken, and a kernel of
its own multiplies what it wrote by both scales (torchao/float8/float8_ops.py, addmm_float8_unwrapped; pytorch/ao#2184:
one kernel more for each product).
"""

from __future__ import annotations

from functools import cache
from statistics import fmean
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.eager.ledger import Phase
from estimator.eager.letters import ONE, ZERO
from estimator.hardware.accelerators import accelerator, accelerators

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from estimator.describe.model import ModelConfig
    from estimator.eager.ledger import Kernel, Operand
    from estimator.eager.letters import Size
    from estimator.hardware.accelerators import Accelerator

HALF = 2  # bytes of 16 bits
SCALED = "_scaled_mm"  # PyTorch's product of factors of 8 bits, in a step that is recorded
APART = ("router",)  # linear layers of a block that stay in 16 bits, as torchtitan's filter has it


def multiplies(kernel: Kernel) -> bool:
    """Whether a kernel is a product of a linear layer of a block, of 16-bit factors; experts' grouped ones are not."""
    gemm = kernel.gemm
    if gemm is None or gemm.b != ONE or gemm.rows or kernel.where.block is None:
        return False
    layer = kernel.where.module.rpartition(".")[2]
    return layer not in APART and kernel.operands[0].storage.itemsize == HALF


class Casts:
    """The casts of a step, in the order of its products.

    Args:
        scales: "tensorwise" or "rowwise".
    """

    def __init__(self, scales: str) -> None:
        self._rowwise = scales == "rowwise"
        self._made: set[int] = set()  # storages that a fused kernel has written
        self._scaled: set[int] = set()
        self._weights: set[int] = set()

    def fuse(self, group: Iterable[Kernel]) -> None:
        """Remember what a fused kernel makes."""
        self._made |= {id(x.storage) for kernel in group for x in kernel.operands if x.written}

    def before(self, product: Kernel) -> Iterator[Kernel]:
        """The kernels that cast the factors of a product: in forward (input, weight), in backward a gradient first."""
        forward = product.where.phase is Phase.FORWARD or product.recompute
        first, second = product.operands[:2]
        if forward:
            self._weights.add(id(second.storage))
        for factor in (first, second):
            weight = id(factor.storage) in self._weights
            for nbytes in self._moved(factor, weight=weight, forward=forward):
                yield product._replace(name="float8_cast", gemm=None, operands=(factor,), nbytes=nbytes, leading=())

    def after(self, product: Kernel) -> Iterator[Kernel]:
        """The kernel that scales what a product has written, where it has not done so itself."""
        forward = product.where.phase is Phase.FORWARD or product.recompute
        if self._rowwise and not forward:
            out = product.operands[-1]
            moved = out.nbytes + out.nbytes
            yield product._replace(name="float8_rescale", gemm=None, operands=(out, out), nbytes=moved, leading=())

    def _moved(self, x: Operand, *, weight: bool, forward: bool) -> Iterator[Size]:
        """Bytes of each kernel that a factor still needs."""
        new = id(x.storage) not in self._scaled
        self._scaled.add(id(x.storage))
        read, written = x.nbytes, x.nbytes / HALF  # in 16 bits, in 8
        again = read if id(x.storage) not in self._made else ZERO
        if not new:
            if weight and not forward:
                yield from (read + read, read + written) if self._rowwise else (read + written,)
            return
        if self._rowwise:
            if weight:
                yield again + written
            else:
                yield again + written + read  # and a copy in the other layout
                yield read + written
            return
        if again is not ZERO:
            yield again
        yield read + written if weight else read + written + written

    @staticmethod
    def product(kernel: Kernel) -> Kernel:
        """It, with factors of 8 bits."""
        first, second = kernel.operands[:2]
        return kernel._replace(nbytes=kernel.nbytes - (first.nbytes + second.nbytes) / HALF)


@cache
def reached(id_: str) -> float:
    """The share of its peak that a large product in 8 bits reaches, over the share that one in 16 bits does.

    From the best products that anybody timed of both (data/published/mamf.csv); a card of which nobody did has the mean
    of its architecture. Products with a scale for each row are taken to be as fast as those that were timed.

    Raises:
        ConfigError: nobody timed such products on its architecture.
    """
    a = accelerator(id_)
    if (own := _timed(a)) is not None:
        return own
    alike = (accelerator(other) for other in accelerators() if accelerator(other).architecture == a.architecture)
    shares = [share for other in alike if (share := _timed(other)) is not None]
    if not shares:
        raise ConfigError(
            f"float8: nobody has published timings of products in 8 bits on {a.architecture or a.id}; give an MFU"
        )
    return fmean(shares)


def _timed(a: Accelerator) -> float | None:
    best, peak = dict(a.measured_peaks), dict(a.peaks)
    if not {"bf16", "fp8"} <= best.keys() & peak.keys():
        return None
    return (best["fp8"] / peak["fp8"]) / (best["bf16"] / peak["bf16"])


ALIGNED = 16  # elements of 8 bits: the rows of both factors of `torch._scaled_mm` begin at 16 bytes


def check_sizes(m: ModelConfig) -> None:
    """Raise ConfigError for a model with linear layers in its blocks that `torch._scaled_mm` does not take."""
    widths = {"d_model": m.d_model, "d_ff": m.d_ff, "head_dim": m.head_dim}
    for name, width in widths.items():
        if width is not None and width % ALIGNED:
            raise ConfigError(f"float8: {name} = {width}, and products in 8 bits take multiples of {ALIGNED} alone")
