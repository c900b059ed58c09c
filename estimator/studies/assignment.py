"""The assignment's own account (`seed notes, problem 4`): the same ledger, read by a different rule of what counts.

Students and teachers look for its figures, so here they are, from a symbolic run of the assignment's Transformer:
RMSNorm blocks with separate q, k and v, a feed-forward of two matrices and width 4 d, no biases, no positions' table,
an untied head counted once as "the vocabulary matrix". What counts as an activation is the output of each listed
component, once; nothing that PyTorch really allocates beside them, and no release.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from estimator.accounting.sizes import sizes_of
from estimator.describe.checks import ConfigError, shown
from estimator.describe.presets import preset
from estimator.describe.units import SECONDS_PER_DAY
from estimator.eager.ledger import Category
from estimator.eager.letters import ZERO, L, Size, evaluate, expression
from estimator.eager.repetition import Stack
from estimator.eager.sizes import ShapeClass
from estimator.eager.tensor import INT64, Machine
from estimator.models.textbook import Textbook

if TYPE_CHECKING:
    import sympy

    from estimator.describe.model import ModelConfig

BYTES = 4  # float32 for every tensor, as the assignment says
COPIES = 4  # parameters, gradients, first and second moments
# AdamW's arithmetic a parameter (Loshchilov and Hutter 2019, algorithm 2): decay 2, first moment 3, second moment 4
# (the square, two products, a sum), root 1, eps 1, quotient 1, step 2. The seed notes say 17 without a derivation.
ADAMW_FLOPS = 14
BACKWARD = 2  # "assume that the backward pass has twice the FLOPs of the forward pass"


@dataclass(frozen=True)
class TextbookAccount:
    """Answers to the assignment's parts (a) to (d); `memory_bytes` and the others are for a batch of `batch_size`.

    Attributes:
        model: whose sizes.
        parameters: number of parameters by the assignment's count.
        static_bytes: parameters, gradients and optimizer state.
        activation_bytes: of one sequence.
        forward_flops: of one sequence.
        optimizer_flops: of one AdamW step.
        formulas: the same as expressions in the legend's letters, by name.
    """

    model: ModelConfig
    parameters: int
    static_bytes: int
    activation_bytes: int
    forward_flops: int
    optimizer_flops: int

    @property
    def formulas(self) -> dict[str, sympy.Expr]:
        """parameters, static_bytes, activation_bytes, forward_flops and optimizer_flops in the legend's letters."""
        return {name: expression(p) for name, p in _forms().items()}

    @cached_property
    def backward_flops(self) -> int:
        """FLOPs of one sequence backward."""
        return BACKWARD * self.forward_flops

    def memory_bytes(self, batch_size: int) -> int:
        """Part (a): bytes for a batch."""
        return self.static_bytes + batch_size * self.activation_bytes

    def max_batch_size(self, capacity: float = 80e9) -> int:
        """Part (b): the largest batch in `capacity` bytes."""
        return max(0, int((capacity - self.static_bytes) // self.activation_bytes))

    def step_flops(self, batch_size: int) -> int:
        """Part (c): FLOPs of one step, the optimizer's included."""
        return batch_size * (self.forward_flops + self.backward_flops) + self.optimizer_flops

    def days(
        self, steps: int = 400_000, batch_size: int = 1024, mfu: float = 0.5, peak_flops: float = 19.5e12
    ) -> float:
        """Part (d): days of training.

        Raises:
            ConfigError: the MFU is not in (0, 1], or the peak is not positive.
        """
        if not 0 < mfu <= 1:
            raise ConfigError(f"mfu = {shown(mfu)}: must be above 0 and at most 1")
        if not peak_flops > 0:
            raise ConfigError(f"peak_flops = {shown(peak_flops)}: must be above 0")
        return steps * self.step_flops(batch_size) / (mfu * peak_flops) / SECONDS_PER_DAY


def textbook(model: ModelConfig | str) -> TextbookAccount:
    """The assignment's account of a model's L, d, h, V and context length; its d_ff is taken as 4 d."""
    m = preset(model) if isinstance(model, str) else model
    sizes = sizes_of(m, 1, m.context_length, threads=1)
    return TextbookAccount(m, **{name: evaluate(p, sizes) for name, p in _forms().items()})


@dataclass(frozen=True, slots=True)
class Note:
    """An answer of the seed notes on GPT-2 XL beside the assignment's own.

    Attributes:
        question: what was asked.
        said: the notes' answer.
        right: the answer by the assignment's convention, in `unit`.
        unit: "bytes", "sequences", "FLOPs", "FLOPs a parameter" or "s".
        wrong: what went wrong.
    """

    question: str
    said: str
    right: float
    unit: str
    wrong: str


def seed_notes() -> tuple[Note, ...]:
    """The notes' answers to the assignment's question, each with what went wrong in it."""
    t = textbook("gpt2-xl")
    return (
        Note(
            "Parameters, gradients and optimizer state",
            "18.72 GB",
            t.static_bytes,
            "bytes",
            "Three copies of the parameters were counted; there are four: parameters, gradients, two moments.",
        ),
        Note(
            "Activations of a sequence",
            "0.32 GB",
            t.activation_bytes,
            "bytes",
            "Only the blocks' outputs and a V were counted: no attention, no feed-forward, no logits of T x V.",
        ),
        Note("Largest batch in 80 GB", "191", t.max_batch_size(), "sequences", "It follows from the two above."),
        Note(
            "AdamW",
            "17 FLOPs a parameter",
            ADAMW_FLOPS,
            "FLOPs a parameter",
            "No derivation was given. Decay 2, first moment 3, second 4, root 1, eps 1, quotient 1, update 2.",
        ),
        Note(
            "Forward, a sequence",
            "133,004,351,504,384 FLOPs",
            t.forward_flops,
            "FLOPs",
            "Within 0.4 % of what a context of 16,384 gives; GPT-2's is 1,024.",
        ),
        Note(
            "Training on one A100",
            "455 hours",
            t.days() * SECONDS_PER_DAY,
            "s",
            "400 x 100 steps in place of 400,000 steps of 1,024 sequences.",
        ),
    )


@lru_cache(maxsize=1)
def _forms() -> dict[str, Size]:
    """Read off the ledgers of two and three blocks, of which the difference is one block."""
    two, three = _run(2), _run(3)
    forms = {name: three[name] + (L - 3) * (three[name] - two[name]) for name in three}
    parameters = forms["parameters"]
    return {
        "parameters": parameters,
        "static_bytes": COPIES * BYTES * parameters,
        "activation_bytes": forms["activation_bytes"],
        "forward_flops": forms["forward_flops"],
        "optimizer_flops": ADAMW_FLOPS * parameters,
    }


def _run(num_layers: int) -> dict[str, Size]:
    shapes = ShapeClass(frozenset({("B", 1)}), shared_width=True, grouped=False)
    machine = Machine(shapes, "cuda", Stack(()), sizes_of(preset("gpt2-xl"), 1, 1024))
    model = Textbook(machine, num_layers)
    size = shapes.letters
    ids, targets = (machine.empty((size["B"], size["T"]), INT64, category=Category.INPUT).hold() for _ in range(2))
    model(ids, targets).discard()
    ledger = machine.ledger
    parameters = [e.storage for e in ledger.events if e.storage.category is Category.PARAMETER]
    return {
        "parameters": sum((s.nbytes / s.itemsize for s in parameters), ZERO),
        "activation_bytes": sum(model.outputs, ZERO),
        "forward_flops": sum((k.flops for k in ledger.kernels), ZERO),
    }
