"""One symbolic training step: build the model, its inputs and its optimizer, run its schedule, keep the ledger."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.describe.schedules import BACKWARD, FORWARD, accumulation, written
from estimator.describe.selection import NOTHING_TRAINED
from estimator.eager.autocast import LOWER
from estimator.eager.autograd import backward
from estimator.eager.ledger import Category, Phase
from estimator.eager.losses import cross_entropy, torch_cross_entropy, torch_cross_entropy_fp32
from estimator.eager.ops import div_number
from estimator.eager.tensor import BFLOAT16, FLOAT32, INT64, Machine, Tensor
from estimator.models.decoder import Transformer
from estimator.models.hugging_face.classes import decoder_of
from estimator.models.megatron import GPTModel
from estimator.models.stages import Stages
from estimator.optim.in_backward import InBackward
from estimator.optim.masters import Masters
from estimator.optim.optimizers import OPTIMIZERS
from estimator.optim.scaling import GradScaler
from estimator.parallel.context import tokens_on
from estimator.parallel.data import Replica, Sharing
from estimator.parallel.deepspeed import STAGES
from estimator.parallel.megatron import ApexAdam, MainParameters, MegatronStage
from estimator.parallel.pipeline import MICRO_BATCHES, SCHEDULES, Stage, interleaved
from estimator.parallel.placement import EXPERT, PIPELINE, TENSOR
from estimator.parallel.sharded import REPLICAS
from estimator.parallel.tensor import share
from estimator.parallel.vocabulary import parallel_cross_entropy, parallel_cross_entropy_fp32

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from estimator.eager.ledger import Ledger
    from estimator.eager.letters import Size
    from estimator.eager.repetition import Stack
    from estimator.eager.sizes import ShapeClass
    from estimator.models.layers import Recipe

PARAMETERS = {"bf16": BFLOAT16, "bf16-master": BFLOAT16}  # their dtype, where it is not fp32
LOSSES = {"bundled": cross_entropy, "torch": torch_cross_entropy, "torch-fp32": torch_cross_entropy_fp32}
PARALLEL_LOSSES = {"torch": parallel_cross_entropy, "torch-fp32": parallel_cross_entropy_fp32}


def run_step(recipe: Recipe, shapes: ShapeClass, device: str, stack: Stack, sizes: Mapping[str, int]) -> Ledger:
    """The ledger of a steady step of the blocks of `stack`: everything alive before it, then the step itself.

    `sizes` answer what the execution asks of them; the answers are in the ledger.
    """
    if recipe.parallel != "alone" and not recipe.pipeline and recipe.schedule != accumulation(recipe.micro_batches):
        raise ConfigError(
            f"schedule = {written(recipe.schedule)}: accelerators that share a step run each micro-batch's backward "
            "directly after its forward"
        )
    machine = Machine(shapes, device, stack, sizes, PARAMETERS.get(recipe.precision, FLOAT32))
    if recipe.megatron:
        return megatron_step(machine, recipe)
    ledger = machine.ledger
    stages_here = Stages(machine, recipe) if recipe.local_stages > 1 else None
    decoder = Transformer if recipe.written is None else decoder_of(recipe.written)
    model = decoder(machine, recipe) if stages_here is None else stages_here.parts[0]
    replica = {**REPLICAS, **STAGES}[recipe.parallel](stages_here or model, sharing_of(recipe))
    size = shapes.letters
    if not replica.updated:
        raise ConfigError(NOTHING_TRAINED)
    masters = scaler = None
    updated = replica.updated
    deepspeed = recipe.parallel in STAGES  # whose masters are its replica's
    if recipe.precision == "bf16-master" and not deepspeed:
        masters = Masters(updated, replica.padded, fp32_gradients=recipe.fp32_gradients)
        updated = masters.masters
    if recipe.precision == "fp16-mixed":
        scaler = GradScaler(machine)
    stages: list[Stage] = []
    if recipe.pipeline:
        stages = _stages(machine, stages_here or model, recipe, replica)
    else:
        with ledger.inside("inputs"):
            tokens = tokens_on(machine, size["T"]) if recipe.context_parallel else size["T"]
            ids = _input(machine, size["B"], tokens)
            targets = _input(machine, size["B"], size["T_l"] if recipe.keeps_last else tokens)
    kind = ApexAdam if deepspeed else OPTIMIZERS[recipe.optimizer, recipe.optimizer_impl]
    with machine.on_host() if recipe.offload else nullcontext():
        optimizer = InBackward(kind, updated) if recipe.in_backward else kind(updated)

    losses_of = PARALLEL_LOSSES if recipe.vocabulary_parallel else LOSSES
    losses: dict[int, Tensor] = {}  # of the micro-batches whose graphs are alive

    def forward(turn: int) -> None:
        ledger.phase, ledger.micro_batch = Phase.FORWARD, turn
        replica.before_forward()
        machine.saves_on_host = recipe.saved_on_host
        with machine.autocast(BFLOAT16 if recipe.autocast else LOWER.get(recipe.precision)):
            if recipe.loss == "chunked" or recipe.written is not None:
                loss = model(ids, targets).hold()
            else:
                logits = model(ids)
                with ledger.inside("loss"):
                    loss = losses_of[recipe.loss](logits, targets).hold()
        with ledger.inside("loss"):
            if recipe.micro_batches > 1:
                mean, loss = loss, div_number(loss).hold()
                mean.drop()
        machine.saves_on_host = False
        losses[turn] = loss
        if turn == 0:  # what a checkpoint saved of arguments that want no gradient is gone
            ledger.saved = [storage for storage in ledger.saved if storage.owners]

    def backpropagate(turn: int) -> None:
        ledger.phase, ledger.micro_batch = Phase.FORWARD, turn
        loss = losses.pop(turn)
        with ledger.inside("loss"):
            scaled = loss.hold() if scaler is None else scaler.scale(loss).hold()
            ledger.phase = Phase.BACKWARD
            backward(scaled)
        scaled.drop()
        loss.drop()

    if recipe.local_stages > 1:
        interleaved(stages, recipe.moves)
    elif recipe.pipeline:
        SCHEDULES[recipe.pipeline](*stages)
    for move in recipe.schedule if not recipe.pipeline else ():
        {FORWARD: forward, BACKWARD: backpropagate}[move.kind](move.micro_batch)
    ledger.phase = Phase.OPTIMIZER
    replica.after_micro_batches()
    replica.before_update()
    if masters is not None:
        masters.take_gradients()
        replica.sum_up(updated)
    if scaler is not None:
        scaler.unscale_(updated)
        replica.agree_on_overflow(scaler.found_inf)
    if recipe.clips:
        replica.clip(updated)
    if scaler is None:
        with machine.on_host() if recipe.offload else nullcontext():
            optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    if masters is not None:
        masters.write_back()
    replica.after_update()
    return ledger


def megatron_step(machine: Machine, recipe: Recipe) -> Ledger:
    """The same as Megatron-LM runs it."""
    ledger, size = machine.ledger, machine.shapes.letters
    model = GPTModel(machine, recipe)
    main = MainParameters(model, recipe)
    with ledger.inside("inputs"):
        ids, _ = (_input(machine, size["B"], size["T"]) for _ in range(2))
    optimizer = ApexAdam(main.mains)
    MegatronStage(machine, model, recipe, ids).run()
    main.exchange()
    ledger.phase = Phase.OPTIMIZER
    optimizer.step()
    main.copy_back()
    return ledger


def _stages(machine: Machine, model: Transformer | Stages, recipe: Recipe, replica: Replica) -> list[Stage]:
    """What one process of a pipeline has, with the ids or the targets of all micro-batches where it needs them."""
    size = machine.shapes.letters
    shape, whole = (size["B"], size["T"]), (MICRO_BATCHES * size["B"], size["T"])
    with machine.ledger.inside("inputs"):
        given = {name: _input(machine, *whole) for name in ("ids",) * recipe.enters + ("targets",) * recipe.leaves}
    pieces = {name: x.view(shape, machine.contiguous(shape)).hold() for name, x in given.items()}

    lower = LOWER.get(recipe.precision)

    def running(model: Transformer) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            with machine.autocast(lower):
                out: Tensor = model(x)
            return out

        return run

    def loss(logits: Tensor) -> Tensor:
        with machine.ledger.inside("loss"):
            with machine.autocast(lower):
                mean = LOSSES[recipe.loss](logits, pieces["targets"]).hold()
            divided = div_number(mean).hold()
            mean.drop()
        return divided

    ahead = next((i for i, move in enumerate(recipe.schedule) if move.kind == BACKWARD), 0)
    counts = recipe.micro_batches, ahead
    tokens = share(machine, size["T"]) if recipe.sequence_parallel else size["T"]
    passed = (size["B"], tokens, size["d"]), replica.sharing.param_dtype or machine.dtype
    parts = [(model, recipe)] if isinstance(model, Transformer) else zip(model.parts, model.recipes, strict=True)
    return [
        Stage(
            machine, of.stage, *counts, *passed, running(part), pieces.get("ids"), loss, replica.after_schedule
        )
        for part, of in parts
    ]  # fmt: skip


def sharing_of(recipe: Recipe) -> Sharing:
    """How accelerators share a step of `recipe`."""
    mixed = recipe.precision == "bf16-fsdp"
    apart = {TENSOR: recipe.tensor_parallel, EXPERT: recipe.expert_parallel, PIPELINE: bool(recipe.pipeline)}
    return Sharing(
        micro_batches=recipe.micro_batches,
        rank=recipe.rank,
        param_dtype=BFLOAT16 if mixed else None,
        reduce_dtype=FLOAT32 if mixed and recipe.reduce_dtype == "fp32" else None,
        replicated=recipe.replicated,
        reshard=recipe.reshard,
        offload=recipe.offload,
        bucket_view=recipe.bucket_view,
        staged=bool(recipe.pipeline),
        apart=tuple(axis for axis, used in apart.items() if used),
    )


def _input(machine: Machine, *shape: Size) -> Tensor:
    return machine.empty(shape, INT64, category=Category.INPUT).hold()
