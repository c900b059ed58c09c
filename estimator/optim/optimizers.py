"""All optimizers by name and implementation, and the steps of those that are not Adam's kin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.ledger import Gemm
from estimator.eager.letters import ONE, ZERO, ceiling, larger, smaller
from estimator.eager.linalg import product
from estimator.eager.ops import elementwise, in_place_with_number, mean, python_number
from estimator.eager.tensor import BFLOAT16, FLOAT32, INT32, UINT8, Locals, transposing_copy
from estimator.eager.views import cast
from estimator.optim.adam import (
    BundledAdamW,
    ForeachAdam,
    ForeachAdamW,
    FusedAdam,
    FusedAdamW,
    LoopAdam,
    LoopAdamW,
)
from estimator.optim.updates import Optimizer, at_parameter, in_place

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Shape, Tensor


# Of the bundled trainer: trainer.optim.eight_bit.BLOCK, trainer.optim.optimizers.CPU_SLICE and CUDA_SLICE.
STATE_BLOCK = 256
SLICE = {"cpu": 2**20, "cuda": 2**26}


def slice_of(parameters: Sequence[Tensor]) -> Size:
    """Elements of a scratch that a parameter is updated through, slice by slice: no more than the largest has."""
    return smaller(SLICE[parameters[0].machine.device], larger(*(p.numel for p in parameters)))


class SGD(Optimizer):
    """`trainer.optim.optimizers.SGD`, and torch.optim.SGD without momentum: one in-place kernel each, no state."""

    def step(self) -> None:
        for p in self.parameters:
            assert p.grad is not None
            with at_parameter(p, "SGD"):
                in_place("add_", p, p.grad, arithmetic=2)


class FusedSGD(SGD):
    """torch.optim.SGD(fused=True)."""

    supports_scaling = True


class MomentumSGD(Optimizer):
    """torch.optim.SGD(momentum=...) as a loop; foreach does the same on each of a list of parameters."""

    moments = 1

    def step(self) -> None:
        for p, (m,) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "SGD with momentum"):
                in_place_with_number("mul_", m)
                in_place("add_", m, p.grad, arithmetic=2)
                in_place("add_", p, m, arithmetic=2)


class FusedMomentumSGD(Optimizer):
    """torch.optim.SGD(momentum=..., fused=True): one kernel."""

    moments = 1
    supports_scaling = True

    def step(self) -> None:
        for p, (m,) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "SGD with momentum, fused"):
                self.machine.kernel("_fused_sgd_", (p, p.grad, m), (p, m), arithmetic=4 * p.numel)


class Lion(Optimizer):
    """`trainer.optim.optimizers.Lion`: slice by slice through one scratch, which lives for the step."""

    moments = 1

    def step(self) -> None:
        with at_parameter(self.parameters[0], "Lion"):
            scratch = self.machine.empty((slice_of(self.parameters),), self.parameters[0].dtype).hold()
        for p, (m,) in zip(self.parameters, self.states, strict=True):
            assert p.grad is not None
            with at_parameter(p, "Lion"):
                in_place_with_number("mul_", p)
                self.machine.kernel("lerp", (p.grad, m), (p.grad,), arithmetic=4 * p.numel)  # with sign_
                in_place("add_", p, p.grad, arithmetic=2)
                in_place("lerp_", m, p.grad, arithmetic=3)
        scratch.drop()


class AdamW8bit(Optimizer):
    """`trainer.optim.eight_bit.AdamW8bit`: matrices slice by slice through a scratch, then the vectors.

    A matrix's state is a byte an element and a float32 a block, for each moment.
    """

    def __init__(self, parameters: Sequence[Tensor], *, tables: bool = True) -> None:
        self.machine = parameters[0].machine
        super().__init__([p for p in parameters if len(p.shape) >= 2])
        self.vectors = BundledAdamW([p for p in parameters if len(p.shape) < 2])
        if not tables:
            return
        with self.machine.ledger.at("", None, "tables"):
            for elements in (256, 256, 255, 255):
                self.new_state(elements * ONE)

    @classmethod
    def of_each(cls, parameters: Sequence[Tensor]) -> list[Optimizer]:
        """All look up the first one's tables."""
        return [cls([p], tables=at == 0) for at, p in enumerate(parameters)]

    def new_states(self, p: Tensor) -> list[Tensor]:
        count = ceiling(p.numel, STATE_BLOCK)
        return [self.new_state(*shape, dtype=dtype) for shape, dtype in 2 * [(p.shape, UINT8), ((count,), FLOAT32)]]

    def step(self) -> None:
        if self.parameters:
            self._update_matrices()
        if self.vectors.parameters:
            self.vectors.step()

    def _update_matrices(self) -> None:
        with Locals() as v, at_parameter(self.parameters[0], "AdamW, 8-bit states"):
            scratch, wide = slice_of(self.parameters), all(p.dtype == FLOAT32 for p in self.parameters)
            v.m, v.v, v.s = (self.machine.empty((scratch,)) for _ in range(3))
            if not wide:
                v.weights = self.machine.empty((scratch,))
            v.index = self.machine.empty((scratch,), INT32)
            for p, state in zip(self.parameters, self.states, strict=True):
                assert p.grad is not None
                with at_parameter(p, "AdamW, 8-bit states"):
                    if p.numel is not ZERO:
                        with python_number(self.machine, FLOAT32):
                            pass
                    # Scaling back 2, the update 13 more, absolute values, maxima and quotients 6.
                    self.machine.kernel("adamw_8bit", (p, p.grad, *state), (p, *state), arithmetic=21 * p.numel)


class Adafactor(Optimizer):
    """torch.optim.Adafactor(foreach=False): a row and a column of second moments for a matrix.

    Names of the loop's body live on into the next parameter's turn, as Python's do.
    """

    counts_steps_in_tensors = True

    def state_shapes(self, p: Tensor) -> list[Shape]:
        *stacked, rows, columns = p.shape if len(p.shape) > 1 else (ONE, ONE)
        return [(*stacked, rows, ONE), (*stacked, ONE, columns)] if len(p.shape) > 1 else [p.shape]

    def step(self) -> None:
        with Locals() as v:
            for p, state in zip(self.parameters, self.states, strict=True):
                assert p.grad is not None
                with at_parameter(p, "Adafactor"):
                    self.count_step()
                    self._norm(p)
                    if len(state) == 2:
                        self._factored(v, p.grad, *state)
                    else:
                        v.grad_squared = elementwise("mul", p.grad, p.grad)
                        in_place("lerp_", state[0], v.grad_squared, arithmetic=3)
                        v.var_estimate = elementwise("clone", state[0])
                    in_place("rsqrt_", v.var_estimate, arithmetic=2)
                    v.update = v.var_estimate
                    in_place("mul_", v.update, p.grad, arithmetic=1)
                    self._norm(v.update)
                    in_place("add_", p, v.update, arithmetic=2)

    def _factored(self, v: Locals, grad: Tensor, row: Tensor, column: Tensor) -> None:
        machine = self.machine
        for name, state in (("row_mean", row), ("column_mean", column)):
            squares = machine.empty(state.shape, state.dtype).hold()
            machine.kernel("linalg_vector_norm", (grad,), (squares,), arithmetic=2 * grad.numel)
            in_place_with_number("div_", squares)
            setattr(v, name, squares)  # the one before lives until the whole expression is there
            squares.drop()
            in_place("lerp_", state, squares, arithmetic=3)
        v.var_estimate = product("mm" if len(grad.shape) == 2 else "bmm", row, column)
        average = mean(row, (*row.shape[:-2], ONE, ONE)).hold()
        in_place("div_", v.var_estimate, average, arithmetic=1)
        average.drop()

    def _norm(self, x: Tensor) -> None:
        norm = self.machine.empty((), x.dtype)
        self.machine.kernel("linalg_vector_norm", (x,), (norm,), arithmetic=2 * x.numel)
        norm.discard()


class ForeachAdafactor(Adafactor):
    """torch.optim.Adafactor(foreach=True): `_multi_tensor_adafactor`. All matrices together, then all vectors.

    The updates of the first of these groups live on until those of the second are there.
    """

    def step(self) -> None:
        groups: dict[bool, list[int]] = {}
        for i, state in enumerate(self.states):
            groups.setdefault(len(state) == 2, []).append(i)
        before: dict[int, Tensor] = {}
        for factored, group in groups.items():
            self.count_step()
            for i in self._each(group):
                self._norm(self.parameters[i])
            estimates = self._of_matrices(group) if factored else self._of_vectors(group)
            for i in self._each(group):
                in_place("clamp_min_", estimates[i], arithmetic=1)
                in_place("rsqrt_", estimates[i], arithmetic=2)
                in_place("mul_", estimates[i], self._grad(i), arithmetic=1)
            self._let_go(before)
            for i in self._each(group):
                self._norm(estimates[i])
            for i in self._each(group):
                in_place_with_number("mul_", estimates[i])
                in_place("add_", self.parameters[i], estimates[i], arithmetic=2)
            before = estimates
        self._let_go(before)

    def _each(self, group: Iterable[int]) -> Iterator[int]:
        """One parameter of a list after the other."""
        for i in group:
            with at_parameter(self.parameters[i], "Adafactor foreach"):
                yield i

    def _grad(self, i: int) -> Tensor:
        grad = self.parameters[i].grad
        assert grad is not None
        return grad

    def _let_go(self, tensors: dict[int, Tensor]) -> None:
        """`del` of a list."""
        for i in self._each(tensors):
            tensors[i].drop()

    def _of_matrices(self, group: Sequence[int]) -> dict[int, Tensor]:
        for which in (0, 1):  # rows, then columns
            means = {}
            for i in self._each(group):
                state, grad = self.states[i][which], self._grad(i)
                means[i] = self.machine.empty(state.shape, state.dtype).hold()
                self.machine.kernel("linalg_vector_norm", (grad,), (means[i],), arithmetic=2 * grad.numel)
            for i in self._each(group):
                in_place("mul_", means[i], arithmetic=1)
                in_place_with_number("div_", means[i])
                in_place("lerp_", self.states[i][which], means[i], arithmetic=3)
            self._let_go(means)
        estimates, averages = {}, {}
        for i in self._each(group):
            row, column = self.states[i]
            estimates[i] = product("mm" if len(column.shape) == 2 else "bmm", row, column).hold()
        for i in self._each(group):
            row, _ = self.states[i]
            averages[i] = mean(row, (*row.shape[:-2], ONE, ONE)).hold()
        for i in self._each(group):
            in_place("div_", estimates[i], averages[i], arithmetic=1)
        self._let_go(averages)
        return estimates

    def _of_vectors(self, group: Sequence[int]) -> dict[int, Tensor]:
        squares = {i: elementwise("mul", self._grad(i), self._grad(i)).hold() for i in self._each(group)}
        for i in self._each(group):
            in_place("lerp_", self.states[i][0], squares[i], arithmetic=3)
        self._let_go(squares)
        return {i: elementwise("clone", self.states[i][0]).hold() for i in self._each(group)}


def is_for_muon(p: Tensor) -> bool:
    """`trainer.optim.optimizers.is_for_muon`: a block's matrix, no norm's weight and nothing of experts."""
    where = p.storage.where
    return where.block is not None and len(p.shape) == 2 and not where.module.endswith(("_norm", "experts"))


class Muon(Optimizer):
    """`trainer.optim.optimizers.MuonAdamW`: torch.optim.Muon for the blocks' matrices, AdamW for all else.

    Muon turns an update into bfloat16 and makes it nearly orthogonal by five Newton-Schulz iterations, whose Gram
    matrices are as wide as the smaller side of the matrix.
    """

    moments = 1
    iterations = 5  # DEFAULT_NS_STEPS of torch/optim/_muon.py
    others: type[Optimizer] = LoopAdamW

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.machine = parameters[0].machine
        matrices = [p for p in parameters if is_for_muon(p)]
        super().__init__(matrices)
        self.adamw = self.others([p for p in parameters if all(p is not m for m in matrices)])

    def step(self) -> None:
        with Locals() as v:
            for p, (m,) in zip(self.parameters, self.states, strict=True):
                assert p.grad is not None
                with at_parameter(p, "Muon"):
                    in_place("lerp_", m, p.grad, arithmetic=3)
                    v.update = elementwise("lerp", p.grad, m)
                    v.update = self._orthogonal(v.update)
                    in_place_with_number("mul_", p)
                    wide = cast(v.update, p.dtype).hold() if self.machine.casts_operands else v.update.hold()
                    in_place("add_", p, wide, arithmetic=2)
                    wide.drop()
        if self.adamw.parameters:
            self.adamw.step()

    def _orthogonal(self, update: Tensor) -> Tensor:
        """`_zeropower_via_newtonschulz`."""
        machine, (rows, columns) = self.machine, update.shape
        less = smaller(rows, columns)
        more = rows + columns - less
        with Locals() as v:
            v.ortho = cast(update, BFLOAT16)
            norm, clamped = (machine.empty((), BFLOAT16).hold() for _ in range(2))
            clamped.drop()
            norm.drop()
            transposed = not machine.at_most(rows, columns)  # worked on as its transpose, until a product is there
            for turn in range(self.iterations):
                v.gram = machine.empty((less, less), BFLOAT16)
                machine.kernel("mm", (v.ortho,), (v.gram,), gemm=Gemm(ONE, less, less, more))
                v.gram_update = machine.empty((less, less), BFLOAT16)
                machine.kernel("addmm", (v.gram,), (v.gram_update,), gemm=Gemm(ONE, less, less, less))
                ortho = machine.empty((rows, columns), BFLOAT16)
                if transposed and turn == 0:
                    transposing_copy(machine, ortho.numel, BFLOAT16)
                machine.kernel("addmm", (v.gram_update, v.ortho), (ortho,), gemm=Gemm(ONE, less, more, less))
                v.ortho = ortho
            return v.take("ortho")


class ForeachMuon(Muon):
    """With torch.optim.AdamW(foreach=True)."""

    others = ForeachAdamW


class FusedMuon(Muon):
    """With torch.optim.AdamW(fused=True)."""

    others = FusedAdamW


OPTIMIZERS: dict[tuple[str, str], type[Optimizer]] = {
    ("adamw", "loop"): LoopAdamW,
    ("adamw", "foreach"): ForeachAdamW,
    ("adamw", "fused"): FusedAdamW,
    ("adamw", "bundled"): BundledAdamW,
    ("adam", "loop"): LoopAdam,
    ("adam", "foreach"): ForeachAdam,
    ("adam", "fused"): FusedAdam,
    ("sgd", "bundled"): SGD,
    ("sgd", "loop"): SGD,
    ("sgd", "foreach"): SGD,
    ("sgd", "fused"): FusedSGD,
    ("sgd-momentum", "loop"): MomentumSGD,
    ("sgd-momentum", "foreach"): MomentumSGD,
    ("sgd-momentum", "fused"): FusedMomentumSGD,
    ("lion", "bundled"): Lion,
    ("muon", "loop"): Muon,
    ("muon", "foreach"): ForeachMuon,
    ("muon", "fused"): FusedMuon,
    ("adafactor", "loop"): Adafactor,
    ("adafactor", "foreach"): ForeachAdafactor,
    ("adamw-8bit", "bundled"): AdamW8bit,
}
