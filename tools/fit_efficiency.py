"""Fit `estimator/data/efficiency.toml` to the published measurements of kernels and collectives in the repository.

    python tools/fit_efficiency.py > estimator/data/efficiency.toml

Nothing is fitted to a training run: those rows judge (`validate-estimates --published`). Each fit minimises the mean
absolute relative error by a random search that narrows its step; the seed makes it repeatable.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np

from estimator.hardware.accelerators import accelerator, accelerators
from estimator.studies.cards import NAMES
from estimator.studies.operators import plain_fraction, predicted_seconds, program, timed
from estimator.studies.runs import rows
from estimator.timing.roofline import Efficiency, Flash, efficiency, flash_seconds, matmul_seconds

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))  # CUTLASS's and cuBLAS's common tiles
# Device-to-device copies over the datasheet's bandwidth (ml-engineering@744d01e18, accelerator benchmarks): A100 80GB
# 1581 of 2039 GB/s, H100 2525 of 3350, GB200 5815 of 8000.
COPIES = {"ampere": 1581 / 2039, "hopper": 2525 / 3350, "blackwell": 5815 / 8000}
# H200's all-reduce without in-switch reduction, of 450 GB/s (ml-engineering@744d01e18, network): what the other
# collectives reach too, which no switch helps.
HOPPER_RING = 368 / 450
# Seconds of the host for one kernel from eager PyTorch, forward and backward, and for one checkpointed block: steps of
# a model too small to compute anything (6 blocks of width 32, 8 tokens) with PyTorch 2.13 on one core of an EPYC,
# 2026-11. `estimate calibrate` measures both.
HOST, CHECKPOINT = 1.5e-5, 1.5e-3
# Hz at which H100 SXM runs where nothing throttles it; its peak is for 1830 MHz
# (github:smallscientist1/cutlass-kernels, src/fmha-pipeline/myrun.md: "clock freq: 1980 MHz").
HOPPER_CLOCK = 1980e6
# GeForce cards run faster than their datasheet's clock: TFLOP/s of products of 8192 in fp32 and in bf16, with fp32
# accumulation, sustained for two minutes with cuBLASLt (README of a public repository gpu-bench, results/4090.json and
# results/5090d.json). What fp32 reaches of its peak is the clock; what bf16 reaches of its own at that clock, the rest.
GEFORCE = {"rtx-4090-24gb": (89.9, 175.1), "rtx-5090-32gb": (116.3, 234.8)}
# Cards whose best product somebody timed, though no sweep of shapes: what B200's sweep sustains of its best, by power.
OWN_BEST = {
    "b300-288gb-sxm": "NVIDIA B300 SXM",
    "gb200-186gb": "NVIDIA GB200 SXM",
    "mi325x-256gb": "AMD MI325X",
}
# The share of its bandwidth that a fused kernel which reads and writes 128 MB once reaches on a card itself: RMSNorm of
# 4,096 rows of 16,384 in 16 bits on RTX 5090, 1366 of 1792 GB/s (github:NVIDIA/TileGym#82).
MOVED = {"rtx-5090-32gb": 1366 / 1792}
# Cards on which somebody timed square products of these sizes (data/published/torch_mm.csv); where only the best of the
# five is known, the row has no size. Those of 1024 are at the floor of their launches.
SQUARES = (1024, 2048, 4096, 8192, 10240)
SUSTAINED = 4096
SQUARED = {
    name: NAMES[name]
    for name in (
        "NVIDIA A10G",
        "NVIDIA L4",
        "NVIDIA L40S",
        "NVIDIA A40",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 3090",
        "NVIDIA RTX PRO 6000 Workstation",
        "NVIDIA Tesla V100S",
        "NVIDIA Tesla T4",
    )
}
CONTENTION = 0.15  # Calculon's processor_usage of NVLink (github:calculon-ai/calculon, systems/a100_80g.json)
# The rate of a product whose rows are not aligned to 8 elements over that of the same one padded, timed by itself on
# H100: 36.96 of 130.56 us (github:m87-labs/kestrel#143, 9477 x 588 x 1152 in bf16), for all cards.
UNALIGNED = 36.96 / 130.56
NIC = 0.73  # of 50 GB/s: 4 x 8 B200 over EFA at 4 GiB, a ring between nodes under one inside; the only one published
COMMON = {
    "tiles": TILES,
    "host": HOST,
    "checkpoint": CHECKPOINT,
    "asynchronous": True,
    "unaligned": UNALIGNED,
    "contention": CONTENTION,
    "between": NIC,
}
PRODUCT = ("matmul", "depth", "tile_cost", "quantised")
HEADER = """\
# What kernels reach of the peak, by architecture and, where it differs, by accelerator: written by
# tools/fit_efficiency.py from the measurements in data/published, each with its source there. The fields are those of
# estimator.timing.roofline.Efficiency and Flash. No figure is fitted to a training run.

default = "ampere"
"""


def search(loss, start, most, seed=0, turns=1600):
    """The point of least loss found from `start`; parameters stay above 0 and below `most`."""
    rng = np.random.default_rng(seed)
    best = np.array(start, float)
    least = loss(best)
    step = 0.4
    for turn in range(turns):
        trial = np.minimum(best * np.exp(step * rng.normal(size=len(best)) * (rng.random(len(best)) < 0.5)), most)
        value = loss(trial)
        if value < least:
            best, least = trial, value
        if turn % (turns // 8) == turns // 8 - 1:
            step /= 1.7
    return best


def fit_matmul(gpu, name, memory, gap=None):
    """(fields, how well) of the matrix products measured on `gpu`; `gap` None: what starting one took is fitted too."""
    a = accelerator(name)
    data = [r for r in rows("gemm_efficiency") if r["gpu"] == gpu and r["op"] == "matmul"]
    shape = {x: np.array([float(r[x]) for r in data])[:, None] for x in "bmnk"}
    b, m, n, k = (shape[x] for x in "bmnk")
    fp32 = np.array([r["out_dtype"] == "fp32" for r in data])[:, None]
    again = np.array([r["accumulate"] == "True" for r in data])[:, None]
    shape["nbytes"] = b * (2 * m * k + 2 * k * n + np.where(fp32, 4, 2) * np.where(again, 2, 1) * m * n)
    peak = a.peak_flops("bf16")
    measured = 2 * b * m * n * k / (peak * np.array([float(r["efficiency"]) for r in data])[:, None])
    blank = {
        "slower": {},
        "gap": 0,
        "single": 1,
        "origin": "",
        "flash": {},
        "attention": "",
        "memory": ((1, 1),),
        "within": 1,
        "latency": 1,
    }

    def predicted(x):
        e = Efficiency(**COMMON, **blank, **dict(zip(PRODUCT, x, strict=False)))
        start = x[len(PRODUCT)] if gap is None else gap
        return matmul_seconds(shape, peak * e.matmul, a.memory_bandwidth * memory, a.sm_count, e) + start

    start, most = [0.8, 64, 2000, 0.5], [1, 1e3, 1e5, 1]
    if gap is None:
        start, most = [*start, 5e-6], [*most, 1e-5]
    found = search(lambda x: np.abs(predicted(x) / measured - 1).mean(), start, most)
    error = np.abs(predicted(found) / measured - 1)
    text = f"{len(data)} products on {gpu}: median error {np.median(error):.1%}, mean {error.mean():.1%}"
    return dict(zip(PRODUCT, found, strict=False)), text


def largest(fit):
    """The fraction of the peak that a product reaches in the largest tiles, all dimensions long."""
    area = max(m * n for m, n in TILES)
    return fit["matmul"] * area / (area + fit["tile_cost"] * fit.get("fixed", 1))


def reaching(fit, fraction):
    """`fit` with another fraction of the peak for the largest products."""
    return {**fit, "matmul": fit["matmul"] * fraction / largest(fit)}


def a_clock(name):
    """FLOPs of 16-bit products that a multiprocessor of the card can do in a clock."""
    a = accelerator(name)
    peak = a.peak.get("bf16", a.peak.get("fp16"))
    return peak / (a.sm_count * a.boost_clock)


def shaped(fit, id_, like):
    """`fit` of the products of the card `like`, for a card whose multiprocessors do more or less in a clock.

    What a tile loads and what it takes to begin and to end one are so many clocks, not so many products: on a card
    with a quarter of the tensor cores they cost a quarter of them. Multiprocessors differ by powers of two; what else
    there is, is the clock at which a datasheet states the peak.
    """
    return {**fit, "fixed": 2.0 ** round(np.log2(a_clock(id_) / a_clock(like)))}


def squares(fit, id_, kernels):
    """TFLOP/s of square products of `SQUARES` by `fit`, on a card with such kernels beside."""
    a = accelerator(id_)
    n = np.array(SQUARES, float)
    shape = {"b": np.ones(len(n)), "m": n, "n": n, "k": n, "nbytes": 6 * n * n}
    blank = {"slower": {}, "origin": "", "flash": {}, "attention": "", "within": 1, "latency": 1, "single": 1}
    e = Efficiency(**COMMON, **blank, **fit, gap=kernels["gap"], memory=kernels["memory"])
    peak = a.peak.get("bf16", a.peak.get("fp16"))
    bandwidth = a.memory_bandwidth * e.memory[-1][1]
    seconds = matmul_seconds(shape, peak * e.matmul, bandwidth, a.sm_count, e, fixed=e.fixed) + e.gap
    return 2 * n**3 / seconds / 1e12


def at_level(fit, short):
    """`fit` at the level at which it is `short` of nothing: by what factor it is too slow."""
    for _ in range(20):
        fit = {**fit, "matmul": fit["matmul"] * short(fit)}
    return fit


def squared(fit, id_, kernels):
    """(`fit` at the level of the square products that were timed on the card, how well it does their sizes)."""
    timed = {}
    for r in rows("torch_mm"):
        if SQUARED.get(r["gpu"]) == id_:
            timed.setdefault(r["size"], []).append(float(r["tflops"]))

    def short(e):
        found = squares(e, id_, kernels)
        if "" in timed:
            return np.median(timed[""]) / found.max()
        logs = [np.log(np.median(timed[str(n)]) / x) for n, x in zip(SQUARES, found, strict=True) if n >= SUSTAINED]
        return np.exp(np.mean(logs))

    fit = at_level(fit, short)
    if "" in timed:
        return fit, f"the best of five square products, {np.median(timed['']):.4g} TFLOP/s"
    found = squares(fit, id_, kernels)
    off = [abs(x / np.median(timed[str(n)]) - 1) for n, x in zip(SQUARES, found, strict=True)]
    return fit, f"5 square products timed on it: median error {np.median(off):.0%}"


def fit_flash(gpu, kernel, ratio, *, by_width=True):
    """(kernel, how well) of forward and backward together; `ratio` is backward's rate over forward's.

    `by_width`: each head width has a rate of its own. Not for the first generation, whose chart reads, against all
    later kernels, slower for wide heads than for narrow ones by as much as it can be misread.
    """
    data = [r for r in rows("attention_efficiency") if (r["gpu"], r["kernel"], r["passes"]) == (gpu, kernel, "fwd+bwd")]
    dims = sorted({float(r["head_dim"]) for r in data})[-2 if by_width else -1 :]
    names = ("head_dim", "seq_len", "efficiency", "causal")
    column = {name: np.array([float(r[name]) for r in data])[:, None] for name in names}
    heads = np.array([float(r["total_tokens"]) * float(r["hidden"]) for r in data])[:, None]
    e, T = column["head_dim"], column["seq_len"]
    b = heads / (e * T)
    flops = 2 * 7 * b * T * T * e * np.where(column["causal"], 0.5, 1)  # 2 products forward, 5 backward
    measured = flops / column["efficiency"]

    def made(x):
        forward = x[: len(dims)]
        return Flash(tuple(dims), tuple(forward), tuple(ratio * forward), x[-2], x[-1])

    def predicted(x):
        flash = made(x)
        # A kernel without a mask does all the scores, and has no diagonal.
        n = np.where(column["causal"], T, 2 * T - flash.diagonal)
        seconds = np.zeros_like(measured)
        for products in (2, 5):
            shape = {"b": b, "m": T, "n": n, "k": products * e, "nbytes": np.zeros_like(T)}
            seconds += flash_seconds(shape, np.full(T.shape, products == 5), 1.0, np.inf, flash)
        return seconds

    start = [*[0.5] * len(dims), 150, 100]
    found = search(lambda x: np.abs(predicted(x) / measured - 1).mean(), start, [*[1] * len(dims), 1e3, 256])
    error = np.abs(predicted(found) / measured - 1)
    return made(found), f"{len(data)} points of {kernel} on {gpu}: median error {np.median(error):.1%}"


MOVING = ("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "embedding",
          "embedding_dense_backward", "native_layer_norm", "native_layer_norm_backward")  # fmt: skip


def fit_moving(name, walk=None):
    """(fields, how well) of kernels that move bytes: the bandwidth's fraction, the gap, how elements are walked.

    Of transformers' and torch's operators, each kernel by itself; each operator and direction weighs the same. What a
    card's rows do not have comes from A100.
    """
    data = [r for r in timed() if (r.metric, r.gpu) == ("speed", name) and r.eager and "linear" not in r.operator]
    data = [r for r in data if not r.operator.endswith("glu")]
    here = {x for r in data for row in program(r).rows for x in (row.name, row.access)}
    walked = [x for x in ("strided", "cast") if x in here and walk is None]
    slower = [x for x in MOVING if x in here]
    measured = np.array([r.value for r in data])
    groups = [(r.operator, r.mode) for r in data]
    weight = np.array([1 / groups.count(g) for g in groups])
    base = efficiency(accelerator(name))

    plain = plain_fraction(name)

    def made(x):
        found = dict(zip(walked, x[1:], strict=False))
        if found:
            found["cast-strided"] = min(found.values())
        factors = dict(zip(slower, np.maximum(x[1 + len(walked) :], 1), strict=True))
        return {"memory": ((1, plain),), "gap": x[0], "walk": walk or found, "slower": factors}

    def errors(x):
        e = replace(base, **made(x))
        return np.array([predicted_seconds(r, e) for r in data]) / measured

    start = [4e-6, *[1.5] * (len(walked) + len(slower))]
    most = [1e-5, *[20] * (len(walked) + len(slower))]
    found = search(lambda x: (np.abs(np.log(errors(x))) * weight).sum(), start, most, turns=800)
    error = np.abs(errors(found) - 1)
    return made(found), f"{len(data)} timings of single operators on {name}: median error {np.median(error):.1%}"


def backward_over_forward(gpu):
    """Backward's rate over forward's, from kernels timed apart."""
    rate = {
        op: np.array([float(r["efficiency"]) for r in rows("gemm_efficiency") if (r["gpu"], r["op"]) == (gpu, op)])
        for op in ("sdp_fwd", "sdp_bwd")
    }
    return float(np.median(rate["sdp_bwd"] / rate["sdp_fwd"]))


def fit_forward(gpu, kernel, backward):
    """(kernel, how well) of one timed forward alone; `backward` is its rate over forward's."""
    data = [r for r in rows("attention_efficiency") if (r["gpu"], r["kernel"], r["passes"]) == (gpu, kernel, "fwd")]
    dims = sorted({float(r["head_dim"]) for r in data})
    e, T, rate = (np.array([float(r[x]) for r in data])[:, None] for x in ("head_dim", "seq_len", "efficiency"))
    causal = np.array([r["causal"] == "1" for r in data])[:, None]

    def predicted(x):
        flash = Flash(tuple(dims), tuple(x[:-2]), tuple(x[:-2]), x[-2], x[-1])
        n = np.where(causal, T, 2 * T - flash.diagonal)
        shape = {"b": np.ones_like(T), "m": T, "n": n, "k": 2 * e, "nbytes": np.zeros_like(T)}
        seconds = flash_seconds(shape, np.zeros(T.shape, bool), 1.0, np.inf, flash)
        return 2 * T * T * 2 * e * np.where(causal, 0.5, 1) / seconds

    start = [*[0.5] * len(dims), 150, 100]
    found = search(lambda x: np.abs(predicted(x) / rate - 1).mean(), start, [*[1] * len(dims), 1e3, 256])
    error = np.abs(predicted(found) / rate - 1)
    made = Flash(tuple(dims), tuple(found[:-2]), tuple(backward * found[:-2]), found[-2], found[-1])
    return made, f"{len(data)} points of {kernel} on {gpu}: median error {np.median(error):.1%}"


def long_ratio(gpu, kernel):
    """Backward's rate over forward's on the longest sequence timed in both directions by one kernel."""
    rate = {}
    for r in rows("attention_efficiency"):
        if (r["gpu"], r["kernel"], r["head_dim"], r["causal"]) == (gpu, kernel, "128", "0"):
            rate[r["passes"], int(r["seq_len"])] = float(r["efficiency"])
    return rate["bwd", 16384] / rate["fwd", 16384]


def scaled(kernel, factor):
    """The same kernel with another rate."""
    return replace(
        kernel,
        forward=tuple(factor * x for x in kernel.forward),
        backward=tuple(factor * x for x in kernel.backward),
    )


def blackwell_flash(like):
    """The fused kernels timed on B200 at 32 heads or more; at a width of 64 they lose what they lose on `like`."""
    fraction = {"sdp_fwd": [], "sdp_bwd": []}
    for r in rows("gemm_efficiency"):
        if r["gpu"] != "B200 SXM" or r["op"] not in fraction:
            continue
        size = dict(part.split("=") for part in r["key"].split(", ") if "=" in part)
        if size["qk_head_dim"] == "128" and int(size["head_num"]) >= 32:
            n = int(size["seq_len"])
            fraction[r["op"]].append(float(r["efficiency"]) / 2 * (n / 2 + like.diagonal / 2 + like.rows) / (n / 2))
    forward, backward = (float(np.median(fraction[op])) for op in ("sdp_fwd", "sdp_bwd"))
    narrow = like.forward[0] / like.forward[1]
    made = Flash((64.0, 128.0), (narrow * forward, forward), (narrow * backward, backward), like.rows, like.diagonal)
    return made, f"{sum(map(len, fraction.values()))} fused kernels on B200 SXM (the source counts the masked half)"


def fit_link(system, link):
    """({fraction of the link, seconds a hop}, how well) of all-reduces inside a node."""
    data = [r for r in rows("collectives") if r["system"] == system and float(r["bytes"]) >= 2**15]
    n, size, measured = (np.array([float(r[x]) for r in data]) for x in ("n", "bytes", "time_us"))

    def predicted(x):
        return 2 * (n - 1) / n * size / (link * x[0]) + 2 * (n - 1) * x[1]

    found = search(lambda x: np.abs(np.log(predicted(x) * 1e6 / measured)).mean(), [0.7, 4e-6], [1.5, 1e-3])
    error = np.abs(predicted(found) * 1e6 / measured - 1)
    text = f"{len(data)} all-reduces on {system}: median error {np.median(error):.0%}"
    return {"within": found[0], "latency": found[1]}, text


def intensity(name):
    """W for one TFLOP/s of 16-bit products: what an accelerator may draw for what it promises."""
    a = accelerator(name)
    peak = a.peak.get("bf16", a.peak.get("fp16"))
    return None if a.power is None or peak is None else a.power / (peak / 1e12)


def toml(value):
    """A value as TOML."""
    if isinstance(value, bool | str):
        return json.dumps(value, allow_nan=False)
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{k}" = {toml(x)}' for k, x in value.items()) + " }" if value else "{}"
    if isinstance(value, Flash):
        return toml({name: getattr(value, name) for name in Flash.__slots__})
    if isinstance(value, tuple | list):
        return "[" + ", ".join(toml(x) for x in value) + "]"
    return f"{float(value):.4g}"


def best_products():
    """Of each card the best bf16 product that anybody timed, over its peak."""
    return {r["accelerator"]: float(r["efficiency"].rstrip("%")) / 100 for r in rows("mamf") if r["dtype"] == "bf16"}


class Power:
    """What power allows, and what a card sustains of its best product.

    Of one chip under two power limits, A100 PCIe's and SXM's, H100's and GH200's, the best products are published. What
    a sweep of shapes sustains of the best: nearly all on A100, two thirds on B200, which has half of the power for a
    FLOP. Nobody published a sweep on the others of that kind, Hopper and AMD's: they sustain what B200 does, by their
    power.
    """

    PAIRS = (
        ("NVIDIA A100 PCIe", "a100-80gb-pcie", "NVIDIA A100 SXM", "a100-80gb-sxm"),
        ("NVIDIA H100 SXM", "h100-80gb-sxm", "NVIDIA GH200 SXM", "gh200-144gb"),
    )

    def __init__(self, best, ampere, blackwell):
        self.best = best
        gained = sum(np.log(best[more] / best[less]) for less, _, more, _ in self.PAIRS)
        self.exponent = gained / sum(np.log(intensity(more) / intensity(less)) for _, less, _, more in self.PAIRS)
        self.unlimited = best["NVIDIA A100 SXM"] / best["NVIDIA A100 PCIe"] * largest(ampere)
        self.of_best = largest(blackwell) / best["NVIDIA B200 SXM"]
        self.of_best_ampere = largest(ampere) / best["NVIDIA A100 PCIe"]

    def sustained(self, on, id_):
        """By B200's sweep."""
        return self.best[on] * self.of_best * (intensity(id_) / intensity("b200-180gb-sxm")) ** self.exponent

    def hopper(self, on, id_):
        """Hopper's power for a FLOP lies between A100's and B200's: so does what it sustains, in logarithms."""
        swept = [intensity("b200-180gb-sxm"), intensity("a100-80gb-pcie")]
        part = np.interp(np.log(intensity(id_)), np.log(swept), np.log([self.of_best, self.of_best_ampere]))
        return self.best[on] * float(np.exp(part))


def fit_memory():
    """(kernels that move memory, by the name of what they were timed on; what they were fitted to)."""
    ampere, ampere_text = fit_moving("a100-80gb-sxm")
    hopper, hopper_text = fit_moving("h100-80gb-sxm", ampere["walk"])
    consumer, consumer_text = fit_moving("rtx-3090-24gb", ampere["walk"])
    ampere["slower"] = {x: y for x, y in consumer["slower"].items() if "softmax" in x} | ampere["slower"]
    hopper["slower"] = ampere["slower"] | hopper["slower"]
    # Of B200 only copies are published: it loses of them what H100 does.
    copies = COPIES["blackwell"] * hopper["memory"][0][1] / COPIES["hopper"]
    kernels = {
        "consumer": {**ampere, "memory": consumer["memory"]},
        "ampere": ampere,
        "hopper": hopper,
        "blackwell": {**hopper, "memory": ((1, copies),)},
    }
    return kernels, {"ampere": ampere_text, "hopper": hopper_text, "consumer": consumer_text}


def fit_products(best, gap):
    """(efficiencies of products by architecture, what they were fitted to, what power allows)."""
    ampere, ampere_text = fit_matmul("A100 80GB PCIe", "a100-80gb-pcie", COPIES["ampere"], gap)
    blackwell, blackwell_text = fit_matmul("B200 SXM", "b200-180gb-sxm", COPIES["blackwell"], gap)
    power = Power(best, ampere, blackwell)
    burst, burst_text = fit_matmul("H100 (sm_90)", "h100-80gb-sxm", COPIES["hopper"])
    hopper = reaching(burst, power.hopper("NVIDIA H100 SXM", "h100-80gb-sxm"))
    fits = {"ampere": ampere, "hopper": hopper, "blackwell": blackwell}
    return fits, {"ampere": ampere_text, "hopper": burst_text, "blackwell": blackwell_text}, power


def fit_attention():
    """(kernels of fused attention by architecture, what they were fitted to)."""
    first, first_text = fit_flash("A100 80GB SXM", "FA1", backward_over_forward("A100 80GB PCIe"), by_width=False)
    second, second_text = fit_flash("A100 80GB SXM", "FA2", backward_over_forward("A100 80GB PCIe"))
    hopper_second, hopper_text = fit_flash("H100 SXM", "FA2", backward_over_forward("B200 SXM"))
    third, third_text = fit_forward("H100 SXM", "FA3 fp16", long_ratio("H100 SXM", "FA3 fp16"))
    cudnn, cudnn_text = fit_forward("H100 SXM", "cuDNN", long_ratio("H100 SXM", "cuDNN"))
    # The first generation was timed on A100 alone. It uses nothing that Hopper has new, and waits for no tensor core or
    # memory: A100's FLOP/s, by multiprocessors and clocks.
    a100, h100, b200 = (accelerator(id_) for id_ in ("a100-80gb-sxm", "h100-80gb-sxm", "b200-180gb-sxm"))
    more = 132 * HOPPER_CLOCK / (a100.sm_count * a100.boost_clock)
    hopper_first = scaled(first, more * a100.peak_flops("bf16") / h100.peak_flops("bf16"))
    newest, newest_text = blackwell_flash(hopper_second)
    # The second generation on Blackwell is unmeasured: Hopper's FLOP/s, by multiprocessors and clocks.
    clocks = [x.sm_count * x.boost_clock * x.peak_flops("bf16") ** -1 for x in (h100, b200)]
    kernels = {
        "ampere": {"flash-1": first, "flash-2": second},
        "hopper": {"flash-1": hopper_first, "flash-2": hopper_second, "flash-3": third, "cudnn": cudnn},
        "blackwell": {"cudnn": newest, "flash-2": scaled(hopper_second, clocks[1] / clocks[0])},
    }
    texts = {
        "ampere": f"{first_text}; {second_text}",
        "hopper": hopper_text,
        "newer": f"{third_text}; {cudnn_text}; FA1 by A100's, multiprocessors and clocks",
        "blackwell": newest_text,
    }
    return kernels, texts


def fit_links():
    """(links by architecture, what they were fitted to)."""
    measured = {
        "ampere": ("8x A100 SXM NVLink3 single node", 300e9),
        "volta": ("V100 node (NVLink)", 150e9),
        "blackwell": ("1 node(s) x 8 B200 (P6-B200: NVLink5 + 8x50GB/s EFA)", 900e9),
        "hopper": ("8x H200 NVLink4 single node (NVLS on)", 450e9),
    }
    found = {name: fit_link(*of) for name, of in measured.items()}
    return {name: link for name, (link, _) in found.items()}, {name: text for name, (_, text) in found.items()}


def architectures(best):
    """(what is fitted to each architecture, the kernels that move memory, what power allows).

    Of an architecture: its text, products, the name of its kernels that move memory, its link, its attention.
    """
    kernels, moving = fit_memory()
    products, product, power = fit_products(best, kernels["ampere"]["gap"])
    flash, attention = fit_attention()
    links, link = fit_links()
    ampere, hopper, blackwell = (products[name] for name in ("ampere", "hopper", "blackwell"))
    hopper_rest = (
        f"without in-switch reduction 368 of 450 GB/s; tiles and waves of products by {product['hopper']}, their level "
        "by what A100 and B200 sustain of the best timed, between them by power"
    )
    hopper_text = f"Fitted to {attention['hopper']}; {attention['newer']}; {moving['hopper']}; {link['hopper']}, "
    hopper_text += f"{hopper_rest}."
    older = "A100's efficiencies, unmeasured here, with its first fused attention: the second needs Ampere."
    first, second = flash["ampere"]["flash-1"], flash["ampere"]["flash-2"]
    newest = f"fitted to {product['blackwell']}; {attention['blackwell']}; {link['blackwell']}."
    found = {
        "ampere": (
            f"Fitted to {product['ampere']}; {moving['ampere']}; {attention['ampere']}; {link['ampere']}.",
            ampere, "ampere", links["ampere"], flash["ampere"],
        ),
        "hopper": (
            hopper_text,
            hopper, "hopper", {**links["hopper"], "within": HOPPER_RING}, flash["hopper"],
        ),
        "blackwell": (f"F{newest[1:]}", blackwell, "blackwell", links["blackwell"], flash["blackwell"]),
        "blackwell-ultra": (
            f"B200's, this one is unmeasured: {newest}",
            blackwell, "blackwell", links["blackwell"], flash["blackwell"],
        ),
        "volta": (f"{older} Links fitted to {link['volta']}.", ampere, "ampere", links["volta"], {"flash-1": first}),
        "turing": (older, ampere, "ampere", links["ampere"], {"flash-1": first}),
        "ada": (
            f"A100's efficiencies; {moving['consumer']}.", ampere, "consumer", links["ampere"], flash["ampere"],
        ),
        "blackwell-consumer": (
            f"A100's efficiencies; {moving['consumer']}.", ampere, "consumer", links["ampere"], {"flash-2": second},
        ),
    }  # fmt: skip
    # AMD's fused attention is a port of FA2 to another architecture, as it is on Hopper: what Hopper keeps of its best.
    for name, on, id_ in (("cdna3", "AMD MI300X", "mi300x-192gb"), ("cdna4", "AMD MI355X", "mi355x-288gb")):
        part = best[on] / best["NVIDIA H100 SXM"]
        text = f"Products and attention scaled from H100 to the best product timed on {on}; all else is A100's."
        fit = reaching(ampere, power.sustained(on, id_))
        found[name] = (text, fit, "ampere", links["ampere"], {"flash-2": scaled(flash["hopper"]["flash-2"], part)})
    return found, kernels, power


def write_architectures(found, kernels, power):
    for name, (origin, fit, memory, link, flash) in found.items():
        # What PyTorch picks: cuDNN's comes first on datacentre Blackwell, the second generation elsewhere, and where
        # that does not run, the memory-efficient kernel, for which the first generation stands.
        attention = "cudnn" if name.startswith("blackwell") and "cudnn" in flash else "flash-2"
        attention = attention if attention in flash else "flash-1"
        single = min(reaching(fit, power.unlimited)["matmul"], 1)
        fields = {
            "origin": origin,
            **fit,
            "single": single,
            **kernels[memory],
            **link,
            "attention": attention,
            **COMMON,
        }
        print(f"[architecture.{name}]")
        for field, value in {**fields, "flash": flash}.items():
            print(f"{field} = {toml(value)}")
        print()


def of_a_kind(id_, found, kernels):
    """(the timed card of its architecture that is nearest by power, the level of its products); None without one."""
    a, fit, memory = accelerator(id_), *found[accelerator(id_).architecture][1:3]
    part = shaped(fit, id_, REFERENCE.get(a.architecture, A100))["fixed"]
    kin = {}
    for other in SQUARED.values():
        if accelerator(other).architecture == a.architecture:
            own = shaped(fit, other, REFERENCE.get(a.architecture, A100))
            if own["fixed"] == part:
                kin[other] = largest(squared(own, other, kernels[memory])[0])
    if not kin:
        return None
    near = min(kin, key=lambda other: abs(np.log(intensity(other) / intensity(id_))))
    return near, kin[near]


REFERENCE = {"hopper": "h100-80gb-sxm", "blackwell": "b200-180gb-sxm", "blackwell-ultra": "b200-180gb-sxm"}
A100 = "a100-80gb-pcie"


def write_accelerators(found, kernels, power):
    """Those with another power for a FLOP, clock or multiprocessors than the timed card, or timed themselves."""
    for id_ in accelerators():
        a = accelerator(id_)
        like = REFERENCE.get(a.architecture, A100)
        kin = a.vendor == "nvidia" or id_ in OWN_BEST
        if not kin or a.architecture not in found or intensity(id_) is None or id_ == like:
            continue
        origin, fit, memory, *_ = found[a.architecture]
        fraction = min(largest(fit) * (intensity(id_) / intensity(like)) ** power.exponent, power.unlimited)
        if a.architecture == "hopper":
            fraction = power.hopper("NVIDIA GH200 SXM" if id_ == "gh200-144gb" else "NVIDIA H100 SXM", id_)
        elif shaped(fit, id_, like)["fixed"] != 1 and (kin := of_a_kind(id_, found, kernels)) is not None:
            like, level = kin
            fraction = level * (intensity(id_) / intensity(like)) ** power.exponent
        best = OWN_BEST.get(id_)
        if best is not None:
            fraction = power.sustained(best, id_)
        said = f"products at {fraction:.0%} of the peak for its {intensity(id_):.2g} W a TFLOP/s, "
        said += f"where {accelerator(like).name} has {intensity(like):.2g}"
        if best is not None:
            said = f"products at {fraction:.0%} of the peak by its own best, {power.best[best]:.0%}"
        whose = REFERENCE.get(a.architecture, A100)
        own = reaching(fit if best is not None else shaped(fit, id_, whose), fraction)
        clock = 1.0
        if id_ in GEFORCE:
            single, half = GEFORCE[id_]
            clock = 1e12 * single / a.peak_flops("fp32")
            own = at_level(own, lambda e: half / squares(e, id_, kernels[memory])[SQUARES.index(8192)])  # noqa: B023
            said = "its own clock and products of 8192 timed for two minutes"
        if id_ in SQUARED.values():
            own, said = squared(own, id_, kernels[memory])
            said = f"products by {said}"
        # What is more than the whole peak is the clock's.
        clock = max(clock, own["matmul"])
        own["matmul"] /= clock
        print(f"[accelerator.{id_}]")
        print(f"matmul = {toml(own['matmul'])}")
        if own.get("fixed", 1) != 1:
            print(f"fixed = {toml(own['fixed'])}")
        if clock != 1:
            said += f", at {clock:.2f} of the datasheet's clock"
            print(f"clock = {toml(clock)}")
        if id_ in MOVED:
            said += f"; a fused norm timed on it moves {MOVED[id_]:.0%} of the bandwidth"
            print(f"memory = {toml([[1, MOVED[id_]]])}")
        print(f"origin = {toml(f'{origin[:-1]}; {said}.')}\n")


def main():
    found, kernels, power = architectures(best_products())
    print(HEADER)
    write_architectures(found, kernels, power)
    write_accelerators(found, kernels, power)


if __name__ == "__main__":
    main()
