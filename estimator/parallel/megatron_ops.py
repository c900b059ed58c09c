"""Megatron-LM's own operators: what they save, send and allocate.

The names are those of megatron/core: tensor_parallel/layers.py (`LinearWithGradAccumulationAndAsyncCommunication`),
mappings.py, cross_entropy.py, fusions/ (`bias_gelu`, `bias_swiglu`, `bias_dropout_add`, `softmax`), and the norms of
TransformerEngine or apex. Shapes are sequence first: (T, B, d); under sequence parallelism what lies between two
regions of shared matrices is (T/t, B, d).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from estimator.eager.autograd import Context, attach, record
from estimator.eager.ledger import Category, Gemm
from estimator.eager.letters import ONE
from estimator.eager.ops import Gradients, elementwise
from estimator.eager.tensor import BOOL, FLOAT32, INT64, Machine, Tensor, op
from estimator.eager.views import transpose
from estimator.parallel.placement import TENSOR
from estimator.parallel.tensor import share

if TYPE_CHECKING:
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Shape


@dataclass
class Rank:
    """One tensor-parallel rank.

    Attributes:
        machine: where it runs.
        shared: matrices are shared out over several ranks.
        sequence: and what lies between them by tokens (Korthikanti et al. 2022, section 4.2.2).
        gathered: the buffer that all layers gather their inputs into (`get_global_memory_buffer`).
        mains: of each parameter, the fp32 gradient that its products add to (`gradient_accumulation_fusion`).
    """

    machine: Machine
    shared: bool
    sequence: bool
    gathered: Tensor | None = None
    mains: dict[Tensor, Tensor] = field(default_factory=dict)

    def whole(self, x: Tensor, *, waits: str) -> Tensor:
        """What goes into a matrix that is cut by its output, gathered into the global buffer."""
        if not self.sequence:
            return x
        assert self.gathered is not None
        self.machine.collective("all-gather", TENSOR, self.gathered, waits=waits)
        return self.gathered

    def reduced(self, x: Tensor, shape: Shape, *, waits: str) -> Tensor:
        """The sum over the ranks, whole and in place, or of each rank's tokens in a new tensor."""
        if not self.shared:
            return x
        if not self.sequence:
            self.machine.collective("all-reduce", TENSOR, x, waits=waits)
            return x
        self.machine.collective("reduce-scatter", TENSOR, x, waits=waits)
        return self.machine.empty(shape, x.dtype)

    def add_product(self, weight: Tensor, grad: Tensor, x: Tensor) -> None:
        """`wgrad_gemm_accum_fp32`: grad^T x, added to the main gradient in the same kernel."""
        rows = self.machine.product(x.shape[:-1])
        main = self.mains[weight]
        self.machine.kernel(
            "wgrad_gemm_accum", (grad, x), (main,), gemm=Gemm(ONE, weight.shape[0], weight.shape[1], rows)
        )


def _product(machine: Machine, x: Tensor, weight: Tensor, width: Size, inner: Size) -> Tensor:
    rows = machine.product(x.shape[:-1])
    out = machine.empty((*x.shape[:-1], width), x.dtype)
    machine.kernel("mm", (x, weight), (out,), gemm=Gemm(ONE, rows, width, inner))
    return out


@op
def column(rank: Rank, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ColumnParallelLinear`: saves its input as it came, and gathers it again in backward, behind a product."""
    machine, (wide, inner) = x.machine, weight.shape

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, _ = c.saved
        whole = rank.whole(x, waits="unit").hold()
        c.dx = _product(machine, grad, weight, inner, wide)
        c.part = rank.reduced(c.dx, x.shape, waits="unit")
        del c.dx
        rank.add_product(weight, grad, whole)
        whole.drop()
        if bias is None:
            return [c.take("part")]
        db = machine.empty(bias.shape, grad.dtype)
        machine.kernel("sum", (grad,), (db,))
        return [c.take("part"), db]

    inputs = (x,) if bias is None else (x, bias)
    node = record("LinearWithGradAccumulationAndAsyncCommunicationBackward", inputs, backward, (x, weight))
    out = _product(machine, rank.whole(x, waits="step"), weight, wide, inner)
    if bias is not None:
        out = elementwise("add", out, bias)
    return attach(node, out)


@op
def row(rank: Rank, x: Tensor, weight: Tensor) -> Tensor:
    """`RowParallelLinear`, its bias left to what follows (`skip_bias_add`)."""
    machine, (wide, inner) = x.machine, weight.shape
    tokens = rank.machine.shapes.letters["T"]
    whole = (tokens, *x.shape[1:-1], wide)

    def backward(c: Context, grad: Tensor) -> Gradients:
        x, _ = c.saved
        c.grad = grad
        if rank.sequence:
            c.grad = machine.empty(whole, grad.dtype)
            machine.collective("all-gather", TENSOR, c.grad, waits="step")
        c.dx = _product(machine, c.grad, weight, inner, wide)
        rank.add_product(weight, c.grad, x)
        return [c.take("dx")]

    node = record("LinearWithGradAccumulationAndAsyncCommunicationBackward", (x,), backward, (x, weight))
    out = _product(machine, x, weight, wide, inner).hold()
    summed = rank.reduced(out, (own_tokens(rank), *x.shape[1:-1], wide), waits="step").hold()
    out.drop()
    summed.owners -= 1
    return attach(node, summed)


def own_tokens(rank: Rank) -> Size:
    """The tokens that a rank has between the shared matrices."""
    tokens = rank.machine.shapes.letters["T"]
    return share(rank.machine, tokens) if rank.sequence else tokens


@op
def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """TransformerEngine's RMSNorm: one kernel; saves its input, and 1 / rms a row in fp32."""
    machine = x.machine

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.dx, c.dw = machine.empty(x.shape, x.dtype), machine.empty(weight.shape, weight.dtype)
        machine.kernel("rms_norm_backward", (grad, c.saved[0], weight), (c.dx, c.dw))
        return [c.take("dx"), c.take("dw")]

    node = record("RMSNormBackward", (x, weight), backward, (x, weight))
    out, scale = machine.empty(x.shape, x.dtype), machine.empty((*x.shape[:-1], ONE), FLOAT32)
    machine.kernel("rms_norm", (x, weight), (out, scale))
    attach(node, out, scale, save=(scale,))
    scale.discard()
    return out


@op
def bias_activation(name: str, x: Tensor, bias: Tensor | None, width: Size) -> Tensor:
    """`bias_gelu_impl` and `bias_swiglu_impl`: saves what comes in, `width` comes out."""
    machine = x.machine

    def backward(c: Context, grad: Tensor) -> Gradients:
        dx = machine.empty(x.shape, x.dtype)
        machine.kernel(f"{name}_backward", (grad, c.saved[0]), (dx,))
        if bias is None:
            return [dx]
        c.dx = dx
        db = machine.empty(bias.shape, x.dtype)
        machine.kernel("sum", (dx,), (db,))
        return [c.take("dx"), db]

    inputs = (x,) if bias is None else (x, bias)
    node = record(f"{name}Backward", inputs, backward, (x,))
    out = machine.empty((*x.shape[:-1], width), x.dtype)
    machine.kernel(name, inputs, (out,))
    return attach(node, out)


@op
def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, drops: bool) -> Tensor:
    """`residual + dropout(x + bias)` in one kernel: saves the mask, a byte an element."""
    machine = x.machine

    def backward(c: Context, grad: Tensor) -> Gradients:
        c.dx = elementwise("native_dropout_backward", grad, c.saved[0]) if drops else grad
        if bias is None:
            return [c.dx, grad] if not drops else [c.take("dx"), grad]
        db = machine.empty(bias.shape, x.dtype)
        machine.kernel("sum", (c.dx,), (db,))
        return [c.take("dx"), db, grad]

    inputs = (x, residual) if bias is None else (x, bias, residual)
    node = record("bias_dropout_add_fused_trainBackward", inputs, backward)
    out = machine.empty(x.shape, x.dtype)
    if not drops:
        machine.kernel("bias_dropout_add", inputs, (out,))
        return attach(node, out)
    mask = machine.empty(x.shape, BOOL)
    machine.kernel("bias_dropout_add", inputs, (out, mask))
    attach(node, out, mask, save=(mask,))
    mask.discard()
    return out


@op
def rotated(x: Tensor, table: Tensor) -> Tensor:
    """`fused_apply_rotary_pos_emb`: a new tensor, and nothing saved but the table."""
    machine = x.machine

    def backward(_: Context, grad: Tensor) -> Gradients:
        dx = machine.empty(x.shape, x.dtype)
        machine.kernel("fused_rope_backward", (grad, table), (dx,))
        return [dx]

    node = record("FusedRoPEFuncBackward", (x,), backward)
    out = machine.empty(x.shape, x.dtype)
    machine.kernel("fused_rope", (x, table), (out,))
    return attach(node, out)


@op
def embedded(rank: Rank, ids: Tensor, weight: Tensor) -> Tensor:
    """`VocabParallelEmbedding`: rows of a rank's part of the table, zero for others' tokens, summed over the ranks."""
    machine = ids.machine

    def backward(c: Context, grad: Tensor) -> Gradients:
        out = machine.empty(weight.shape, grad.dtype)
        machine.kernel("embedding_dense_backward", (grad, c.saved[0]), (out,))
        return [out]

    mine = machine.empty(ids.shape, INT64) if rank.shared else ids
    mask = machine.empty(ids.shape, BOOL).hold() if rank.shared else None
    node = record("EmbeddingBackward0", (weight,), backward, (mine,))
    out = machine.empty((*ids.shape, weight.shape[1]), weight.dtype)
    machine.kernel("embedding", (mine, out), (out,))
    if mask is not None:
        mine.discard()
        machine.kernel("index_put_", (out, mask), (out,))
        machine.collective("all-reduce", TENSOR, out, waits="step")
        mask.drop()
    return attach(node, out)


@op
def sequence_first(x: Tensor) -> Tensor:
    """`x.transpose(0, 1).contiguous()`: (B, T, d) -> (T, B, d)."""
    machine, (batch, tokens, width) = x.machine, x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        return [transpose(grad, 0, 1)]

    node = record("CloneBackward0", (x,), backward)
    out = machine.empty((tokens, batch, width), x.dtype)
    machine.kernel("clone", (x,), (out,))
    return attach(node, out)


@op
def scattered(rank: Rank, x: Tensor) -> Tensor:
    """`scatter_to_sequence_parallel_region`: a copy of a rank's own tokens; backward gathers."""
    machine, shape = x.machine, x.shape

    def backward(_: Context, grad: Tensor) -> Gradients:
        out = machine.empty(shape, grad.dtype)
        machine.collective("all-gather", TENSOR, out, waits="step")
        return [out]

    node = record("_ScatterToSequenceParallelRegionBackward", (x,), backward)
    out = machine.empty((own_tokens(rank), *shape[1:]), x.dtype)
    machine.kernel("clone", (out,), (out,))
    return attach(node, out)


@op
def vocab_parallel_cross_entropy(rank: Rank, logits: Tensor) -> Tensor:
    """`_VocabParallelCrossEntropy`, and the mean: saves the softmax in fp32, which backward turns into the gradient."""
    machine, rows = logits.machine, logits.shape[:-1]

    def backward(c: Context, grad: Tensor) -> Gradients:
        softmax = c.saved[0]
        machine.kernel("mul_", (softmax, grad), (softmax,))
        return [softmax]

    def over_ranks(x: Tensor) -> None:
        if rank.shared:
            machine.collective("all-reduce", TENSOR, x, waits="step")

    wide = machine.empty(logits.shape, FLOAT32)
    machine.kernel("_to_copy", (logits,), (wide,))
    most, total, picked = (machine.empty(rows, FLOAT32).hold() for _ in range(3))
    machine.kernel("amax", (wide,), (most,))
    over_ranks(most)
    machine.kernel("sub_", (wide, most), (wide,))
    mask, mine = machine.empty(rows, BOOL), machine.empty(rows, INT64)
    machine.kernel("gather", (mine,), (picked,))
    over_ranks(picked)
    machine.kernel("exp_", (wide,), (wide,))
    machine.kernel("sum", (wide,), (total,))
    over_ranks(total)
    machine.kernel("div_", (wide, total), (wide,))
    node = record("_VocabParallelCrossEntropyBackward", (logits,), backward, (wide, mask, mine))
    out = machine.empty((), FLOAT32)
    machine.kernel("mean", (picked,), (out,))
    for x in (most, total, picked):
        x.drop()
    for x in (wide, mask, mine):
        x.discard()
    return attach(node, out)


def held(machine: Machine, *shape: Size) -> Tensor:
    """A buffer that stays (`GlobalMemoryBuffer`)."""
    return machine.empty(shape, machine.dtype, category=Category.COMMUNICATION).hold()
