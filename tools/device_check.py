"""What this card does, in at most eight minutes: memory, kernels and steps, written to one JSON file.

    python tools/device_check.py --out device.json            # an NVIDIA or AMD card that PyTorch sees as cuda
    validate-estimates --import device.json                   # the table of differences, and rows in validation/

It needs the package with its trainer extra. Nothing is predicted here: the file has measurements alone, so that it can
be made on one machine and read on another. With --device cpu it does the same on a processor, with smaller sizes, to be
tried.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from trainer.referee.measure import build_step, measure

BUDGET = 480.0  # seconds in all
BACKENDS = {
    "flash-2": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
EIGHT = {"precision": "bf16", "attention": "sdpa"}
RECIPES = (
    {},
    {"attention": "sdpa"},
    {"precision": "tf32", "attention": "sdpa"},
    {"precision": "bf16"},
    EIGHT,
    EIGHT | {"dropout": 0.1},
    EIGHT | {"loss": "torch"},
    EIGHT | {"loss": "torch-fp32"},
    EIGHT | {"loss": "chunked"},
    EIGHT | {"checkpointing": "block"},
    EIGHT | {"checkpointing": "selective"},
    EIGHT | {"checkpointing": "block", "checkpoint_every": 2},
    EIGHT | {"optimizer_impl": "fused"},
    EIGHT | {"optimizer": "sgd-momentum"},
    EIGHT | {"optimizer": "lion"},
    EIGHT | {"grad_accumulation": 2, "max_grad_norm": 1.0},
    {"precision": "bf16-mixed", "attention": "sdpa"},
    {"precision": "fp16-mixed", "attention": "sdpa"},
    {"precision": "bf16-master", "attention": "sdpa"},
    {"precision": "bf16-mixed", "attention": "sdpa", "checkpointing": "block", "optimizer": "adamw-8bit"},
)


class Check:
    """The measurements of one device, each section as far as the time goes."""

    def __init__(self, device: str, budget: float) -> None:
        self.device, self.until = device, time.monotonic() + budget
        self.small = device == "cpu"
        self.skipped: list[str] = []

    def left(self, section: str) -> bool:
        """Whether there is time for more; what is skipped is noted."""
        if time.monotonic() < self.until:
            return True
        self.skipped.append(section)
        return False

    def tensor(self, *shape: int, dtype: torch.dtype, wanting: bool = False) -> torch.Tensor:
        """A random tensor."""
        return torch.randn(*shape, device=self.device).to(dtype).requires_grad_(wanting)

    def seconds(self, call, budget: float = 0.4) -> float:
        """The median seconds of a call, the device waited for."""
        sync = torch.cuda.synchronize if self.device == "cuda" else lambda: None
        for _ in range(2):
            call()
        sync()
        start = time.perf_counter()
        call()
        sync()
        inner = max(1, min(50, int(2e-3 / max(time.perf_counter() - start, 1e-7))))
        found: list[float] = []
        until = time.perf_counter() + (budget / 8 if self.small else budget)
        while len(found) < 3 or time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(inner):
                call()
            sync()
            found.append((time.perf_counter() - start) / inner)
        return statistics.median(found)

    # ---- sections

    def memory(self):
        """torch's figures of a steady step of each recipe: live, given out, reserved."""
        sizes = (2, 64, 4, 997, 128) if self.small else (4, 1024, 16, 50304, 1024)
        for family in ("gpt2", "llama"):
            for recipe in RECIPES[:: 1 if family == "llama" else 4]:
                if not self.left("memory"):
                    return
                layers, d, heads, vocabulary, context = sizes
                m = ModelConfig(family, layers, d, heads, vocabulary, context, d_ff=3 * d)
                try:
                    p = Plan(batch_size=2, **recipe)
                    x = measure(m, p, self.device, timed_steps=0)
                except (
                    ConfigError,
                    RuntimeError,
                    NotImplementedError,
                ) as error:  # not on this device: said, not hidden
                    yield {"model": m.to_dict(), "plan": {"batch_size": 2, **recipe}, "error": str(error)[:200]}
                    continue
                yield {
                    "model": m.to_dict(), "plan": p.to_dict(), "peak_bytes": x.peak_bytes,
                    "allocated_bytes": x.allocated_bytes, "reserved_bytes": x.reserved_bytes,
                }  # fmt: skip

    def context(self):
        """What the card holds beside tensors: the context, and cuBLAS's workspace."""
        if self.device != "cuda":
            return None
        torch.cuda.empty_cache()
        a = self.tensor(256, 256, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = a @ a
        torch.cuda.synchronize()
        workspace = torch.cuda.memory_allocated() - before - out.nbytes
        free, total = torch.cuda.mem_get_info()
        held = total - free - torch.cuda.memory_reserved()
        return {"workspace_bytes": workspace, "context_bytes": held, "total_bytes": total}

    def products(self):
        """Products, aligned and odd, large and small, in 16 and 32 bits."""
        large = ((128, 256, 256), (100, 250, 255)) if self.small else (
            (4096, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (2048, 2048, 2048), (1024, 1024, 1024),
            (512, 2048, 2048), (8192, 1024, 1024), (8192, 1024, 50304), (8192, 1024, 50257), (8192, 4096, 4092),
            (8192, 4095, 4096), (8192, 4100, 4096), (16384, 4096, 128256),
        )  # fmt: skip
        for dtype in (torch.bfloat16, torch.float32):
            for m, k, n in large:
                if not self.left("products"):
                    return
                if dtype == torch.float32 and m * k * n > 2**38:
                    continue
                x, w, g = (self.tensor(*shape, dtype=dtype) for shape in ((m, k), (n, k), (m, n)))
                for way, call in (
                    ("x w^T", lambda x=x, w=w: x @ w.t()),
                    ("g w", lambda g=g, w=w: g @ w),
                    ("g^T x", lambda g=g, x=x: g.t() @ x),
                ):
                    yield {
                        "m": m, "k": k, "n": n, "way": way, "dtype": str(dtype).removeprefix("torch."),
                        "seconds": self.seconds(call),
                    }  # fmt: skip

    def attention(self):
        """Attention by kernel, causal, forward and with backward."""
        cases = ((1, 4, 64, 32),) if self.small else (
            (8, 16, 1024, 64), (4, 32, 2048, 128), (2, 32, 4096, 128), (1, 32, 16384, 128), (4, 32, 4096, 64),
        )  # fmt: skip
        for B, heads, T, e in cases:
            for name, backend in BACKENDS.items():
                if not self.left("attention"):
                    return
                q, k, v = (self.tensor(B, heads, T, e, dtype=torch.bfloat16, wanting=True) for _ in range(3))

                def forward(q=q, k=k, v=v, backend=backend):
                    with sdpa_kernel(backend):
                        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                def both(forward=forward):
                    out = forward()
                    out.backward(torch.ones_like(out))

                row = {"B": B, "heads": heads, "T": T, "head_dim": e, "kernel": name}
                try:
                    yield row | {"forward": self.seconds(forward), "both": self.seconds(both)}
                except RuntimeError as error:
                    yield row | {"error": str(error).splitlines()[0][:200]}

    def operators(self):
        """An eager Llama's operators as transformers writes them, forward and with backward."""
        rows = 512 if self.small else 8192
        width, heads, e, hidden = (64, 4, 16, 128) if self.small else (4096, 32, 128, 14336)
        half = torch.bfloat16
        weight = torch.ones(width, device=self.device, requires_grad=True)
        cos, sin = (self.tensor(1, 1, rows, e, dtype=half) for _ in range(2))

        def rms_norm(x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return weight * h.to(x.dtype)

        def rotate(x):
            turned = torch.cat((-x[..., e // 2 :], x[..., : e // 2]), -1)
            return x * cos + turned * sin

        def gated(x):
            return F.silu(x[0]) * x[1]

        norm = nn.LayerNorm(width, device=self.device)
        cases = {
            "rms_norm": (rms_norm, (rows, width), half),
            "rope": (lambda x: rotate(x.transpose(1, 2)), (1, rows, heads, e), half),
            "silu_mul": (gated, (2, rows, hidden), half),
            "cast": (lambda x: x.float(), (rows, width), half),
            "layer_norm": (norm, (rows, width), torch.float32),
            "softmax": (lambda x: x.softmax(-1), (rows, width), torch.float32),
        }
        for name, (call, shape, dtype) in cases.items():
            if not self.left("operators"):
                return
            x = self.tensor(*shape, dtype=dtype, wanting=True)

            def both(call=call, x=x):
                out = call(x)
                out.backward(torch.ones_like(out))

            yield {
                "operator": name, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."),
                "forward": self.seconds(lambda call=call, x=x: call(x)), "both": self.seconds(both),
            }  # fmt: skip

    def host(self):
        """Seconds of the host for one operator, forward and with backward; and for a checkpointed one."""
        x = torch.ones(8, device=self.device, requires_grad=True)
        count = 200

        def chain():
            y = x
            for _ in range(count):
                y = y * 1.0001
            return y.sum()

        def kept():
            y = x
            for _ in range(20):
                y = checkpoint(lambda z: z * 1.0001, y, use_reentrant=False)
            y.sum().backward()

        return {
            "forward": self.seconds(chain) / count,
            "with_backward": self.seconds(lambda: chain().backward()) / (2 * count),
            "checkpoint": self.seconds(kept) / 20,
        }

    def steps(self):
        """Six whole steps."""
        fast = {"precision": "bf16", "attention": "sdpa", "optimizer_impl": "fused"}
        cases = (
            (ModelConfig("gpt2", 2, 64, 4, 997, 64), Plan(batch_size=2)),
            (ModelConfig("llama", 2, 64, 4, 997, 64, d_ff=192), Plan(batch_size=2, precision="bf16")),
        )
        if not self.small:
            small, odd = (ModelConfig("gpt2", 12, 768, 12, V, 1024) for V in (50304, 50257))
            cases = (
                (small, Plan(batch_size=8, precision="bf16-mixed", attention="sdpa")),
                (odd, Plan(batch_size=8, precision="bf16", attention="sdpa")),
                (small, Plan(batch_size=1, precision="bf16", checkpointing="block")),
                (ModelConfig("llama", 4, 4096, 32, 32000, 2048, 8, d_ff=14336), Plan(batch_size=1, **fast)),
                (
                    ModelConfig("llama", 16, 2048, 32, 32000, 2048, 8, d_ff=8192),
                    Plan(batch_size=2, checkpointing="block", **fast),
                ),
                (
                    ModelConfig("gpt2", 24, 1024, 16, 50304, 1024),
                    Plan(batch_size=4, precision="tf32", attention="sdpa"),
                ),
            )
        for m, p in cases:
            if not self.left("steps"):
                return
            row = {"model": m.to_dict(), "plan": p.to_dict()}
            try:
                step = build_step(m, p, self.device)
                yield row | {"seconds": self.seconds(step, 4.0)}
                del step
            except (RuntimeError, ConfigError) as error:
                yield row | {"error": str(error)[:200]}
            if self.device == "cuda":
                torch.cuda.empty_cache()


def run(device: str, budget: float, say) -> dict:
    """Everything, as one JSON-ready table."""
    check = Check(device, budget)
    started = time.monotonic()
    found = {
        "kind": "device_check",
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }
    for name in ("memory", "products", "attention", "operators", "steps"):
        say(name)
        found[name] = list(getattr(check, name)())
    found["context"], found["host"] = check.context(), check.host()
    found["skipped"] = sorted(set(check.skipped))
    found["seconds"] = round(time.monotonic() - started, 1)
    return found


def main(argv=None) -> int:
    """The command; 0 when the file is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("device.json"), help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device = cuda: this PyTorch sees no CUDA device; allowed here is cpu")
    found = run(args.device, args.budget, lambda name: sys.stderr.write(f"{name} ...\n"))
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{args.out}: {found['seconds']} s. Next: validate-estimates --import {args.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
