"""`estimate calibrate`: measure what this machine's kernels reach, and write it down as an accelerator of its own.

Matrix products, attention, kernels that move bytes and the cost of a launch are each measured by themselves, in both
dtypes; nothing is fitted to a training step but the launch, by a step so small that there is nothing else in it. It needs
torch, so it is here and not in the estimator, whose command asks for it.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from estimator.accounts import account, sizes_for
from estimator.config import ModelConfig, Plan
from estimator.kernels import table
from estimator.timing import built, flash_seconds, matmul_seconds
from trainer.announce import available_memory
from trainer.measure import build_step

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (m, k, n) of a linear layer: tokens, width in, width out. Each is measured forward and both ways backward.
LINEAR = ((64, 128, 128), (64, 128, 512), (256, 128, 384), (256, 512, 256), (128, 1024, 1024), (1024, 256, 1024),
          (512, 768, 768), (1024, 1024, 1024))  # fmt: skip
BATCHED = ((16, 64, 32), (16, 128, 64), (8, 256, 64), (8, 512, 64))  # heads, tokens, head width
FLASH = ((8, 256, 32), (8, 256, 64), (8, 512, 64), (4, 512, 128))
MOVED = tuple(2**n for n in range(13, 28, 2))  # bytes of a kernel
TILES = ((1, 1), (16, 16), (32, 32), (64, 64))
DEPTHS = (0, 2, 4, 8, 16, 32, 64, 128)
TILE_COSTS = (0, 64, 256, 1024, 4096)
LAUNCH = ModelConfig("gpt2", 2, 8, 2, 16, 4)  # so small that only launches take time


def clock(device: str) -> float:
    """Seconds. One thread's own time does not count what other processes take from it; several, and CUDA, need wall time."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def least_seconds(call: Callable[[], object], device: str, budget: float) -> float:
    """The least seconds of a call in `budget` seconds and at least three turns: what disturbs it only ever slows it."""
    call()
    start = clock(device)
    call()
    once = max(clock(device) - start, 1e-7)
    inner = max(1, int(2e-4 / once))  # short ones several at a time: a clock takes time too
    least, until, turns = float("inf"), time.perf_counter() + budget, 0
    while turns < 3 or time.perf_counter() < until:
        start = clock(device)
        for _ in range(inner):
            call()
        least = min(least, (clock(device) - start) / inner)
        turns += 1
    return least


class Calibration:
    """The measurements of one device.

    Attributes:
        device: "cpu" or "cuda".
        budget: seconds for each of some 200 measurements.
        step: called before each, for a progress bar.
    """

    def __init__(self, device: str, budget: float, step: Callable[[str], None]) -> None:
        self.device, self.budget, self.step = device, budget, step
        self.empty = 0.0
        tiny = self.tensor(torch.float32, 1)
        self.empty = self.seconds("launch of one operator", lambda: tiny + tiny)

    def tensor(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """A random tensor."""
        return torch.randn(*shape, device=self.device).to(dtype)

    def seconds(self, name: str, call: Callable[[], object]) -> float:
        """The seconds of a call, less those of starting it."""
        self.step(name)
        return max(least_seconds(call, self.device, self.budget) - self.empty, 1e-8)

    def products(self, dtype: torch.dtype) -> list[tuple[tuple[int, int, int, int], float]]:
        """((b, m, n, k), seconds) of products as linear layers and unfused attention do them."""
        found = []
        for m, k, n in LINEAR:
            x, w, g = self.tensor(dtype, m, k), self.tensor(dtype, n, k), self.tensor(dtype, m, n)
            name = f"product {m} x {k} x {n}"
            found += [
                ((1, m, n, k), self.seconds(name, lambda x=x, w=w: x @ w.t())),
                ((1, m, k, n), self.seconds(name, lambda g=g, w=w: g @ w)),
                ((1, n, k, m), self.seconds(name, lambda g=g, x=x: g.t() @ x)),
            ]
        for b, t, e in BATCHED:
            q, s = self.tensor(dtype, b, t, e), self.tensor(dtype, b, t, t)
            name = f"batched product {b} x {t} x {e}"
            found += [
                ((b, t, t, e), self.seconds(name, lambda q=q: q @ q.transpose(1, 2))),
                ((b, t, e, t), self.seconds(name, lambda q=q, s=s: s @ q)),
                ((b, t, e, t), self.seconds(name, lambda q=q, s=s: s.transpose(1, 2) @ q)),
            ]
        return found

    def moved(self) -> list[tuple[int, float]]:
        """(bytes, bytes/s) of a kernel that adds two tensors into a third."""
        found = []
        for nbytes in MOVED:
            x = self.tensor(torch.float32, max(nbytes // 12, 1))
            found.append((nbytes, nbytes / self.seconds(f"move {nbytes:,} bytes", lambda x=x: x + x)))
        return found

    def kernels(self) -> Iterator[tuple[str, float, float]]:
        """(name/bytes of an element, bytes, seconds) of the ledger's kernels that do more than move bytes, or less."""
        for dtype in DTYPES.values():
            for rows, width in ((256, 256), (1024, 512)):
                yield from self._kernels(dtype, rows, width)

    def _kernels(self, dtype: torch.dtype, rows: int, width: int) -> Iterator[tuple[str, float, float]]:
        x, y, out = (self.tensor(dtype, rows, width) for _ in range(3))
        positive, weight = x.abs() + 1, self.tensor(dtype, width)
        one, item = x.numel() * x.itemsize, x.itemsize
        mask = x > 0
        heads = x.view(4, rows // 4, 4, width // 4).transpose(1, 2)
        ids = torch.randint(64, (rows,), device=self.device)
        _, mean, rstd = torch.native_layer_norm(x, (width,), weight, weight, 1e-5)
        norm = torch.ops.aten.native_layer_norm_backward.default
        gelu = torch.ops.aten.gelu_backward.default
        softmax = torch.ops.aten._softmax_backward_data.default  # noqa: SLF001 - the kernel itself is what is measured
        plain: dict[str, tuple[float, Callable[[], object]]] = {
            "mul": (3, lambda: x * y),
            "add_": (3, lambda: out.add_(y)),
            "mul_": (2, lambda: out.mul_(0.999)),
            "lerp_": (3, lambda: out.lerp_(y, 0.1)),
            "addcmul_": (3, lambda: out.addcmul_(y, y, value=0.001)),
            "addcdiv_": (4, lambda: out.addcdiv_(y, positive, value=-0.001)),
            "sqrt": (2, lambda: positive.sqrt()),
            "div": (2, lambda: x / 2.0),
            "neg": (2, lambda: -x),
            "pow": (2, lambda: x.pow(2)),
            "rsqrt": (2, lambda: positive.rsqrt()),
            "sum": (1, lambda: x.sum(0)),
            "cat": (2, lambda: torch.cat((x[:, : width // 2], x[:, width // 2 :]), -1)),
            "clone": (2, lambda: heads.contiguous()),
            "_to_copy": (1 + 4 / item, lambda: x.to(torch.float32 if item == 2 else torch.bfloat16)),
            "masked_fill": (2 + 1 / item, lambda: x.masked_fill(mask, 0.0)),
            "gelu": (2, lambda: F.gelu(x, approximate="tanh")),
            "gelu_backward": (3, lambda: gelu(y, x, approximate="tanh")),
            "silu": (2, lambda: F.silu(x)),
            "silu_backward": (3, lambda: torch.ops.aten.silu_backward(y, x)),
            "_softmax": (2, lambda: torch.softmax(x, -1)),
            "_softmax_backward_data": (3, lambda: softmax(y, x, -1, dtype)),
            "native_layer_norm": (2, lambda: F.layer_norm(x, (width,), weight, weight)),
            "native_layer_norm_backward": (3, lambda: norm(y, x, [width], mean, rstd, weight, weight, [True] * 3)),
            "embedding": (1 + 8 / (width * item), lambda: F.embedding(ids, out)),
            "embedding_dense_backward": (
                1 + 64 / rows,
                lambda: torch.ops.aten.embedding_dense_backward(y, ids, 64, -1, False),
            ),
            "logsumexp": (1, lambda: torch.logsumexp(x, -1)),
            "amax": (1, lambda: x.amax(-1)),
            "softmax": (2, lambda: torch.softmax(x, -1)),
        }
        for name, (tensors, call) in plain.items():
            yield f"{name}/{item}", tensors * one, self.seconds(name, call)

    def attention(self, dtype: torch.dtype) -> list[tuple[tuple[int, int, int], float, float]]:
        """((heads, tokens, head width), forward seconds, backward seconds) of the fused, causal attention."""
        found = []
        for h, t, e in FLASH:
            q, k, v = (self.tensor(dtype, 1, h, t, e).requires_grad_() for _ in range(3))

            def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

            out = forward()
            grad = torch.ones_like(out)

            def backward(
                out: Tensor = out, q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = grad
            ) -> object:
                return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

            name = f"attention {h} x {t} x {e}"
            found.append(((h, t, e), self.seconds(name, forward), self.seconds(name, backward)))
        return found

    def launch(self) -> float:
        """Seconds a kernel of a training step so small that nothing but launching takes time."""
        p = Plan()
        kernels = table(account(LAUNCH, p, self.device))
        step = build_step(LAUNCH, p, self.device)
        self.step("launches of a training step")
        seconds = least_seconds(step, self.device, 10 * self.budget)
        return seconds / float(kernels.launches(LAUNCH.num_layers, 1).sum())

    def checkpoint(self, host: float) -> float:
        """Seconds to checkpoint a block and to prepare its recomputation, beside the kernels that it launches."""
        p = Plan(checkpointing="block")
        launches = float(table(account(LAUNCH, p, self.device)).launches(LAUNCH.num_layers, 1).sum())
        step = build_step(LAUNCH, p, self.device)
        self.step("a checkpointed training step")
        seconds = least_seconds(step, self.device, 10 * self.budget)
        return max(seconds - host * launches, 0.0) / LAUNCH.num_layers


Product = tuple[tuple[int, int, int, int], float]


def fit_products(measured: dict[str, list[Product]], bandwidth: float) -> tuple[dict[str, Any], dict[str, float]]:
    """The tile, its cost and its depth under which all products come out best; and FLOP/s by dtype at no cost."""
    best: tuple[float, dict[str, Any], dict[str, float]] = (float("inf"), {}, {})
    for tile in TILES:
        for depth in DEPTHS:
            for cost in TILE_COSTS:
                shape = {"tiles": [list(tile)], "tile_cost": cost, "depth": depth}
                e = built({**BLANK, **shape})
                error, rates = 0.0, {}
                for dtype, found in measured.items():
                    b, m, n, k = np.array([size for size, _ in found], dtype=np.float64).T
                    real = np.array([seconds for _, seconds in found])
                    columns = {"b": b, "m": m, "n": n, "k": k, "nbytes": np.zeros(len(b))}
                    ratio = matmul_seconds(columns, 1.0, bandwidth, 1, e) / real
                    rates[dtype] = float(np.exp(np.median(np.log(ratio))))
                    error += float(np.abs(np.log(ratio / rates[dtype])).mean())
                if error < best[0]:
                    best = error, shape, rates
    return best[1], best[2]


def fit_attention(
    measured: dict[str, list[tuple[tuple[int, int, int], float, float]]], peak: dict[str, float]
) -> dict[str, Any]:
    """The fractions of the peak by head width, of both dtypes together."""
    widths = sorted({size[2] for found in measured.values() for size, *_ in found})
    flash: dict[str, Any] = {"head_dims": widths, "rows": 0.0, "diagonal": 32.0}
    unit = built({**BLANK, "flash": {"cpu": {**flash, "forward": [1.0] * len(widths), "backward": [1.0] * len(widths)}}})
    for name, products in (("forward", 2), ("backward", 5)):
        fractions = []
        for width in widths:
            logs = []
            for dtype, found in measured.items():
                for (h, t, e), *seconds in found:
                    if e == width:
                        sizes = {"b": h, "m": t, "n": t, "k": products * e, "nbytes": 0}
                        columns = {key: np.array([[float(x)]]) for key, x in sizes.items()}
                        back = np.array([[name == "backward"]])
                        least = flash_seconds(columns, back, peak[dtype], 1.0, unit.flash["cpu"])
                        logs.append(np.log(float(least[0, 0]) / seconds[name == "backward"]))
            fractions.append(min(float(np.exp(np.mean(logs))), 1.0))
        flash[name] = fractions
    return flash


BLANK: dict[str, Any] = {
    "origin": "",
    "matmul": 1.0,
    "single": 1.0,
    "depth": 0.0,
    "tiles": [[1, 1]],
    "tile_cost": 0.0,
    "quantised": 0.0,
    "flash": {},
    "attention": "cpu",
    "memory": [[1, 1.0]],
    "slower": {},
    "gap": 0.0,
    "host": 0.0,
    "checkpoint": 0.0,
    "asynchronous": False,
    "within": 1.0,
    "between": 1.0,
    "latency": 0.0,
    "contention": 0.0,
}


def calibrate(
    device: str = "cpu",
    budget: float = 0.06,
    step: Callable[[str], None] = lambda _: None,
    dtypes: Sequence[str] = tuple(DTYPES),
) -> dict[str, Any]:
    """Measure this machine's `device`: the fields of a profile, its `calibration` table among them.

    Args:
        device: "cpu" or "cuda".
        budget: seconds for each measurement.
        step: called with the name of each measurement, for a progress bar.
        dtypes: of `DTYPES`.
    """
    c = Calibration(device, budget, step)
    products = {name: c.products(DTYPES[name]) for name in dtypes}
    moved = c.moved()
    bandwidth = moved[-1][1]
    shape, rates = fit_products(products, bandwidth)
    reached = {name: max(2 * b * m * n * k / s for (b, m, n, k), s in found) for name, found in products.items()}
    peak = {name: max(rates[name], reached[name]) for name in products}
    memory = [[nbytes, rate / bandwidth] for nbytes, rate in moved]
    pace: dict[str, float] = {}
    for name, nbytes, seconds in c.kernels():
        pace[name] = max(pace.get(name, 0.0), nbytes / seconds)
    flash = fit_attention({name: c.attention(DTYPES[name]) for name in dtypes}, peak)
    host = c.launch()
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    threads = f"{torch.get_num_threads()} threads, " if device == "cpu" else ""
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    single = rates["fp32"] / peak["fp32"]
    calibration = {
        **BLANK,
        **shape,
        "origin": f"Measured on {name} on {today} with torch {torch.__version__}, {threads}by `estimate calibrate`.",
        "single": single,
        "matmul": rates["bf16"] / peak["bf16"] if "bf16" in rates else single,
        "memory": memory,
        "pace": pace,
        "flash": {"cpu": flash},
        "host": host,
        "checkpoint": c.checkpoint(host),
        "asynchronous": device == "cuda",
    }
    return {
        "name": name,
        "device": device,
        "memory_bytes": available_memory(torch.device(device)),
        "memory_bandwidth": bandwidth,
        "notes": f"load average {os.getloadavg()[0]:.1f} when it was measured",
        "peak": peak,
        "calibration": calibration,
    }


def processor() -> str:
    """The CPU's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def to_toml(table: dict[str, Any], prefix: str = "") -> str:
    """A nested dict as TOML: strings, numbers, booleans, lists of these, tables."""
    plain = {key: x for key, x in table.items() if not isinstance(x, dict)}
    lines = [f"{json.dumps(key)} = {json.dumps(x)}" for key, x in plain.items()]
    parts = ["\n".join(lines)]
    for key, inner in table.items():
        if isinstance(inner, dict):
            name = f"{prefix}{json.dumps(key)}"
            parts.append(f"[{name}]\n{to_toml(inner, name + '.')}")
    return "\n\n".join(parts)


def write_profile(path: Path, profile: dict[str, Any]) -> None:
    """Write a profile that `--gpu PATH` reads."""
    path.write_text(to_toml(profile) + "\n", encoding="utf-8")
