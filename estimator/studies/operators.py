"""Single operators of transformers, PyTorch and Liger as symbolic programs: predicted against timed, and their bytes.

    python -m estimator.studies.operators     (the tables of validation/operators.md)

The timings are the medians that Liger-Kernel publishes (`data/published/liger_operators.csv`); each operator is written
here statement for statement like the one that was timed, and run by the same symbolic machine as a training step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from estimator.eager import letters, ops
from estimator.eager.autograd import Context, attach, backward, record
from estimator.eager.ledger import Category, Phase
from estimator.eager.letters import ONE, ZERO, Size, evaluate
from estimator.eager.linalg import linear
from estimator.eager.losses import torch_cross_entropy
from estimator.eager.pointwise import power, relu
from estimator.eager.repetition import Stack
from estimator.eager.sizes import ShapeClass
from estimator.eager.tensor import BFLOAT16, FLOAT32, INT64, Locals, Machine, Tensor, arguments, op
from estimator.eager.views import cast, concatenate, transpose, view
from estimator.hardware.accelerators import accelerator
from estimator.studies.runs import rows
from estimator.timing.kernels import Row, Table, elements_of
from estimator.timing.roofline import efficiency, kernel_seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from estimator.eager.ledger import Kernel, Ledger
    from estimator.eager.tensor import Dtype
    from estimator.timing.roofline import Efficiency

GPUS = {
    "NVIDIA A100-SXM4-80GB": "a100-80gb-sxm",
    "NVIDIA H100 80GB HBM3": "h100-80gb-sxm",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb",
}
FLUSH = 256e6  # bytes that triton.testing.do_bench writes before each turn, while the host runs ahead
CLASS = ShapeClass(frozenset({("B", 1)}), shared_width=False, grouped=True)
T, H, KV, E, D, F, V = letters.T, letters.h, letters.k, letters.e, letters.d, letters.f, letters.V
# Any sizes at which strides come in the same order as at those that were timed.
SIZES = {"B": 1, "T": 4096, "L": 1, "d": 4000, "h": 32, "k": 8, "g": 4, "e": 128, "f": 11008, "V": 32000, "C": 4096,
         "n": 1, "D": 1}  # fmt: skip


class Bench:
    """A machine with the inputs of one operator."""

    def __init__(self, dtype: Dtype) -> None:
        self.machine = Machine(CLASS, "cuda", Stack(()), SIZES, dtype)
        self.dtype = dtype

    def wanting(self, *shape: Size, dtype: Dtype | None = None) -> Tensor:
        """A random tensor that wants a gradient."""
        return ops.parameter(self.machine, shape, dtype or self.dtype)

    def plain(self, *shape: Size, dtype: Dtype | None = None) -> Tensor:
        """A random tensor that wants none."""
        return self.machine.empty(shape, dtype or self.dtype, category=Category.INPUT).hold()


# ---- the operators, as they were timed


def rms_norm(b: Bench) -> tuple[Tensor, ...]:
    """transformers' LlamaRMSNorm, its weight in fp32."""
    x, weight = b.wanting(T, D), b.wanting(D, dtype=FLOAT32)
    return (_rms_norm(x, weight),)


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    with Locals() as v:
        v.h = cast(x, FLOAT32)
        v.variance = ops.mean_last(power(v.h))
        v.h = ops.mul(v.h, ops.rsqrt(ops.add_number(v.variance)))
        return ops.mul(weight, cast(v.h, x.dtype))


def fused_add_rms_norm(b: Bench) -> tuple[Tensor, ...]:
    """x + residual, and the norm of it."""
    x, residual, weight = b.wanting(T, D), b.wanting(T, D), b.wanting(D)
    with Locals() as v:
        v.h = ops.add(x, residual)
        return _rms_norm(v.h, weight), v.take("h")


def rope(b: Bench) -> tuple[Tensor, ...]:
    """transformers' apply_rotary_pos_emb of queries and keys."""
    q, k = (transpose(b.wanting(ONE, T, heads, E), 1, 2).hold() for heads in (H, KV))
    cos, sin = (view(b.plain(ONE, T, E), (ONE, ONE, T, E)).hold() for _ in range(2))
    return tuple(_rotated(x, cos, sin) for x in (q, k))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    with arguments((x, cos, sin)) as results, Locals() as v:
        v.first = ops.mul(x, cos)
        v.a, v.b = half(x), half(x)
        v.turned = concatenate((negated(v.b), v.a))
        results.append(ops.add(v.first, ops.mul(v.turned, sin)))
        return results[0]


@op
def negated(x: Tensor) -> Tensor:
    """-x."""
    node = record("NegBackward0", (x,), lambda _, grad: [ops.elementwise("neg", grad)])
    return attach(node, ops.elementwise("neg", x))


@op
def half(x: Tensor) -> Tensor:
    """x[..., : e / 2], a view; backward is the gradient in a tensor of zeros, filled and then copied into."""
    shape = x.shape

    def backward(_: Context, grad: Tensor) -> list[Tensor | None]:
        out = grad.machine.empty(shape, grad.dtype)
        grad.machine.kernel("fill_", (), (out,))
        into = out.hold().view(grad.shape, out.stride).hold()
        grad.machine.kernel("copy_", (grad,), (into,))
        into.drop()
        out.owners -= 1
        return [out]

    node = record("SliceBackward0", (x,), backward)
    return attach(node, x.view((*shape[:-1], shape[-1] / 2), x.stride))


def layer_norm(b: Bench) -> tuple[Tensor, ...]:
    """nn.LayerNorm."""
    return (ops.layer_norm(b.wanting(T, D), b.wanting(D), b.wanting(D)),)


def softmax(b: Bench) -> tuple[Tensor, ...]:
    """torch.softmax."""
    return (ops.softmax(b.wanting(T, D)),)


def relu_squared(b: Bench) -> tuple[Tensor, ...]:
    """F.relu(x).pow(2): relu saves its result."""
    return (power(relu(b.wanting(T, D))),)


def embedding(b: Bench) -> tuple[Tensor, ...]:
    """nn.Embedding."""
    return (ops.embedding(b.plain(T, dtype=INT64), b.wanting(V, D)),)


def cross_entropy(b: Bench) -> tuple[Tensor, ...]:
    """nn.CrossEntropyLoss."""
    return (torch_cross_entropy(b.wanting(T, V), b.plain(T, dtype=INT64)),)


def linear_cross_entropy(b: Bench) -> tuple[Tensor, ...]:
    """A linear layer and nn.CrossEntropyLoss of its logits as they come."""
    x, weight = b.wanting(ONE, T, D), b.wanting(V, D)
    return (torch_cross_entropy(linear(x, weight, None), b.plain(T, dtype=INT64)),)


def _gated(activation: str) -> Callable[[Bench], tuple[Tensor, ...]]:
    def program(b: Bench) -> tuple[Tensor, ...]:
        x = b.wanting(ONE, T, D)
        gate, up, down = b.wanting(F, D), b.wanting(F, D), b.wanting(D, F)
        with Locals() as v:
            v.gate, v.up = ops.activation(activation, linear(x, gate, None)), linear(x, up, None)
            return (linear(ops.mul(v.gate, v.up), down, None),)

    return program


PROGRAMS: dict[str, Callable[[Bench], tuple[Tensor, ...]]] = {
    "rms_norm": rms_norm,
    "fused_add_rms_norm": fused_add_rms_norm,
    "rope": rope,
    "layer_norm": layer_norm,
    "softmax": softmax,
    "relu_squared": relu_squared,
    "embedding": embedding,
    "cross_entropy": cross_entropy,
    "fused_linear_cross_entropy": linear_cross_entropy,
    "swiglu": _gated("silu"),
    "geglu": _gated("gelu"),
}


UNWRITTEN = {("fused_linear_cross_entropy", "liger")}  # loops over chunks, whose number Liger picks

# ---- what a timed row means


@dataclass(frozen=True)
class Timed:
    """A published timing (seconds) or memory (bytes) of one operator.

    Attributes:
        operator: one of `PROGRAMS`.
        provider: "huggingface" and "torch" (separate kernels), "torch_compile" and "liger" (fused ones).
        mode: "forward", "backward" or "full".
        metric: "speed" or "memory".
        gpu: id in the catalogue.
        dtype: of its inputs.
        sizes: letters.
        value: seconds, bytes.
    """

    operator: str
    provider: str
    mode: str
    metric: str
    gpu: str
    dtype: Dtype
    sizes: Mapping[str, int]
    value: float

    @property
    def eager(self) -> bool:
        """Whether each statement is a kernel of its own."""
        return self.provider in ("huggingface", "torch")


def _sizes(row: Mapping[str, str]) -> dict[str, int]:
    """The letters of a row: its x and what its configuration says."""
    given = {k: v for k, v in json.loads(row["extra_benchmark_config_str"]).items() if isinstance(v, int)}
    given[row["x_name"]] = int(float(row["x_value"]))
    name = row["kernel_name"]
    sizes = dict.fromkeys(SIZES, 1)
    rows_ = given.get("B", given.get("bsz", 1)) * given.get("T", given.get("seq_len", 1))
    sizes["T"] = given.get("M", given.get("BT", rows_))
    sizes["d"] = given.get("hidden_size", given.get("D", given.get("H", given.get("N", 1))))
    sizes["V"], sizes["f"] = given.get("V", 1), given.get("intermediate_size", 1)
    if name == "rope":
        sizes["h"], sizes["k"] = given["num_q_heads"], given["num_kv_heads"]
        sizes["d"] = given.get("H", given.get("hidden_size", 1))
        sizes["e"] = sizes["d"] // sizes["h"]
        sizes["g"] = sizes["h"] // sizes["k"]
    return sizes


@cache
def timed() -> tuple[Timed, ...]:
    """Every published row of an operator that is written here."""
    found = []
    for row in rows("liger_operators"):
        if row["kernel_name"] not in PROGRAMS or (row["kernel_name"], row["kernel_provider"]) in UNWRITTEN:
            continue
        config = json.loads(row["extra_benchmark_config_str"])
        dtype = BFLOAT16 if config.get("dtype") == "torch.bfloat16" else FLOAT32
        speed = row["metric_name"] == "speed"
        found.append(
            Timed(
                row["kernel_name"],
                row["kernel_provider"],
                row["kernel_operation_mode"],
                row["metric_name"],
                GPUS[row["gpu_name"]],
                dtype,
                _sizes(row),
                float(row["y_value_50"]) * (1e-3 if speed else 2**20),
            )
        )
    return tuple(found)


@cache
def above_the_floor() -> tuple[Timed, ...]:
    """The timings but those of fused operators that wait for Python: at less than twice the least of their series.

    A Triton kernel is launched from Python code of its own, whose time at small sizes says nothing of the kernel's.
    """
    series: dict[tuple[Any, ...], list[Timed]] = {}
    for row in timed():
        if row.metric == "speed":
            key = (row.operator, row.provider, row.mode, row.gpu, row.dtype)
            series.setdefault(key, []).append(row)
    found = []
    for members in series.values():
        least = min(row.value for row in members)
        found += [row for row in members if row.eager or row.value > 2 * least or len(members) == 1]
    return tuple(found)


def plain_fraction(gpu: str) -> float:
    """Of a card's bandwidth, what a kernel reaches that reads and writes each byte once: the longest fused forwards."""
    last: dict[tuple[Any, ...], Timed] = {}
    for row in above_the_floor():
        wide = row.operator in ("rope", "softmax", "relu_squared", "layer_norm")
        if row.gpu == gpu and row.provider == "liger" and row.mode == "forward" and wide:
            last[row.operator, row.dtype] = row  # the rows of a series rise
    a = accelerator(gpu)
    moved = [float(program(r).at(r.sizes)["nbytes"].sum()) / r.value / a.memory_bandwidth for r in last.values()]
    return float(np.median(moved))


# ---- predicted


@cache
def _ledger(operator: str, dtype: Dtype, *, again: bool) -> Ledger:
    """Forward and backward of an operator; `again`: its inputs have gradients from a turn before."""
    bench = Bench(dtype)
    ledger = bench.machine.ledger
    wanting: list[Tensor] = []
    make = bench.wanting

    def noted(*shape: Size, dtype: Dtype | None = None) -> Tensor:
        wanting.append(make(*shape, dtype=dtype).hold())
        return wanting[-1]

    bench.wanting = noted  # type: ignore[method-assign]
    ledger.phase = Phase.FORWARD
    outs = [x.hold() for x in PROGRAMS[operator](bench)]
    if again:
        for x in wanting:
            x.grad = bench.machine.empty(x.shape, x.dtype, category=Category.GRADIENT).hold()
    ledger.phase = Phase.BACKWARD
    for out in outs[:1] if operator == "fused_add_rms_norm" else outs[::-1]:  # the engine runs the latest nodes first
        backward(out)
    return ledger


@cache
def _table(operator: str, dtype: Dtype, mode: str, *, eager: bool) -> Table:
    """The kernels of a row; of a fused operator one each way, which reads its inputs and writes its outputs."""
    again = operator == "embedding"  # whose benchmark alone keeps its gradient from turn to turn
    kernels = [k for k in _ledger(operator, dtype, again=again).kernels if mode in ("full", k.where.phase.value)]
    found = [as_row(k) for k in kernels] if eager else list(_one_each_way(operator, dtype, mode))
    return Table(found, [(1,)] * len(found), {}, (), None)


def as_row(k: Kernel) -> Row:
    """A kernel that is launched once."""
    width = k.operands[0].storage.itemsize if k.operands else 4
    kind = "elementwise" if k.gemm is None else "matmul"
    elements = ZERO if k.access == "plain" else elements_of(k)
    return Row(kind, k.name, k.where.phase, "first", k.gemm, width, k.nbytes, ZERO, k.access, elements)


# What a fused operator moves, one kernel each way, as so many tensors of the named kind (Liger's kernels; what
# torch.compile makes of an embedding is the same). Cross entropy reads its logits twice and leaves their gradient in
# their place; backward scales it.
MOVES: dict[str, tuple[tuple[int, Size], tuple[int, Size]]] = {
    "rms_norm": ((2, T * D), (3, T * D)),
    "layer_norm": ((2, T * D), (3, T * D)),
    "softmax": ((2, T * D), (3, T * D)),
    "relu_squared": ((2, T * D), (3, T * D)),
    "rope": ((2, T * E * (H + KV)), (2, T * E * (H + KV))),
    "cross_entropy": ((3, T * V), (2, T * V)),
    "embedding": ((2, T * D), (1, 2 * T * D + 4 * V * D)),
    "swiglu": ((3, T * F), (5, T * F)),
    "geglu": ((3, T * F), (5, T * F)),
}


def _one_each_way(operator: str, dtype: Dtype, mode: str) -> Iterator[Row]:
    for phase, (count, size) in zip((Phase.FORWARD, Phase.BACKWARD), MOVES[operator], strict=True):
        if mode in ("full", phase.value):
            kernels = _ledger(operator, dtype, again=False).kernels
            yield from (as_row(k) for k in kernels if k.gemm is not None and k.where.phase is phase)
            moved = count * dtype.itemsize * size
            yield Row("elementwise", "fused", phase, "first", None, dtype.itemsize, moved, ZERO)


def program(row: Timed) -> Table:
    """The kernels of a row."""
    return _table(row.operator, row.dtype, row.mode, eager=row.eager)


def predicted_seconds(row: Timed, e: Efficiency | None = None) -> float:
    """Seconds of a row, as triton.testing.do_bench takes them: the device, or the host if it falls behind.

    The host runs ahead while a cache of 256 MB is written before each turn.
    """
    a = accelerator(row.gpu)
    e = e or efficiency(a)
    table = program(row)
    shape = table.at(row.sizes)
    device = kernel_seconds(table, shape, a, e).sum() + e.gap * len(table.rows)
    host = e.host * len(table.rows) - FLUSH / a.memory_bandwidth if row.eager else 0.0
    return float(max(device, host))


def predicted_bytes(row: Timed) -> float:
    """The peak of a memory row.

    Forward alone is measured without gradients. The others hold the outputs' gradients throughout, all that forward
    left, since the graph is retained, and the inputs' gradients of a turn before (but rope's: so its figures say).
    """
    ledger = _ledger(row.operator, row.dtype, again=row.mode != "forward" and row.operator != "rope")
    kept: dict[int, Any] = {}
    for event in ledger.events:
        if event.where.phase is not Phase.BACKWARD:
            kept[id(event.storage)] = event.storage if event.sign > 0 else None
    live = peak = 0
    if row.mode != "forward":
        live = sum(evaluate(e.storage.nbytes, row.sizes) for e in ledger.events if e.sign > 0 and _is_seed(e))
    for event in ledger.events:
        if event.where.phase is Phase.BACKWARD:
            if row.mode == "forward":
                break
            if _is_seed(event) or (event.sign < 0 and kept.get(id(event.storage)) is not None):
                continue
        live += event.sign * evaluate(event.storage.nbytes, row.sizes)
        peak = max(peak, live)
    return float(peak)


def _is_seed(event: Any) -> bool:
    return bool(event.storage.where.op == "ones_like")


WHY = {
    "cross_entropy": "equal",
    "layer_norm": "equal to some rows of statistics",
    "swiglu": "two workspaces of cuBLAS, 8.1 MiB each, which have a line of their own in an estimate",
    "geglu": "two workspaces of cuBLAS, 8.1 MiB each, which have a line of their own in an estimate",
    "fused_linear_cross_entropy": "the benchmark holds the other provider's weight too, and cuBLAS's two workspaces",
    "embedding": "the benchmark holds the other provider's table and tensors of the runs before it; up to 45 MiB are "
    "the backward's sums over parts of equal ids, which no formula here has",
    "rms_norm": "the gradient that the benchmark hands in is bf16 and the output fp32: its cast is one more tensor",
    "rope": "a workspace of cuBLAS, 8.1 MiB",
}


def _markdown(header: str, lines: list[str]) -> str:
    names = header.split(" | ")
    return "\n".join(("| " + header + " |", "|" + "---|" * len(names), *lines)) + "\n"


def speeds() -> str:
    """Predicted against timed, a line for each operator, provider and direction, as a Markdown table."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in above_the_floor():
        key = row.operator, row.provider, row.mode, row.gpu
        groups.setdefault(key, []).append(predicted_seconds(row) / row.value - 1)
    lines = [
        f"| {' | '.join(key)} | {len(found)} | {np.median(np.abs(found)):.1%} | {np.median(found):+.1%} |"
        for key, found in groups.items()
    ]
    return _markdown("operator | provider | direction | card | rows | median error | bias", lines)


def median_error() -> float:
    """Of every timing."""
    return float(np.median([abs(predicted_seconds(row) / row.value - 1) for row in above_the_floor()]))


def memories() -> str:
    """Predicted against measured bytes of the separate kernels, with the reason of each difference."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in timed():
        if row.metric == "memory" and row.eager:
            groups.setdefault((row.operator, row.mode), []).append((predicted_bytes(row), row.value))
    lines = []
    for (operator, mode), pairs in groups.items():
        differences = [(p - m) / 2**20 for p, m in pairs]
        between = f"{min(differences):+,.1f} to {max(differences):+,.1f} MiB"
        ratio = float(np.median([p / m for p, m in pairs]))
        lines.append(f"| {operator} | {mode} | {len(pairs)} | {ratio:.3f} | {between} | {WHY[operator]} |")
    return _markdown("operator | direction | rows | predicted over measured | difference | what it is", lines)


def report() -> str:
    """Both tables."""
    left = sum(row.metric == "speed" for row in timed()) - len(above_the_floor())
    return (
        f"Single operators, predicted against the medians that Liger-Kernel publishes: median error "
        f"{median_error():.1%} of {len(above_the_floor())} timings. {left} timings of fused operators are at the floor "
        f"of their Python and are left out.\n\n{speeds()}\nPeak bytes on A100, separate kernels:\n\n{memories()}"
    )


def main() -> int:
    """Print both tables and write them to validation/operators.md."""
    text = report()
    sys.stdout.write(text)
    Path("validation/operators.md").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
