"""`estimate calibrate`: measure what this machine's kernels reach, and write it down as an accelerator of its own.

Matrix products, attention, kernels that move bytes and the cost of a launch are each measured by themselves, in both
dtypes; nothing is fitted to a training step but the launch, by a step so small that there is nothing else in it. It
needs torch, so it is here and not in the estimator, whose command asks for it.
"""

from __future__ import annotations

import argparse
import datetime as dt
import itertools
import os
import platform
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional as F

from estimator.accounting.accounts import account, sizes_for
from estimator.describe.catalogue import to_toml
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.timing.kernels import table
from estimator.timing.roofline import built, flash_seconds, matmul_seconds
from trainer.referee.measure import build_step
from trainer.system.heap import keep_freed_memory
from trainer.system.memory import available_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# (m, k, n) of a linear layer: tokens, width in, width out. Each is measured forward and both ways backward.
LINEAR = ((64, 128, 128), (64, 128, 512), (256, 128, 384), (256, 512, 256), (128, 1024, 1024), (1024, 256, 1024),
          (512, 768, 768), (1024, 1024, 1024), (512, 1024, 3072), (512, 2048, 512))  # fmt: skip
BATCHED = ((16, 64, 32), (16, 128, 64), (8, 256, 64), (8, 512, 64))  # heads, tokens, head width
FLASH = ((8, 256, 32), (8, 256, 64), (8, 512, 64), (4, 512, 128))
MOVED = tuple(2**n for n in range(13, 28, 2))  # bytes of a kernel
TILES = ((1, 1), (16, 16), (32, 32), (64, 64))
DEPTHS = (0, 2, 4, 8, 16, 32, 64, 128)
MEASUREMENTS = 165  # about, for the progress bar
COLD = 256 * 2**20  # bytes, more than a last-level cache
LAUNCH = ModelConfig("gpt2", 2, 8, 2, 16, 4)  # so small that only launches take time


def clock(device: str) -> float:
    """Seconds. One thread's own time leaves out what other processes take; several threads and CUDA need wall time."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def usual_seconds(call: Callable[[], object], device: str, budget: float) -> float:
    """The median seconds of a call in `budget` seconds and at least three turns.

    Not the least: a short kernel finds a moment when the core's other thread is quiet, a whole step does not.
    """
    call()
    start = clock(device)
    call()
    once = max(clock(device) - start, 1e-7)
    inner = max(1, int(2e-4 / once))  # short ones several at a time: a clock takes time too
    found: list[float] = []
    until = time.perf_counter() + budget
    while len(found) < 3 or time.perf_counter() < until:
        start = clock(device)
        for _ in range(inner):
            call()
        found.append((clock(device) - start) / inner)
    return statistics.median(found)


class Calibration:
    """The measurements of one device.

    Attributes:
        device: "cpu" or "cuda".
        budget: seconds for each of `MEASUREMENTS`.
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
        return max(usual_seconds(call, self.device, self.budget) - self.empty, 1e-8)

    def cold(self, name: str, call: Callable[..., object], *operands: Tensor) -> float:
        """The seconds of `call(*operands)` whose operands have left the core's own cache, as in a step they have."""
        pool = [operands]
        pool += [tuple(x.clone() for x in operands) for _ in range(min(COLD // sum(x.nbytes for x in operands), 127))]
        turns = itertools.cycle(pool)
        return self.seconds(name, lambda: call(*next(turns)))

    def products(self, dtype: torch.dtype) -> list[tuple[tuple[int, int, int, int], float]]:
        """((b, m, n, k), seconds) of products as linear layers and unfused attention do them."""
        found = []
        for m, k, n in LINEAR:
            x, w, g = self.tensor(dtype, m, k), self.tensor(dtype, n, k), self.tensor(dtype, m, n)
            name = f"product {m} x {k} x {n}"
            found += [
                ((1, m, n, k), self.cold(name, lambda x, w: x @ w.t(), x, w)),
                ((1, m, k, n), self.cold(name, lambda g, w: g @ w, g, w)),
                ((1, n, k, m), self.cold(name, lambda g, x: g.t() @ x, g, x)),
            ]
        for b, t, e in BATCHED:
            q, s = self.tensor(dtype, b, t, e), self.tensor(dtype, b, t, t)
            name = f"batched product {b} x {t} x {e}"
            found += [
                ((b, t, t, e), self.cold(name, lambda q: q @ q.transpose(1, 2), q)),
                ((b, t, e, t), self.cold(name, lambda q, s: s @ q, q, s)),
                ((b, t, e, t), self.cold(name, lambda q, s: s.transpose(1, 2) @ q, q, s)),
            ]
        return found

    def moved(self) -> list[tuple[int, float]]:
        """(bytes, bytes/s) of a kernel that adds two tensors into a third."""
        found = []
        for nbytes in MOVED:
            x = self.tensor(torch.float32, max(nbytes // 12, 1))
            found.append((nbytes, nbytes / self.cold(f"move {nbytes:,} bytes", torch.add, x, x.clone())))
        return found

    def kernels(self) -> Iterator[tuple[str, float, float]]:
        """(name/bytes of an element, bytes, seconds) of the ledger's kernels that do more than move bytes, or less."""
        for dtype in DTYPES.values():
            yield from self._kernels(dtype, 4096, 512)  # operands that a core's own cache does not hold

    def _kernels(self, dtype: torch.dtype, rows: int, width: int) -> Iterator[tuple[str, float, float]]:
        x, y, out = (self.tensor(dtype, rows, width) for _ in range(3))
        positive, weight = x.abs() + 1, self.tensor(dtype, width)
        one, item = x.numel() * x.itemsize, x.itemsize
        mask = torch.ones(rows, width, dtype=torch.bool, device=self.device).triu()  # as a causal one's: in runs
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
            "sqrt": (2, positive.sqrt),
            "div": (2, lambda: x / 2.0),
            "neg": (2, lambda: -x),
            "pow": (2, lambda: x.pow(2)),
            "rsqrt": (2, positive.rsqrt),
            "sum": (1, lambda: x.sum(0)),
            "cat": (2, lambda: torch.cat((x[:, : width // 2], x[:, width // 2 :]), -1)),
            "clone": (2, heads.contiguous),
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

            def backward(out: Tensor = out, q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = grad) -> object:
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
        seconds = usual_seconds(step, self.device, 10 * self.budget)
        return seconds / float(kernels.launches(sizes_for(LAUNCH, p), 1).sum())

    def checkpoint(self, host: float) -> float:
        """Seconds to checkpoint a block and to prepare its recomputation, beside the kernels that it launches."""
        p = Plan(checkpointing="block")
        launches = float(table(account(LAUNCH, p, self.device)).launches(sizes_for(LAUNCH, p), 1).sum())
        step = build_step(LAUNCH, p, self.device)
        self.step("a checkpointed training step")
        seconds = usual_seconds(step, self.device, 10 * self.budget)
        return max(seconds - host * launches, 0.0) / LAUNCH.num_layers


Product = tuple[tuple[int, int, int, int], float]


def fit_products(measured: dict[str, list[Product]], bandwidth: float) -> tuple[dict[str, Any], dict[str, float]]:
    """The tile and its depth under which all products come out best; and the FLOP/s, by dtype, that take their time."""
    best: tuple[float, dict[str, Any], dict[str, float]] = (float("inf"), {}, {})
    for tile in TILES:
        for depth in DEPTHS:
            shape = {"tiles": [list(tile)], "depth": depth}
            e = built({**BLANK, **shape})
            error, rates = 0.0, {}
            for dtype, found in measured.items():
                b, m, n, k = np.array([size for size, _ in found], dtype=np.float64).T
                real = np.array([seconds for _, seconds in found])
                columns = {"b": b, "m": m, "n": n, "k": k, "nbytes": np.zeros(len(b))}
                work = matmul_seconds(columns, 1.0, bandwidth, 1, e)
                rates[dtype] = float(work.sum() / real.sum())
                error += float(np.abs(np.log(work / real / rates[dtype])).mean())
            if error < best[0]:
                best = error, shape, rates
    return best[1], best[2]


def fit_attention(
    measured: dict[str, list[tuple[tuple[int, int, int], float, float]]], peak: dict[str, float]
) -> dict[str, Any]:
    """The fractions of the peak by head width, of both dtypes together."""
    widths = sorted({size[2] for found in measured.values() for size, *_ in found})
    flash: dict[str, Any] = {"head_dims": widths, "rows": 0.0, "diagonal": 32.0}
    ones = [1.0] * len(widths)
    unit = built({**BLANK, "flash": {"cpu": {**flash, "forward": ones, "backward": ones}}})
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
    pace = {name: nbytes / seconds for name, nbytes, seconds in c.kernels()}
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


def write_profile(path: Path, profile: dict[str, Any]) -> None:
    """Write a profile that `--gpu PATH` reads."""
    path.write_text(to_toml(profile) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 if a profile was written, 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="estimate calibrate",
        description="Measure what this machine's kernels reach, and write it down as an accelerator of its own.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("my-machine.toml"), help="the profile (default: %(default)s)")
    parser.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="what to measure (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=0.1, help="seconds a measurement (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".toml":
        parser.error(f"--out = {args.out}: must end in .toml")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device = cuda: this PyTorch sees no CUDA device; allowed here is cpu")
    if not args.budget > 0 or (args.threads is not None and args.threads < 1):
        parser.error("--budget and --threads must be above 0")
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    console = Console()
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=MEASUREMENTS)
            profile = calibrate(
                args.device, args.budget, lambda name: progress.update(task, advance=1, description=name)
            )
        write_profile(args.out, profile)
    except OSError as error:
        parser.error(f"--out = {args.out}: cannot be written ({error.strerror})")
    finally:
        torch.set_num_threads(before)
    rates = ", ".join(f"{dtype} {flops / 1e9:,.0f} GFLOP/s" for dtype, flops in profile["peak"].items())
    console.print(f"{profile['name']}: {rates}, memory {profile['memory_bandwidth'] / 1e9:,.1f} GB/s", highlight=False)
    console.print(f"wrote {args.out}: estimate MODEL --gpu {args.out}", highlight=False)
    return 0
