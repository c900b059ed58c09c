"""The course's question on GPT-2 XL, worked: what the notes say, what is right by convention, what PyTorch does.

`estimate course` prints it and the page shows it. Every figure in a line is the library's; bytes are in GB of 10^9, as
in the question, with two decimals.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from estimator.answers.estimates import Estimate, estimate, max_batch_size
from estimator.describe.plan import Plan
from estimator.describe.units import SECONDS_PER_DAY, SECONDS_PER_HOUR, SECONDS_PER_YEAR
from estimator.show.commands import Parser
from estimator.studies.assignment import BYTES, COPIES, seed_notes, textbook

if TYPE_CHECKING:
    from collections.abc import Sequence

MODEL, GPU = "gpt2-xl", "a100-80gb-sxm"
CAPACITY = 80e9  # bytes: the question's
STEPS, SEQUENCES = 400_000, 1024
MFU, PEAK = 0.5, 19.5e12  # of an A100 in fp32, FLOP/s
COLUMNS = ("what the notes say", "right by convention", "what PyTorch does")


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the question, answered three ways, each in lines that lead from one to the next.

    Attributes:
        key: what a link calls it.
        question: what is asked.
        notes, convention, pytorch: the lines of `COLUMNS`.
    """

    key: str
    question: str
    notes: tuple[str, ...]
    convention: tuple[str, ...]
    pytorch: tuple[str, ...]


def gb(nbytes: float) -> str:
    """Bytes in GB of 10^9 with two decimals: "24.88"."""
    return f"{nbytes / 1e9:,.2f}"


@cache
def parts() -> tuple[Part, ...]:
    """The parts of the question, in order."""
    return (_memory(), _batch(), _flops(), _hours())


def _at(batch: int) -> Estimate:
    return estimate(MODEL, Plan(batch_size=batch), GPU)


def _notes(*questions: str) -> tuple[str, ...]:
    """What the notes answer, each with what went wrong in it."""
    found = {note.question: note for note in seed_notes()}
    return tuple(line for q in questions for line in (f"{q}: {found[q].said}", f"Wrong: {found[q].wrong}"))


def _memory() -> Part:
    # At a batch of 1 the optimizer's moment is the greatest; from 2 on it is where activations are most.
    t, r, three = textbook(MODEL), _at(2), _at(3)
    each = three.memory.peak - r.memory.peak
    held = r.memory.peak - 2 * each
    return Part(
        "memory",
        "How much memory does a step with AdamW in fp32 take, as a function of the batch?",
        _notes("Parameters, gradients and optimizer state", "Activations of a sequence"),
        (
            (
                f"{COPIES * BYTES} x {t.parameters:,} = {gb(t.static_bytes)} GB: {BYTES} bytes each of parameters, "
                "gradients and two moments"
            ),
            f"4 (L (16 T d + 2 h T^2) + T d + 2 T V) = {gb(t.activation_bytes)} GB of activations a sequence",
            f"memory = {gb(t.static_bytes)} GB + {gb(t.activation_bytes)} GB x batch",
        ),
        (
            f"{r.values.parameters:,} parameters: biases and positions are counted, and the head is the embedding",
            (
                f"{gb(each)} GB more for each sequence at the peak, in the {r.memory.where.phase} pass: what autograd "
                "saves, each tensor once, and what is alive beside it"
            ),
            (
                f"live tensors at the peak = {gb(held)} GB + {gb(each)} GB x batch from 2 on: nearly no gradient "
                "is there yet when activations are most"
            ),
        ),
    )


def _batch() -> Part:
    t = textbook(MODEL)
    room = (CAPACITY - t.static_bytes) / t.activation_bytes
    largest = max_batch_size(MODEL, Plan(), GPU)
    adding = max_batch_size(MODEL, Plan(), GPU, global_batch_size=SEQUENCES)
    fits, over = _at(largest), _at(largest + 1)
    capacity = fits.memory.capacity or 0
    return Part(
        "batch",
        "What is the largest batch that fits in 80 GB?",
        _notes("Largest batch in 80 GB"),
        (
            f"(80 - {gb(t.static_bytes)}) / {gb(t.activation_bytes)} = {room:.2f}",
            "rounded down, for a part of a sequence is none",
            f"the largest batch is {t.max_batch_size(CAPACITY)}",
        ),
        (
            (
                f"an A100 of 80 GB shows a framework {gb(capacity)} GB; {largest} sequences need "
                f"{gb(fits.memory.needed)} GB, {largest + 1} need {gb(over.memory.needed)} GB"
            ),
            f"the largest batch is {largest}",
            (
                f"in a step of {SEQUENCES:,} sequences gradients are added up and stay through forward: then it is "
                f"{adding}"
            ),
        ),
    )


def _flops() -> Part:
    t, r = textbook(MODEL), _at(1)
    return Part(
        "flops",
        "How many FLOPs does a step take?",
        _notes("Forward, a sequence", "AdamW"),
        (
            f"forward, a sequence: {t.forward_flops:,} FLOPs of matrix products",
            f"backward takes twice that: {t.backward_flops:,}",
            f"AdamW, a step: {t.optimizer_flops:,}, {t.optimizer_flops // t.parameters} a parameter",
        ),
        (
            f"forward, a sequence: {r.flops.forward:,} FLOPs, as FlopCounterMode counts them",
            f"backward: {r.flops.backward:,}, {r.flops.backward / r.flops.forward:.3f} times that",
            f"AdamW, a step: {r.flops.optimizer:,}",
        ),
    )


def _hours() -> Part:
    t = textbook(MODEL)
    seconds = SECONDS_PER_DAY * t.days(STEPS, SEQUENCES, MFU, PEAK)
    given = estimate(MODEL, Plan(), GPU, mfu=MFU, steps=STEPS, global_batch_size=SEQUENCES)
    found = estimate(MODEL, Plan(), GPU, steps=STEPS, global_batch_size=SEQUENCES)
    assert given.time is not None
    assert found.time is not None
    return Part(
        "hours",
        f"How long do {STEPS:,} steps of {SEQUENCES:,} sequences take on one A100 at {MFU:.0%} of 19.5 TFLOP/s?",
        _notes("Training on one A100"),
        (
            (
                f"{SEQUENCES:,} x 3 x {t.forward_flops:,} + {t.optimizer_flops:,} = {t.step_flops(SEQUENCES):,} FLOPs "
                "a step"
            ),
            f"{STEPS:,} x {t.step_flops(SEQUENCES):,} / ({MFU} x 19.5e12) = {seconds:,.0f} s",
            f"= {seconds / SECONDS_PER_HOUR:,.0f} hours = {seconds / SECONDS_PER_YEAR:.1f} years",
        ),
        (
            f"at the same {MFU:.0%}: {given.time.hours:,.0f} hours",
            f"predicted from the step's kernels: {found.time.mfu:.0%}, {found.time.hours:,.0f} hours",
            (
                "nobody trains so: bf16 and fused attention on 8 A100 take "
                f"{_usual() / SECONDS_PER_HOUR:,.0f} hours for the same tokens"
            ),
        ),
    )


def _usual() -> float:
    plan = Plan(batch_size=8, precision="bf16-mixed", attention="sdpa", loss="torch", optimizer_impl="fused")
    r = estimate(MODEL, plan, GPU, count=8, steps=STEPS, global_batch_size=SEQUENCES)
    assert r.fits
    assert r.time is not None
    return r.time.seconds


def run(argv: Sequence[str]) -> int:
    """`estimate course [PART]`."""
    parser = Parser(
        prog="estimate course",
        description="The course's question on GPT-2 XL, worked: the notes, the convention, and what PyTorch does.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "part", nargs="?", choices=("memory", "batch", "flops", "hours"), help="only this (default: all)"
    )
    wanted = parser.parse_args(argv).part
    for part in parts():
        if wanted in (None, part.key):
            sys.stdout.write(f"{part.question}\n")
            for title, lines in zip(COLUMNS, (part.notes, part.convention, part.pytorch), strict=True):
                sys.stdout.write(f"  {title}\n" + "".join(f"    {line}\n" for line in lines))
    return 0
