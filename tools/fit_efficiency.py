"""Fit `estimator/data/efficiency.toml` to the published measurements of kernels and collectives in the repository.

    python tools/fit_efficiency.py > estimator/data/efficiency.toml

Nothing is fitted to a training run: those rows judge (`validate-estimates --published`). Each fit minimises the mean
absolute relative error by a random search that halves its step; the seed makes it repeatable.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np

from estimator.hardware import accelerator
from estimator.published import rows
from estimator.timing import Efficiency, Flash, flash_seconds, matmul_seconds

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))  # CUTLASS's and cuBLAS's common tiles
# Device-to-device copies over the datasheet's bandwidth (ml-engineering@744d01e18, accelerator benchmarks): A100 80GB
# 1581 of 2039 GB/s, H100 2525 of 3350, GB200 5815 of 8000.
COPIES = {"ampere": 1581 / 2039, "hopper": 2525 / 3350, "blackwell": 5815 / 8000}
GAP = 2.5e-6  # seconds between two kernels on the device: recalled as typical, in no source at hand
# Seconds of the host for one kernel from eager PyTorch, forward and backward, and for one checkpointed block: steps of
# a model too small to compute anything (6 blocks of width 32, 8 tokens) with PyTorch 2.13 on one core of an EPYC,
# 2026-11. `estimate calibrate` measures both.
HOST, CHECKPOINT = 1.5e-5, 1.5e-3
CONTENTION = 0.15  # Calculon's processor_usage of NVLink (github:calculon-ai/calculon, systems/a100_80g.json)
NIC = 0.73  # of 50 GB/s: 4 x 8 B200 over EFA at 4 GiB, a ring between nodes under one inside; nothing else is published


def search(loss, start, most, seed=0):  # noqa: ANN001, ANN201 - a helper of this script
    """The point of least loss found from `start`; parameters stay above 0 and below `most`."""
    rng = np.random.default_rng(seed)
    best = np.array(start, float)
    least = loss(best)
    step = 0.4
    for turn in range(1600):
        trial = np.minimum(best * np.exp(step * rng.normal(size=len(best)) * (rng.random(len(best)) < 0.5)), most)
        value = loss(trial)
        if value < least:
            best, least = trial, value
        if turn % 200 == 199:
            step /= 1.7
    return best, least


def blank(**given) -> Efficiency:  # noqa: ANN003 - a helper of this script
    """An Efficiency to fit with."""
    plain = {
        "origin": "", "matmul": 0.8, "depth": 100.0, "tiles": TILES, "tile_cost": 1000.0, "quantised": 0.5, "flash": {},
        "attention": "flash-2", "memory": ((1.0, 1.0),), "slower": {}, "gap": GAP, "host": HOST,
        "checkpoint": CHECKPOINT, "asynchronous": True, "within": 0.8, "between": NIC, "latency": 5e-6,
        "contention": CONTENTION,
    }  # fmt: skip
    return Efficiency(**{**plain, **given})


def fit_matmul(gpu: str, name: str, memory: float) -> tuple[dict[str, float], str]:
    """(fields, how well) of the matrix products measured on `gpu`."""
    a = accelerator(name)
    data = [r for r in rows("gemm_efficiency") if r["gpu"] == gpu and r["op"] == "matmul"]
    shape = {x: np.array([float(r[x]) for r in data])[:, None] for x in "bmnk"}
    b, m, n, k = (shape[x] for x in "bmnk")
    fp32 = np.array([r["out_dtype"] == "fp32" for r in data])[:, None]
    again = np.array([r["accumulate"] == "True" for r in data])[:, None]
    shape["nbytes"] = b * (2 * m * k + 2 * k * n + np.where(fp32, 4, 2) * np.where(again, 2, 1) * m * n)
    peak = a.peak_flops("bf16")
    measured = 2 * b * m * n * k / (peak * np.array([float(r["efficiency"]) for r in data])[:, None])

    def predicted(x: np.ndarray) -> np.ndarray:
        e = blank(matmul=x[0], depth=x[1], tile_cost=x[2], quantised=x[3])
        return matmul_seconds(shape, peak, a.memory_bandwidth * memory, a.sm_count, e) + GAP

    found, _ = search(lambda x: np.abs(predicted(x) / measured - 1).mean(), [0.8, 64, 2000, 0.5], [1, 1e3, 1e5, 1])
    error = np.abs(predicted(found) / measured - 1)
    text = f"{len(data)} products on {gpu}: median error {np.median(error):.1%}, mean {error.mean():.1%}"
    return dict(zip(("matmul", "depth", "tile_cost", "quantised"), found, strict=True)), text


def fit_flash(gpu: str, kernel: str, ratio: float, *, by_width: bool = True) -> tuple[Flash, str]:
    """(kernel, how well) of forward and backward together; `ratio` is backward's rate over forward's.

    `by_width`: each head width has a rate of its own. Not for the first generation, whose chart reads, against all
    later kernels, slower for wide heads than for narrow ones by as much as it can be misread.
    """
    data = [r for r in rows("attention_efficiency") if (r["gpu"], r["kernel"], r["passes"]) == (gpu, kernel, "fwd+bwd")]
    dims = sorted({float(r["head_dim"]) for r in data})[-2 if by_width else -1 :]
    column = {
        x: np.array([float(r[x]) for r in data])[:, None] for x in ("head_dim", "seq_len", "efficiency", "causal")
    }
    heads = np.array([float(r["total_tokens"]) * float(r["hidden"]) for r in data])[:, None]
    e, T = column["head_dim"], column["seq_len"]
    b = heads / (e * T)
    flops = 2 * 7 * b * T * T * e * np.where(column["causal"], 0.5, 1)  # 2 products forward, 5 backward
    measured = flops / column["efficiency"]

    def predicted(x: np.ndarray) -> np.ndarray:
        flash = made(x)
        # A kernel without a mask does all the scores, and has no diagonal.
        n = np.where(column["causal"], T, 2 * T - flash.diagonal)
        seconds = np.zeros_like(measured)
        for products in (2, 5):
            shape = {"b": b, "m": T, "n": n, "k": products * e, "nbytes": np.zeros_like(T)}
            seconds += flash_seconds(shape, np.full(T.shape, products == 5), 1.0, np.inf, flash)
        return seconds

    def made(x: np.ndarray) -> Flash:
        forward = x[: len(dims)]
        return Flash(tuple(dims), tuple(forward), tuple(ratio * forward), x[-2], x[-1])

    start = [*[0.5] * len(dims), 150, 100]
    found, _ = search(lambda x: np.abs(predicted(x) / measured - 1).mean(), start, [*[1] * len(dims), 1e3, 256])
    error = np.abs(predicted(found) / measured - 1)
    return made(found), f"{len(data)} points of {kernel} on {gpu}: median error {np.median(error):.1%}"


def ratio_of(gpu: str) -> float:
    """Backward's rate over forward's, from kernels timed apart."""
    rate = {op: [float(r["efficiency"]) for r in rows("gemm_efficiency") if (r["gpu"], r["op"]) == (gpu, op)]
            for op in ("sdp_fwd", "sdp_bwd")}  # fmt: skip
    return float(np.median(np.array(rate["sdp_bwd"]) / np.array(rate["sdp_fwd"])))


def fit_link(system: str, link: float) -> tuple[float, float, str]:
    """(fraction of the link, seconds a hop, how well) of all-reduces inside a node."""
    data = [r for r in rows("collectives") if r["system"] == system and float(r["bytes"]) >= 2**15]
    n, size, measured = (np.array([float(r[x]) for r in data]) for x in ("n", "bytes", "time_us"))

    def predicted(x: np.ndarray) -> np.ndarray:
        return 2 * (n - 1) / n * size / (link * x[0]) + 2 * (n - 1) * x[1]

    found, _ = search(lambda x: np.abs(np.log(predicted(x) * 1e6 / measured)).mean(), [0.7, 4e-6], [1.5, 1e-3])
    error = np.abs(predicted(found) * 1e6 / measured - 1)
    return found[0], found[1], f"{len(data)} all-reduces on {system}: median error {np.median(error):.0%}"


def toml(value) -> str:  # noqa: ANN001 - a helper of this script
    """A value as TOML."""
    if isinstance(value, bool | str):
        return json.dumps(value)
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml(x) for x in value) + "]"
    return f"{float(value):.4g}"


def blackwell_flash(like: Flash) -> tuple[Flash, str]:
    """The fused kernels timed on B200 at 32 heads or more; at a width of 64 they lose what they lose on `like`."""
    fraction = {"sdp_fwd": [], "sdp_bwd": []}
    for r in rows("gemm_efficiency"):
        size = dict(part.split("=") for part in r["key"].split(", ") if "=" in part)
        if (
            r["gpu"] == "B200 SXM"
            and r["op"] in fraction
            and size["qk_head_dim"] == "128"
            and int(size["head_num"]) >= 32
        ):
            n = int(size["seq_len"])
            fraction[r["op"]].append(float(r["efficiency"]) / 2 * (n / 2 + like.diagonal / 2 + like.rows) / (n / 2))
    forward, backward = (float(np.median(fraction[op])) for op in ("sdp_fwd", "sdp_bwd"))
    narrow = like.forward[0] / like.forward[1]
    made = Flash((64.0, 128.0), (narrow * forward, forward), (narrow * backward, backward), like.rows, like.diagonal)
    return made, f"{sum(map(len, fraction.values()))} fused kernels on B200 SXM (the source counts the masked half)"


def entry(table: str, fields: dict[str, object], flash: dict[str, Flash]) -> None:
    """Print one table of the file."""
    print(f"\n[{table}]")  # noqa: T201 - the output
    for name, value in fields.items():
        print(f"{name} = {toml(value)}")  # noqa: T201 - the output
    print("flash = { " + ", ".join(f'"{k}" = {{ {inner(f)} }}' for k, f in flash.items()) + " }")  # noqa: T201 - the output


def inner(flash: Flash) -> str:
    """A Flash as the inside of an inline table."""
    return ", ".join(f"{name} = {toml(getattr(flash, name))}" for name in Flash.__slots__)


def largest(fit: dict[str, float]) -> float:
    """The fraction of the peak that a product reaches in the largest tiles, all dimensions long."""
    area = max(m * n for m, n in TILES)
    return fit["matmul"] * area / (area + fit["tile_cost"])


def main() -> None:
    """Fit and print."""
    ampere, ampere_text = fit_matmul("A100 80GB PCIe", "a100-80gb-pcie", COPIES["ampere"])
    blackwell, blackwell_text = fit_matmul("B200 SXM", "b200-180gb-sxm", COPIES["blackwell"])
    best = {r["accelerator"]: float(r["efficiency"].rstrip("%")) / 100 for r in rows("mamf") if r["dtype"] == "bf16"}
    # What is left, over a sweep of shapes, of the best product that anybody timed.
    sustained = {
        "ampere": largest(ampere) / best["NVIDIA A100 PCIe"],
        "blackwell": largest(blackwell) / best["NVIDIA B200 SXM"],
    }
    # Between A100, which is not limited by its power, and B200, which is: H100's 700 W for 989 TFLOP/s lie between 400
    # W for 312 and 1,000 W for 2,250. The geometric mean of the two, since nobody published a sweep on Hopper.
    between = (sustained["ampere"] * sustained["blackwell"]) ** 0.5
    scale = largest(ampere) / ampere["matmul"]
    hopper = {**ampere, "matmul": best["NVIDIA H100 SXM"] * between / scale}
    # AMD's tiles and power were not measured: A100's, at the best that was timed on MI300X and MI355X.
    cdna3 = {**ampere, "matmul": best["AMD MI300X"] * sustained["ampere"] / scale}
    cdna4 = {**ampere, "matmul": best["AMD MI355X"] * sustained["ampere"] / scale}
    first, first_text = fit_flash("A100 80GB SXM", "FA1", ratio_of("A100 80GB PCIe"), by_width=False)
    second, second_text = fit_flash("A100 80GB SXM", "FA2", ratio_of("A100 80GB PCIe"))
    hopper_second, hopper_text = fit_flash("H100 SXM", "FA2", ratio_of("B200 SXM"))
    newest, newest_text = blackwell_flash(hopper_second)
    a100, v100 = fit_link("8x A100 SXM NVLink3 single node", 300e9), fit_link("V100 node (NVLink)", 150e9)
    b200 = fit_link("1 node(s) x 8 B200 (P6-B200: NVLink5 + 8x50GB/s EFA)", 900e9)
    h200 = fit_link("8x H200 NVLink4 single node (NVLS on)", 450e9)
    common = {
        "slower": {},
        "gap": GAP,
        "host": HOST,
        "checkpoint": CHECKPOINT,
        "asynchronous": True,
        "contention": CONTENTION,
        "between": NIC,
    }

    def fields(origin: str, matmul: dict[str, float], memory: str, link: tuple[float, float], attention: str) -> dict:
        return {
            "origin": origin, **matmul, "tiles": TILES, "memory": ((1, COPIES[memory]),), "within": link[0],
            "latency": link[1], "attention": attention, **common,
        }  # fmt: skip

    print(HEADER)  # noqa: T201 - the output
    texts = [ampere_text, first_text, second_text, a100[2]]
    entry("architecture.ampere", fields("Fitted to " + "; ".join(texts) + ".", ampere, "ampere", a100[:2], "flash-2"),
          {"flash-1": first, "flash-2": second})  # fmt: skip
    text = (f"Fitted to {hopper_text}; {h200[2]}, its bandwidth without in-switch reduction 368 of 450 GB/s "
            f"(ml-engineering); matrix products at {between:.0%} of the best timed on H100, between A100 and B200."
            )  # fmt: skip
    entry(
        "architecture.hopper",
        fields(text, hopper, "hopper", (368 / 450, h200[1]), "flash-2"),
        {"flash-2": hopper_second},
    )
    text = f"Fitted to {blackwell_text}; {newest_text}; {b200[2]}."
    for name, more in (("blackwell", ""), ("blackwell-ultra", " Measured on B200, not on this.")):
        entry(
            f"architecture.{name}",
            fields(text + more, blackwell, "blackwell", b200[:2], "flash-2"),
            {"flash-2": newest},
        )
    for name, fit, on in (("cdna3", cdna3, "MI300X"), ("cdna4", cdna4, "MI355X")):
        text = (
            f"Matrix products and attention scaled to the best product timed on {on}; all else is A100's, unmeasured."
        )
        slower = fit["matmul"] / ampere["matmul"]
        attention = replace(second, forward=tuple(slower * x for x in second.forward),
                            backward=tuple(slower * x for x in second.backward))  # fmt: skip
        entry(f"architecture.{name}", fields(text, fit, "ampere", a100[:2], "flash-2"), {"flash-2": attention})
    for name in ("volta", "turing"):
        text = "A100's efficiencies, with its first fused attention: the second needs Ampere."
        link = v100[:2] if name == "volta" else a100[:2]
        text += f" Links: {v100[2]}." if name == "volta" else ""
        entry(f"architecture.{name}", fields(text, ampere, "ampere", link, "flash-1"), {"flash-1": first})


HEADER = """\
# What kernels reach of the peak, by architecture: written by tools/fit_efficiency.py from the measurements in
# data/published, each with its source there. Fields: estimator.timing.Efficiency and Flash.
# No figure is fitted to a training run.

default = "ampere"

[accelerator]"""

if __name__ == "__main__":
    sys.exit(main())
