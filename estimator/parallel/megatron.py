"""Megatron-LM's main gradients, its (distributed) optimizer, and how its stages run a step.

megatron/core/distributed (`ParamAndGradBuffer`), optimizer/distrib_optimizer.py, pipeline_parallel/schedules.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from estimator.describe.pipeline import ALIKE
from estimator.describe.schedules import FORWARD
from estimator.eager.autograd import backward
from estimator.eager.ledger import Category, Phase, Storage
from estimator.eager.letters import ZERO, D
from estimator.eager.ops import div_number
from estimator.eager.tensor import FLOAT32, Tensor
from estimator.optim.adam import FusedAdamW
from estimator.optim.masters import adds_to
from estimator.optim.updates import at_parameter
from estimator.parallel.megatron_ops import own_tokens, vocab_parallel_cross_entropy
from estimator.parallel.pipeline import IN_FLIGHT, MIDDLE, Others
from estimator.parallel.placement import DATA, PIPELINE, TENSOR
from estimator.parallel.tensor import RANKS, part_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from estimator.eager.tensor import Machine
    from estimator.parallel.megatron_ops import Rank


class Model(Protocol):
    """What is asked of a model here, `estimator.models.megatron`'s."""

    machine: Machine
    rank: Rank

    def parameters(self) -> Iterator[Tensor]:
        """In order of registration."""

    def __call__(self, *args: Any) -> Any:
        """A stage's forward."""


class MainParameters:
    """fp32 main gradients of all parameters, and the fp32 parameters that the optimizer moves.

    With the distributed optimizer a rank has its part of the latter (`use_distributed_optimizer`): 6 + 12 / D bytes a
    parameter, 18 without.
    """

    def __init__(self, model: Model, recipe: Any) -> None:
        machine = self.machine = model.machine
        self.recipe = recipe
        self.parameters = list(model.parameters())
        self.shared = recipe.parallel == "zero1"
        self.mains: list[Tensor] = []
        for p in self.parameters:
            with at_parameter(p, "main_param"):
                total = machine.empty(p.shape, FLOAT32, category=Category.GRADIENT).hold()
                shape = (part_of(p.numel, D),) if self.shared else p.shape
                main = machine.empty(shape, FLOAT32, category=Category.OPTIMIZER).hold()
            main.grad = Tensor(machine, total.storage, shape, main.stride, FLOAT32).hold()
            model.rank.mains[p] = total
            p.after_accumulation = adds_to(total)
            self.mains.append(main)
        self.totals = [model.rank.mains[p] for p in self.parameters]

    def exchange(self) -> None:
        """`finish_grad_sync`: the gradients' sum, of each rank's part under the distributed optimizer."""
        if self.recipe.parallel == "alone":
            return
        kind = "reduce-scatter" if self.shared else "all-reduce"
        for total in self.totals:
            with at_parameter(total, "start_grad_sync"):
                self.machine.collective(kind, DATA, total, waits="update")

    def copy_back(self) -> None:
        """The 16-bit parameters, which the others' parts come into, and gradients of zero."""
        for p, main, total in zip(self.parameters, self.mains, self.totals, strict=True):
            with at_parameter(p, "copy_"):
                self.machine.kernel("copy_", (main,), (p if not self.shared else main,))
                self.machine.kernel("zero_", (), (total,))
                if self.shared:
                    self.machine.collective("all-gather", DATA, p, waits="step")


class ApexAdam(FusedAdamW):
    """apex.optimizers.FusedAdam, which TransformerEngine has too: one kernel, and its step count in Python."""

    counts_steps_in_tensors = False

    def step(self) -> None:
        """Without a count of steps on the device."""
        self.update()


class MegatronStage:
    """One process's stage, and the micro-batches that it has in flight.

    What comes out is let go of once it is sent (`deallocate_output_tensor`); what comes in is made when it is received.
    """

    def __init__(self, machine: Machine, model: Model, recipe: Any, ids: Tensor) -> None:
        self.machine, self.model, self.recipe = machine, model, recipe
        self.ids = ids
        size = machine.shapes.letters
        self.shape = (own_tokens(model.rank), size["B"], size["d"])
        self.alive: dict[int, tuple[Tensor, Tensor]] = {}  # what came in and what came out
        ahead = next(i for i, move in enumerate(recipe.schedule) if move.kind != FORWARD)
        count = IN_FLIGHT / recipe.virtual_stages - ALIKE
        self.others = Others(machine.ledger, count) if recipe.pipeline and ahead == ALIKE else None

    def run(self) -> None:
        """`forward_backward_pipelining_without_interleaving`."""
        moves = self.recipe.schedule
        ahead = next(i for i, move in enumerate(moves) if move.kind != FORWARD)
        last = max((i for i, move in enumerate(moves) if move.kind == FORWARD), default=0)
        drained = [move.micro_batch for move in moves[last + 1 :]]
        middle = drained[MIDDLE] if len(drained) > MIDDLE else None
        for at, (kind, turn) in enumerate(moves):
            onwards = kind == FORWARD
            stands = turn == MIDDLE and at < ahead if onwards else turn == middle and at > last
            after = turn == MIDDLE + 1 and at < ahead if onwards else middle is not None and turn == middle + 1
            if self.others is not None and stands:
                self.others.begin()
            (self.forward if onwards else self.backward)(turn)
            if self.others is not None and stands:
                self.others.over()
            if self.others is not None and after:
                (self.others.keep if onwards else self.others.let_go)()
        if self.others is not None:
            self.others.finish()

    def forward(self, i: int) -> None:
        """`forward_step`, the receive before it and the send behind it."""
        ledger, recipe = self.machine.ledger, self.recipe
        ledger.phase, ledger.micro_batch = Phase.FORWARD, i
        x = self.ids
        if not recipe.enters:
            with ledger.at("pipeline", None, "recv_forward"):
                x = self.machine.empty(self.shape, self.machine.dtype)
                x.requires_grad = True
                self._gathered(x)
        x.hold()
        out = self.model(x).hold()
        if recipe.leaves:
            logits = out
            with ledger.inside("loss"):
                mean = vocab_parallel_cross_entropy(self.model.rank, logits).hold()
                logits.drop()
                out = div_number(mean).hold()
                mean.drop()
        else:
            with ledger.at("pipeline", None, "send_forward"):
                self._send(out)
                self._deallocate(out)
        self.alive[i] = x, out
        if i == 0:
            ledger.saved = [storage for storage in ledger.saved if storage.owners]

    def _send(self, x: Tensor) -> None:
        """Each tensor-parallel rank sends its part (Narayanan et al. 2021, section 4.1: scatter/gather)."""
        scatters = self.model.rank.shared and not self.model.rank.sequence
        elements = part_of(x.numel, RANKS) if scatters else x.numel
        self.machine.collective("send", PIPELINE, x, waits="step", elements=elements)

    def _gathered(self, x: Tensor) -> None:
        """And makes it whole of what all of them have received."""
        if self.model.rank.shared and not self.model.rank.sequence:
            self.machine.collective("all-gather", TENSOR, x, waits="step")

    def _deallocate(self, x: Tensor) -> None:
        x.storage.owners -= 1
        if x.storage.owners == 0:
            self.machine.ledger.free(x.storage)
        x.storage = Storage(ZERO, x.dtype.itemsize, x.storage.category, x.storage.where, owners=1)

    def backward(self, i: int) -> None:
        """`backward_step`."""
        ledger = self.machine.ledger
        ledger.phase, ledger.micro_batch = Phase.BACKWARD, i
        x, out = self.alive.pop(i)
        grad = None
        if not self.recipe.leaves:
            with ledger.at("pipeline", None, "recv_backward"):
                grad = self.machine.empty(out.shape, out.dtype).hold()
                self._gathered(grad)
        backward(out, grad)
        if grad is not None:
            grad.drop()
        out.drop()
        if not self.recipe.enters:
            assert x.grad is not None
            with ledger.at("pipeline", None, "send_backward"):
                self._send(x.grad)
                x.grad.drop()
                x.grad = None
        x.drop()
