"""What all parts are made of: modules with a name and parameters, the recipe of a step, and `trainer.model.layers`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from estimator.describe.checks import BLOCKS, ConfigError
from estimator.describe.schedules import micro_batches
from estimator.describe.selection import Selection
from estimator.eager import ops
from estimator.eager.checkpointing import checkpoint
from estimator.eager.indexing import normalized_rows
from estimator.eager.linalg import linear
from estimator.eager.repetition import TURNS, executed_of, layout
from estimator.eager.tensor import Locals, Machine, Tensor, arguments
from estimator.parallel.placement import TENSOR, counted_whole
from estimator.parallel.sequence import gathered, scattered
from estimator.parallel.tensor import as_partial, entering, leaving
from estimator.parallel.vocabulary import masked_embedding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from estimator.describe.parts import Layer, Parts, Pattern
    from estimator.describe.routed import Routed
    from estimator.describe.schedules import Part, Schedule
    from estimator.describe.transformers import Written
    from estimator.eager.letters import Size
    from estimator.eager.repetition import Layout
    from estimator.parallel.unit import Unit


EVERYTHING = Selection()


class BlockKind(NamedTuple):
    """What sets one block apart from another."""

    layer: Layer
    checkpointed: bool
    selection: Selection = EVERYTHING
    reached: bool = True  # by a gradient of what comes in: a parameter before the block is trained


@dataclass(frozen=True)
class BlockOrder:
    """Which kinds of blocks follow each other, whatever their number: what sets them apart in a model and a plan."""

    pattern: Pattern
    checkpointing: str
    checkpoint_every: int
    selection: Selection
    adapted: bool = False

    def layout(self, num_layers: int) -> Layout:
        """The groups of alike blocks in a model of so many.

        Raises:
            ConfigError: more of them would be run one by one than is reckoned with; they are counted, not made.
        """
        blocks = self.executed(num_layers)
        if blocks > BLOCKS:
            every = f"checkpoint_every = {self.checkpoint_every}: " if self.checkpoint_every > 1 else "pattern: "
            raise ConfigError(
                f"{every}of {num_layers} layers {blocks} would be run one by one; allowed are at most {BLOCKS}, which "
                f"blocks that are alike after {BLOCKS // (TURNS + 1)} or fewer never exceed"
            )
        return layout(self.first, self._cycle(num_layers), num_layers)

    @cached_property
    def _reached(self) -> int:
        """The first block whose input has a gradient."""
        if self.adapted:
            return 1
        if self.selection.at(None).has("embedding"):
            return 0
        alike = self.selection.told_apart
        return next((i for i in range(alike + 1) if self.selection.at(i).has_block), alike) + 1

    @property
    def period(self) -> int:
        """After how many blocks, those of `pattern.first` not counted, the kinds begin again."""
        every = self.checkpoint_every if self.checkpointing != "none" else 1
        return math.lcm(len(self.pattern.cycle), every)

    def executed(self, num_layers: int) -> int:
        """How many blocks of a model of so many are run one by one: of what repeats, three turns and what is over."""
        first = self.first[:num_layers]
        rest = num_layers - len(first)
        return executed_of(first) + min(rest, TURNS * self.period + rest % self.period)

    @property
    def first(self) -> tuple[BlockKind, ...]:
        """The kinds of the first blocks, before those that repeat."""
        return tuple(
            self._kind(i) for i in range(max(len(self.pattern.first), self.selection.told_apart, self._reached))
        )

    def _cycle(self, num_layers: int) -> tuple[BlockKind, ...]:
        """The kinds of the blocks that repeat; no more of them than the model has."""
        first = len(self.first)
        return tuple(self._kind(first + i) for i in range(min(self.period, max(num_layers - first, 1))))

    def _kind(self, index: int) -> BlockKind:
        (layer,) = self.pattern.layers(index + 1)[index:]
        checkpointed = self.checkpointing != "none" and (index + 1) % self.checkpoint_every == 0
        return BlockKind(layer, checkpointed, self.selection.at(index), index >= self._reached)


@dataclass(frozen=True)
class Recipe:
    """What of a model and a plan decides which statements a step executes; hashable, free of sizes."""

    parts: Parts
    pattern: Pattern
    letters: tuple[str, ...]  # the sizes that the model has
    partial: bool  # only a part of each head is rotated
    projects: bool  # the embedding has a width of its own
    precision: str
    fp32_gradients: bool
    attention: str  # the kernel: Plan.attention_kernel
    dropout: bool
    keeps_last: bool  # logits of the last positions alone
    loss: str
    checkpointing: str
    checkpoint_every: int
    optimizer: str
    optimizer_impl: str
    clips: bool
    schedule: Schedule  # of the micro-batches that set a step apart
    parallel: str = "alone"
    selection: Selection = EVERYTHING
    adapter: str = "none"
    adapter_targets: str = ""
    adapter_dropout: bool = False
    adapter_scales: bool = True  # what an adapter adds is multiplied with another number than 1
    base_precision: str = "none"
    modules_to_save: str = ""
    balances: bool = False  # routers have a balancing loss
    reduce_dtype: str = "fp32"
    autocast: bool = False
    replicated: bool = False  # HSDP
    reshard: int | None = None
    offload: bool = False  # parameters, gradients and the update are the host's
    saved_on_host: bool = False
    bucket_view: bool = False  # DDP's gradients are views of its buckets
    in_backward: bool = False  # each parameter is updated as soon as its gradient is there
    rank: int = 0  # which of those that share the shards
    context_parallel: bool = False
    expert_parallel: bool = False
    imbalanced: bool = False  # an expert gets more rows than others
    expert_rank: int = 0  # which of those that share the experts
    tensor_parallel: bool = False
    pipeline: str = ""  # the schedule of a pipeline
    megatron: bool = False
    written: Written | None = None  # how transformers' class is; None for the trainer's own
    sequence_parallel: bool = False
    vocabulary_parallel: bool = False
    virtual_stages: int = 1
    moves: tuple[Part, ...] = ()  # in place of `schedule`, those of several stages on one accelerator
    stage: tuple[int, int] = (0, 1)  # which of how many stages: (0, 2) of all first ones, (1, 3) between, (1, 2) last

    @property
    def of_class(self) -> Written:
        """How transformers' class is written, of a recipe that is of one."""
        assert self.written is not None
        return self.written

    @property
    def routed(self) -> Routed:
        """How the class's mixture of experts is written."""
        assert self.of_class.routed is not None
        return self.of_class.routed

    @property
    def micro_batches(self) -> int:
        """Forward and backward passes in the step that is executed."""
        return micro_batches(self.moves or self.schedule)

    @property
    def local_stages(self) -> int:
        """Stages of a pipeline that an accelerator has, under PyTorch's interleaved schedule several."""
        return 1 if self.megatron or not self.pipeline else self.virtual_stages

    @property
    def adapted(self) -> bool:
        """`Plan.freezes_inputs`."""
        return self.adapter != "none" and "embedding" not in self.modules_to_save.split(",")

    @property
    def enters(self) -> bool:
        """The stage has the embedding."""
        return self.stage[0] == 0

    @property
    def leaves(self) -> bool:
        """The stage has the head."""
        return self.stage[0] == self.stage[1] - 1

    @property
    def order(self) -> BlockOrder:
        """Which kinds of blocks follow each other."""
        return BlockOrder(self.pattern, self.checkpointing, self.checkpoint_every, self.selection, self.adapted)

    def layout(self, num_layers: int) -> Layout:
        """The groups of alike blocks in a model of so many (`BlockOrder.layout`)."""
        return self.order.layout(num_layers // self.local_stages).times(self.local_stages)

    @property
    def kinds(self) -> frozenset[Layer]:
        """Every kind of layer that the pattern has."""
        return frozenset(self.pattern.first + self.pattern.cycle)

    @property
    def rotates(self) -> bool:
        """Positions are rotary in a layer."""
        return self.parts.positions.kind == "rotary"

    @property
    def rotated(self) -> str:
        """The letter of the width of a head that is rotated."""
        return "e_r" if self.partial or self.parts.attention.latent != "none" else "e"

    @property
    def halved(self) -> frozenset[str]:
        """The letters of which a half is a size of its own: the rotary one."""
        return frozenset({self.rotated} if self.rotates else ())


class Module:
    """A named module. Calling it runs `forward` in a frame of its own, as `nn.Module.__call__` does.

    Attributes:
        positional: of a module that checkpoints its forward, inside of its hooks, how many arguments the checkpoint is
            given: others are the function's own. None where checkpoints are around the module.
    """

    positional: int | None = None

    def __init__(self, machine: Machine, name: str, block: int | None = None) -> None:
        self.machine, self.name, self.block = machine, name, block
        with self.inside():
            self.where = machine.ledger.here
        self.owned: list[Tensor | Module] = []
        self.checkpointed = self.selective = False
        self.layout: Callable[..., Any] | None = None  # how DTensor hands it its input and takes its result
        self.unit: Unit | None = None

    def parameter(self, *shape: Size, trained: bool = True) -> Tensor:
        """A new parameter of this module; one that is never trained wants no gradient whatever a plan says."""
        with self.inside():
            p = ops.parameter(self.machine, shape, self.machine.dtype)
        p.requires_grad = trained
        self.owned.append(p)
        return p

    def child(self, module: Any) -> Any:
        """Register a sub-module, in PyTorch's order of registration; None is none."""
        if module is not None:
            self.owned.append(module)
        return module

    def inside(self) -> AbstractContextManager[None]:
        """What is made or run in this context belongs to this module."""
        return self.machine.ledger.inside(self.name, self.block)

    def parameters(self) -> Iterator[Tensor]:
        """In PyTorch's order: a module's own first, then its children's."""
        yield from (x for x in self.owned if isinstance(x, Tensor))
        for x in self.owned:
            if isinstance(x, Module):
                yield from x.parameters()

    def __call__(self, *args: Any) -> Any:
        return self.called(*args) if self.layout is None else self.layout(self.called, *args)

    def called(self, *args: Any) -> Any:
        """`run`, checkpointed or not."""
        if not self.checkpointed or self.positional is not None:
            return self.run(*args)
        return checkpoint(self.run, *args, selective=self.selective)

    def run(self, *args: Any) -> Any:
        """`forward` in its frame, between the hooks of the unit that shards this module."""
        unit = self.unit if not self.machine.ledger.recompute else None
        with self.inside(), arguments(args) as results:
            if self.unit is not None:
                args = self.unit.cast_inputs(args)
            if unit is not None:
                args = unit.before_forward(args)
            elif self.unit is not None:
                self.unit.before_recomputation()
            if self.checkpointed and self.positional is not None:
                out = checkpoint(self.framed, *args, saves=self.positional)
            else:
                out = self.framed(*args)
            if unit is not None:
                unit.after_forward(out)
            results.append(out)
        return results[0]

    def framed(self, *args: Any) -> Any:
        """`forward` in its frame."""
        with arguments(args) as results:
            with Locals() as v:
                out = self.forward(v, *args)
                held = [t.hold() for t in (out if isinstance(out, tuple) else (out,)) if t is not None]
            for t in held:
                t.owners -= 1
            results.append(out)
        return results[0]

    def forward(self, v: Locals, *args: Any) -> Any:
        """The module's statements; `v` are the names of its frame."""
        raise NotImplementedError


def placed(p: Tensor, dimension: int, whole: Size) -> None:
    """`p` is a rank's part, along `dimension`, of a parameter that is `whole` wide there: all of it is counted."""
    p.placement = {TENSOR: dimension}
    counted_whole(p, [whole if i == dimension else n for i, n in enumerate(p.shape)])


class Linear(Module):
    """x W^T (+ b); under tensor parallelism a rank has a part of the columns of what comes out, or of what goes in."""

    cut: str | None = None
    sequence = False

    def __init__(self, machine: Machine, name: str, d_in: Size, d_out: Size, *, bias: bool) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(d_out, d_in)
        self.bias = self.parameter(d_out) if bias else None

    @property
    def widths(self) -> tuple[Size, Size]:
        """Of what comes out and of what goes in."""
        wide, narrow = self.weight.shape
        return wide, narrow

    def cut_by(self, what: str, whole: Size, *, sequence: bool = False) -> Linear:
        """This layer as a rank has it, `whole` wide where it is cut: by "output" or by "input".

        With `sequence` its other side is a rank's part of the tokens, which the module around it has gathered.
        """
        self.cut, self.sequence = what, sequence
        dimension = 0 if what == "output" else 1
        for p in (self.weight, *(() if self.bias is None or what == "input" else (self.bias,))):
            placed(p, dimension, whole)
        return self

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        if self.cut is None:
            return linear(x, self.weight, self.bias)
        if self.cut == "output":
            return linear(x if self.sequence else entering(x), self.weight, self.bias)
        out = linear(x, self.weight, self.bias, as_partial)
        return scattered(out) if self.sequence else leaving(out)


class Embedding(Module):
    """Rows of a table by token id.

    Attributes:
        vocabulary: rows of the whole table, where a rank has a part of them.
        scatters: the sum over the ranks is scattered by tokens.
    """

    vocabulary: Size | None = None
    scatters = False

    def __init__(self, machine: Machine, name: str, rows: Size, width: Size) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(rows, width)

    def share(self, rows: Size, *, scatters: bool) -> None:
        """This table as a rank has it, of `rows` in all."""
        self.vocabulary, self.scatters = rows, scatters
        self.weight.whole_gradient = True
        placed(self.weight, 0, rows)

    def forward(self, v: Locals, ids: Tensor) -> Tensor:
        if self.vocabulary is None:
            return ops.embedding(ids, self.weight)
        rows = masked_embedding(ids, self.weight, self.vocabulary)
        return scattered(rows) if self.scatters else leaving(rows)


class Head(Linear):
    """The last projection; a tied one has the embedding's matrix. A normed one divides its rows by their lengths."""

    def __init__(self, machine: Machine, width: Size, vocabulary: Size, embedding: Embedding, recipe: Recipe) -> None:
        Module.__init__(self, machine, "head")
        ends = recipe.parts.ends
        self.weight = embedding.weight if ends.tied else self.parameter(vocabulary, width)
        self.bias = self.parameter(vocabulary) if ends.head_bias else None
        self.normed = ends.head_norm
        self.tokens: Size | None = None

    def share(self, rows: Size, tokens: Size | None) -> None:
        """This layer as a rank has it, of `rows` in all, with its own gather where what goes in is cut by tokens."""
        self.cut, self.sequence, self.tokens = "output", tokens is not None, tokens
        for p in (self.weight, *(() if self.bias is None else (self.bias,))):
            if not p.placement:
                placed(p, 0, rows)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        if self.tokens is not None:
            return super().forward(v, gathered(x, self.tokens))
        return super().forward(v, x) if not self.normed else normed_product(self, v, x)


class NormedLinear(Linear):
    """x (W / the lengths of its rows)^T (+ b)."""

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return normed_product(self, v, x)


def normed_product(layer: Linear, v: Locals, x: Tensor) -> Tensor:
    """The same of any layer."""
    v.weight = normalized_rows(layer.weight)
    return linear(x, v.weight, layer.bias)


def dropout(x: Tensor, recipe: Recipe) -> Tensor:
    """nn.Dropout: x itself where the recipe has none."""
    return dropout_at(x, drops=recipe.dropout)


def dropout_at(x: Tensor, *, drops: bool) -> Tensor:
    """nn.Dropout, or nn.Identity."""
    return ops.dropout(x) if drops else x
