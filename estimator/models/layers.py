"""What the families share: modules with a name and parameters, and `trainer.model.decoder`'s common layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from estimator.describe.parts import Layer
from estimator.eager import autocast, ops
from estimator.eager.attention import attention_math
from estimator.eager.checkpointing import checkpoint
from estimator.eager.ledger import Category
from estimator.eager.letters import W, constant
from estimator.eager.linalg import MASK_ALIGNMENT, linear, matmul, scaled_dot_product_attention
from estimator.eager.losses import chunked_cross_entropy
from estimator.eager.repetition import layout
from estimator.eager.tensor import FLOAT32, Locals, Machine, Tensor, arguments
from estimator.eager.views import narrow, transpose

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from estimator.eager.letters import Size
    from estimator.eager.repetition import Layout
    from estimator.parallel.data import Unit


class BlockKind(NamedTuple):
    """What sets one block apart from another."""

    layer: Layer
    checkpointed: bool


@dataclass(frozen=True)
class Recipe:
    """What of a model and a plan decides which statements a step executes; hashable, free of sizes."""

    family: str
    tie_embeddings: bool
    qkv_bias: bool
    precision: str
    fp32_gradients: bool
    attention: str  # the kernel: Plan.attention_kernel
    dropout: bool
    loss: str
    checkpointing: str
    checkpoint_every: int
    optimizer: str
    optimizer_impl: str
    clips: bool
    micro_batches: int
    parallel: str = "alone"
    windowed: bool = False  # the model has a sliding window, which sequences that are longer see

    def layout(self, num_layers: int) -> Layout:
        """The groups of alike blocks in a model of so many."""
        return layout(self.first, self.cycle, num_layers)

    @property
    def first(self) -> tuple[BlockKind, ...]:
        """The kinds of the first blocks, before those that repeat."""
        return ()

    @property
    def cycle(self) -> tuple[BlockKind, ...]:
        """The kinds of blocks that repeat."""
        checkpoints = self.checkpointing != "none"
        every = self.checkpoint_every if checkpoints else 1
        return tuple(BlockKind(Layer(), checkpointed=checkpoints and i == every - 1) for i in range(every))

    @property
    def halved(self) -> frozenset[str]:
        """The letters of which a half is a size of its own: the rotary one."""
        return frozenset({"e"} if self.family == "llama" else ())


class Module:
    """A named module. Calling it runs `forward` in a frame of its own, as `nn.Module.__call__` does."""

    def __init__(self, machine: Machine, name: str, block: int | None = None) -> None:
        self.machine, self.name, self.block = machine, name, block
        self.owned: list[Tensor | Module] = []
        self.checkpointed = self.selective = False
        self.unit: Unit | None = None

    def parameter(self, *shape: Size) -> Tensor:
        """A new parameter of this module."""
        with self.inside():
            p = ops.parameter(self.machine, shape, self.machine.dtype)
        self.owned.append(p)
        return p

    def child(self, module: Any) -> Any:
        """Register a sub-module, in PyTorch's order of registration."""
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

    def __call__(self, *args: Any) -> Tensor:
        return checkpoint(self.run, *args, selective=self.selective) if self.checkpointed else self.run(*args)

    def run(self, *args: Any) -> Tensor:
        """`forward` in its frame, between the hooks of the unit that shards this module."""
        unit = self.unit if not self.machine.ledger.recompute else None
        with self.inside(), arguments(args) as results:
            if unit is not None:
                args = unit.before_forward(args)
            with arguments(args) as inner, Locals() as v:
                inner.append(self.forward(v, *args))
            if unit is not None:
                unit.after_forward(inner[0])
            results.append(inner[0])
        return results[0]

    def forward(self, v: Locals, *args: Any) -> Tensor:
        """The module's statements; `v` are the names of its frame."""
        raise NotImplementedError


class Linear(Module):
    """x W^T (+ b)."""

    def __init__(self, machine: Machine, name: str, d_in: Size, d_out: Size, *, bias: bool) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(d_out, d_in)
        self.bias = self.parameter(d_out) if bias else None

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(Module):
    """Rows of a table by token id."""

    def __init__(self, machine: Machine, name: str, rows: Size, width: Size) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(rows, width)

    def forward(self, v: Locals, ids: Tensor) -> Tensor:
        return ops.embedding(ids, self.weight)


class Positions(Module):
    """Learned positions."""

    def __init__(self, machine: Machine, name: str, rows: Size, width: Size) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(rows, width)

    def forward(self, v: Locals, length: Size) -> Tensor:
        return narrow(self.weight, length)


class LayerNorm(Module):
    """LayerNorm with weight and bias."""

    def __init__(self, machine: Machine, name: str, width: Size) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(width)
        self.bias = self.parameter(width)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)


class RMSNorm(Module):
    """RMSNorm in separate ops."""

    def __init__(self, machine: Machine, name: str, width: Size) -> None:
        super().__init__(machine, name)
        self.weight = self.parameter(width)

    def forward(self, v: Locals, x: Tensor) -> Tensor:
        v.scale = ops.rsqrt(ops.add_number(ops.mean_last(ops.square(x))))
        return ops.mul(self.weight, ops.mul(x, v.scale))


def dropout(x: Tensor, recipe: Recipe) -> Tensor:
    """nn.Dropout: x itself where the recipe has none."""
    return ops.dropout(x) if recipe.dropout else x


def fused_kernel(kernel: str, device: str, *, masked: bool) -> str:
    """`kernel`, but that on CUDA flash takes no mask, and the memory-efficient kernel comes next.

    `check_for_attn_mask` and `priority_order` in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, where cuDNN does
    not come first (on Hopper and later, from cuDNN 9.15.1 on, unless TORCH_CUDNN_SDPA_DEPRIORITIZED is set).
    """
    return "efficient" if (kernel, device) == ("flash", "cuda") and masked else kernel


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, recipe: Recipe) -> Tensor:
    """`trainer.model.decoder.attend`."""
    if recipe.attention == "math":
        return attention_math(q, k, v, mask, drops=recipe.dropout)
    if not recipe.attention.startswith("naive"):
        machine = q.machine
        efficient = fused_kernel(recipe.attention, machine.device, masked=mask is not None) == "efficient"
        pads = efficient and mask is not None and not machine.divides(constant(MASK_ALIGNMENT), q.shape[-2])
        return scaled_dot_product_attention(q, k, v, mask, drops=recipe.dropout, efficient=efficient, pads=pads)
    assert mask is not None
    with arguments((q, k, v, mask)) as results, Locals() as names:
        names.scores = matmul(q, transpose(k, -2, -1))
        names.scores = ops.mul_number(names.scores)
        names.scores = ops.masked_fill(names.scores, mask)
        if recipe.attention == "naive-fp32":
            names.weights = ops.cast(ops.softmax(names.scores, FLOAT32), q.dtype)
        else:
            names.weights = ops.softmax(names.scores, autocast.fp32(q.machine, "cuda"))
        names.weights = dropout(names.weights, recipe)
        results.append(matmul(names.weights, v))
        return results[0]


class Transformer(Module):
    """ids (B, T) -> logits (B, T, V)."""

    def __init__(self, machine: Machine, recipe: Recipe) -> None:
        super().__init__(machine, "")
        self.recipe = recipe
        self.buffers: list[Tensor] = []
        size = machine.shapes.letters
        self.embedding = self.child(Embedding(machine, "embedding", size["V"], size["d"]))
        self.blocks: list[Any] = []
        self.build()
        for block, kind in zip(self.blocks, machine.stack.kinds, strict=True):
            assert isinstance(kind, BlockKind)
            if kind.checkpointed:
                part = block.attention if recipe.checkpointing == "attention" else block
                part.checkpointed = True
                part.selective = recipe.checkpointing == "selective"
        self.head = self.child(Linear(machine, "head", size["d"], size["V"], bias=False)) if not self.tied else None

    @property
    def tied(self) -> bool:
        """The head uses the embedding's matrix."""
        return self.recipe.tie_embeddings

    def build(self) -> None:
        """Make the family's own modules."""
        raise NotImplementedError

    def mask(self, ids: Tensor) -> Tensor | None:
        """(T, T), one for all blocks."""
        naive = self.recipe.attention.startswith("naive")
        if self.recipe.windowed and not self.machine.at_most(ids.shape[1], W):
            return ops.window_mask(ids, ids.shape[1], seen=not naive)
        return ops.causal_mask(ids, ids.shape[1]) if naive else None

    def logits_or_loss(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """The head, tied or not; with targets in its chunked cross entropy."""
        if targets is not None:
            with self.machine.ledger.inside("head"):
                weight = self.embedding.weight if self.head is None else self.head.weight
                return chunked_cross_entropy(x, weight, targets)
        if self.head is not None:
            return self.head(x)
        with self.machine.ledger.inside("head"):
            return linear(x, self.embedding.weight, None)

    def buffer(self, *shape: Size) -> Tensor:
        """A tensor that the model holds and does not train."""
        self.buffers.append(self.machine.empty(shape, self.machine.dtype, category=Category.BUFFER).hold())
        return self.buffers[-1]
