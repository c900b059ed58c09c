"""One symbolic training step: build the model, its inputs and its optimizer, run the step, keep the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import backward
from estimator.eager.ledger import Category, Phase
from estimator.eager.losses import cross_entropy, torch_cross_entropy, torch_cross_entropy_fp32
from estimator.eager.ops import div_number
from estimator.eager.optimizers import OPTIMIZERS
from estimator.eager.sharding import REPLICAS
from estimator.eager.tensor import BFLOAT16, FLOAT32, INT64, Machine, Tensor
from estimator.models import FAMILIES

if TYPE_CHECKING:
    from estimator.eager.ledger import Ledger
    from estimator.eager.sizes import ShapeClass
    from estimator.models.layers import Recipe

LOSSES = {"bundled": cross_entropy, "torch": torch_cross_entropy, "torch-fp32": torch_cross_entropy_fp32}


def run_step(recipe: Recipe, shapes: ShapeClass, device: str, num_layers: int) -> Ledger:
    """The ledger of a steady step of `num_layers` blocks: everything alive before it, then the step itself."""
    machine = Machine(shapes, device, BFLOAT16 if recipe.precision == "bf16" else FLOAT32)
    ledger = machine.ledger
    model = FAMILIES[recipe.family](machine, recipe, num_layers)
    replica = REPLICAS[recipe.parallel](model, recipe.micro_batches)
    size = shapes.letters
    with ledger.inside("inputs"):
        ids, targets = (_input(machine, size["B"], size["T"]) for _ in range(2))
    optimizer = OPTIMIZERS[recipe.optimizer, recipe.optimizer_impl](replica.updated)

    def micro_batch() -> None:
        ledger.phase = Phase.FORWARD
        replica.before_forward()
        logits = model(ids)
        with ledger.inside("loss"):
            loss = LOSSES[recipe.loss](logits, targets).hold()
            if recipe.micro_batches > 1:
                mean, loss = loss, div_number(loss).hold()
                mean.drop()
            ledger.phase = Phase.BACKWARD
            backward(loss)
        loss.drop()

    for turn in range(recipe.micro_batches):
        ledger.micro_batch = turn
        micro_batch()
    ledger.phase = Phase.OPTIMIZER
    if recipe.clips:
        replica.clip()
    replica.before_update()
    optimizer.step()
    replica.after_update()
    return ledger


def _input(machine: Machine, *shape: object) -> Tensor:
    return machine.empty(shape, INT64, category=Category.INPUT).hold()
