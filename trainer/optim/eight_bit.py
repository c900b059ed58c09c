"""AdamW whose two moments take a byte an element each (Dettmers et al. 2022, "8-bit Optimizers").

A matrix's moments are cut into blocks of 256 elements, flat; a block keeps its greatest absolute value in float32, and
of each element the nearest of 256 fractions of that. The fractions are denser near 0, where most elements are. Vectors
(biases, norms) are few and keep float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from trainer.optim.optimizers import CPU_SLICE, CUDA_SLICE, AdamW, local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from trainer.optim.optimizers import Scratch

BLOCK = 256  # elements with a scale of their own
CODES, SCALES = ("code1", "code2"), ("absmax1", "absmax2")
TINY = 1e-30  # in place of the greatest value of a block of zeros


def dynamic_fractions(*, signed: bool) -> Tensor:
    """256 numbers in [-1, 1] or [0, 1], in rising order: seven decades, each with twice as many as the one below.

    The paper's dynamic tree quantization (section 1.3): the leading zeros of a byte say the decade, the bits behind
    them are a linear fraction of it. Without a sign there is one bit more for the fraction.
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1, dtype=torch.float64)
        middles = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        numbers += middles.tolist()
        if signed:
            numbers += (-middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32)


class AdamW8bit(AdamW):
    """The bundled AdamW with moments of a byte an element. State of a matrix: code1, code2, absmax1, absmax2.

    Each step works on float32 copies of a slice of the moments, in a scratch of four such slices that lives for the
    step; of parameters in half precision on a copy of these too, in a fifth. A process that holds rows of a matrix
    cuts its blocks from these.

    Attributes:
        tables: the fractions of either moment and the edges between them, on the parameters' device.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        device = self.param_groups[0]["params"][0].device
        fractions = [dynamic_fractions(signed=signed).to(device) for signed in (True, False)]
        self.tables = [*fractions, *((x[:-1] + x[1:]) / 2 for x in fractions)]

    def load_state_dict(self, state_dict: Any) -> None:
        """As torch's, which makes every state tensor of the parameter's dtype: codes and scales are theirs again."""
        super().load_state_dict(state_dict)
        take_states(self, state_dict)

    def update(self, group: dict[str, Any], parameters: list[Tensor], scratch: Scratch) -> None:
        """Matrices slice by slice, then all vectors."""
        matrices = [p for p in parameters if p.ndim >= 2]
        if matrices:
            size = min(CPU_SLICE if matrices[0].is_cpu else CUDA_SLICE, max(local(p).numel() for p in matrices))
            wide = all(p.dtype == torch.float32 for p in matrices)  # else the weights are moved in float32 too
            floats = [matrices[0].new_empty(size, dtype=torch.float32) for _ in range(3 if wide else 4)]
            index = matrices[0].new_empty(size, dtype=torch.int32)
            for p in matrices:
                self._update_matrix(group, p, floats, index)
            del floats, index
        super().update(group, [p for p in parameters if p.ndim < 2], scratch)

    def _update_matrix(self, group: dict[str, Any], p: Tensor, floats: list[Tensor], index: Tensor) -> None:
        state = self.state[p]
        if not state:
            blocks = -(-p.numel() // BLOCK)
            state["step"] = 0
            for moment, zero in zip("12", self._zeros(), strict=True):
                state[f"code{moment}"] = torch.full_like(p, zero, dtype=torch.uint8)
                state[f"absmax{moment}"] = p.new_zeros(blocks, dtype=torch.float32)
        state["step"] += 1
        assert p.grad is not None
        (beta1, beta2), t = group["betas"], state["step"]
        root = (1 - beta2**t) ** 0.5
        rate, eps = group["lr"] / (1 - beta1**t) * root, group["eps"] * root
        flat = [x.view(-1) for x in (p, p.grad.contiguous(), state["code1"], state["code2"])]
        for span, within, shape in _spans(p.numel(), len(index)):
            w, g, code1, code2 = (x[span].view(shape) for x in flat)
            *more, i = (x[: w.numel()].view(shape) for x in (*floats, index))
            m, v, s = more[:3]
            moved = w if w.dtype == torch.float32 else more[3].copy_(w)
            if moved is not w:
                g = s.copy_(g)
            scale1, scale2 = (state[name][within] for name in ("absmax1", "absmax2"))
            self._decode(code1, scale1, 0, i, m)
            self._decode(code2, scale2, 1, i, v)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            torch.sqrt(v, out=s).add_(eps)
            moved.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(m, s, value=-rate)
            if moved is not w:
                w.copy_(moved)
            self._encode(m, scale1, 0, s, i, code1)
            self._encode(v, scale2, 1, s, i, code2)

    def _zeros(self) -> list[int]:
        """The codes of 0."""
        return [int((table == 0).nonzero()) for table in self.tables[:2]]

    def _decode(self, code: Tensor, scale: Tensor, moment: int, index: Tensor, out: Tensor) -> None:
        index.copy_(code)
        torch.index_select(self.tables[moment], 0, index.view(-1), out=out.view(-1))
        out.mul_(scale[:, None])

    def _encode(self, x: Tensor, scale: Tensor, moment: int, scratch: Tensor, index: Tensor, code: Tensor) -> None:
        torch.amax(torch.abs(x, out=scratch), 1, out=scale)
        torch.div(x, scale.clamp_min_(TINY)[:, None], out=scratch)
        torch.bucketize(scratch, self.tables[2 + moment], out_int32=True, out=index)
        code.copy_(index)


def take_states(optimizer: torch.optim.Optimizer, state_dict: Any) -> None:
    """Take codes and scales as they were saved, where `load_state_dict` has made them of the parameter's dtype."""
    saved = state_dict["state"]
    for group, numbers in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        for p, number in zip(group["params"], numbers["params"], strict=True):
            kept = {name: x for name, x in saved.get(number, {}).items() if name in (*CODES, *SCALES)}
            optimizer.state[p].update((name, x.to(p.device, copy=True)) for name, x in kept.items())


def _spans(elements: int, size: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """(elements, blocks, their shape) of the slices of a flat matrix: whole blocks, and a shorter one at its end."""
    size = max(size // BLOCK, 1) * BLOCK
    whole = elements // BLOCK * BLOCK
    for start in range(0, whole, size):
        stop = min(start + size, whole)
        yield slice(start, stop), slice(start // BLOCK, stop // BLOCK), ((stop - start) // BLOCK, BLOCK)
    if whole < elements:
        yield slice(whole, elements), slice(whole // BLOCK, None), (1, elements - whole)
