"""Pipelines: each stage's bytes against real processes under torch.distributed.pipelining, and its schedule in time."""

from __future__ import annotations

import os
from random import Random

import numpy as np
import pytest
from test_sharding import accounted, losses_alone, measured, totals
from torch.distributed.pipelining import ScheduleInterleaved1F1B

import estimator as est
from estimator.accounting.accounts import account
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan
from estimator.describe.schedules import (
    all_forward_first,
    in_flight,
    interleaved,
    one_forward_one_backward,
    rounds,
    written,
)
from estimator.timing.pipeline import StageTime, finished, simulated
from trainer.referee.measure import build_step

RUNS = int(os.environ.get("PIPELINE_RUNS", "0"))  # random recipes to try, in place of a few
THREE = {"grad_accumulation": 3}


def model(family, layers):
    return ModelConfig(family, layers, 24, 4, 37, 9, 2 if family == "llama" else None, 6, 32, tie_embeddings=False)


def drawn(random, stages):
    """A model and how so many stages run it."""
    m = model(random.choice(["gpt2", "llama"]), stages * random.randint(1, 4))
    schedule = random.choice(["1f1b", "gpipe"])
    return m.replace(vocab_size=random.randint(5, 60)), Plan(
        batch_size=random.randint(1, 3),
        seq_len=random.choice([1, 5, 9]),
        pipeline_parallel=stages,
        pipeline_schedule=schedule,
        grad_accumulation=random.randint(stages if schedule == "1f1b" else 2, 11),
        precision=random.choice(["fp32", "fp32", "bf16", "bf16-mixed"]),
        attention=random.choice(["naive", "naive-fp32", "sdpa"]),
        checkpointing=random.choice(["none", "none", "block", "attention", "selective"]),
        loss=random.choice(["bundled", "torch", "torch-fp32"]),
        optimizer=random.choice(["sgd", "sgd", "adamw", "lion"]),
        dropout=random.choice([0.0, 0.0, 0.1]),
        max_grad_norm=random.choice([None, 1.0]),
    )


@pytest.mark.parametrize("stages", [2, 4])
def test_each_stage_holds_what_the_account_says_to_the_byte(stages, tmp_path):
    random = Random(stages)
    plan = {"batch_size": 2, "pipeline_parallel": stages, "optimizer": "sgd"}
    cases = [  # the first with more micro-batches than are executed
        (model("llama", 2 * stages), Plan(grad_accumulation=8, max_grad_norm=1.0, precision="bf16-mixed", **plan)),
        (model("gpt2", stages), Plan(grad_accumulation=7, pipeline_schedule="gpipe", checkpointing="block", **plan)),
    ]
    cases.append(  # of six groups of micro-batches four are executed
        (model("llama", 2 * stages), Plan(grad_accumulation=6 * stages, virtual_stages=2, precision="bf16", **plan))
    )
    cases += [drawn(random, stages) for _ in range(RUNS or 2)]
    for (m, p), processes in zip(cases, measured(stages, cases, tmp_path), strict=True):
        for stage, real in enumerate(processes):
            v = account(m, p, "cpu", stage).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, stage)


def test_stages_of_shared_matrices_and_of_replicas_are_exact_too(tmp_path):
    """Four processes: two stages of two that share each block's matrices, or of two replicas under DDP."""
    random = Random(5)
    cases = [
        (
            model("llama", 4),
            Plan(batch_size=2, grad_accumulation=5, pipeline_parallel=2, optimizer="sgd", max_grad_norm=1.0, **axis),
        )
        for axis in (
            {"tensor_parallel": 2},
            {"tensor_parallel": 2, "sequence_parallel": True, "seq_len": 8},
            {"data_parallel": 2},
        )
    ]
    for _ in range(RUNS or 2):
        m, p = drawn(random, 2)
        axis = random.choice(["tensor_parallel", "data_parallel"])
        if axis == "data_parallel":  # DDP fails where all forwards come first
            p = p.replace(pipeline_schedule="1f1b", grad_accumulation=max(p.grad_accumulation, 3))
        cases.append((m, p.replace(**{axis: 2})))
    for (m, p), processes in zip(cases, measured(4, cases, tmp_path), strict=True):
        for rank, real in enumerate(processes):
            v = account(m, p, "cpu", rank // 2).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


@pytest.mark.parametrize(("stages", "parts"), [(2, 2), (4, 2), (4, 3), (8, 4)])
def test_interleaved_moves_are_those_of_pytorchs_schedule(stages, parts):
    for count in range(stages, 4 * stages):
        groups = rounds(count, stages)
        if count % groups:
            continue
        torchs = object.__new__(ScheduleInterleaved1F1B)  # whose processes are not needed to ask for its order
        torchs.pp_group_size, torchs.n_local_stages, torchs._n_microbatches = stages, parts, count
        torchs.microbatches_per_round = count // groups
        for stage in range(stages):
            theirs = [
                ("F" if a.computation_type.name == "FORWARD" else "B", a.microbatch_index, a.stage_index // stages)
                for a in torchs._calculate_single_rank_operations(stage)
                if a is not None
            ]
            assert list(interleaved(count, stage, stages, parts, count // groups)) == theirs


@pytest.mark.skipif(not RUNS, reason="eight processes: PIPELINE_RUNS=1 runs it")
def test_three_axes_at_once_are_exact_too(tmp_path):
    """Two stages of two groups that share parameters, in each of which two share the matrices."""
    plan = {"batch_size": 2, "pipeline_parallel": 2, "data_parallel": 2, "tensor_parallel": 2, "sharding": "zero2"}
    cases = [
        (model("llama", 2), Plan(grad_accumulation=3, precision="bf16-fsdp", max_grad_norm=1.0, **plan)),
        (model("gpt2", 4), Plan(grad_accumulation=2, optimizer="sgd", **plan)),
    ]
    for (m, p), processes in zip(cases, measured(8, cases, tmp_path), strict=True):
        for rank, real in enumerate(processes):
            v = account(m, p, "cpu", rank // 4 + 2 * (rank // 2 % 2)).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


@pytest.mark.parametrize("stages", [2] if not RUNS else [2, 3])
def test_stages_that_are_sharded_are_exact_too(stages, tmp_path):
    """Two share the parameters of each stage by `fully_shard`; these are whole from the first forward to the end."""
    random = Random(6)
    plan = {"batch_size": 2, "pipeline_parallel": stages, "data_parallel": 2, "sharding": "zero2", "optimizer": "sgd"}
    cases = [
        (model("llama", 2 * stages), Plan(grad_accumulation=6, max_grad_norm=1.0, **plan)),
        (model("gpt2", stages), Plan(grad_accumulation=3, precision="bf16-fsdp", pipeline_schedule="gpipe", **plan)),
    ]
    for _ in range(RUNS or 1):
        m, p = drawn(random, stages)
        mixed = {"precision": random.choice(["bf16-fsdp", p.precision]), "reduce_dtype": "fp32"}
        if mixed["precision"] == "bf16-fsdp":
            mixed["reduce_dtype"] = random.choice(["fp32", "bf16"])
        cases.append((m, p.replace(data_parallel=2, sharding="zero2", **mixed)))
    for (m, p), processes in zip(cases, measured(2 * stages, cases, tmp_path), strict=True):
        for rank, real in enumerate(processes):  # two by two they share a stage
            v = account(m, p, "cpu", rank // 2 + stages * (rank % 2)).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


def test_each_stage_sends_the_messages_of_the_ledger(tmp_path):
    """By kind, count and bytes: to the other stages, and to those that share the matrices or replicate the stage."""
    plan = {"batch_size": 2, "pipeline_parallel": 2, "optimizer": "sgd"}
    sequence = {"tensor_parallel": 2, "sequence_parallel": True, "seq_len": 8}
    cases = {
        2: [Plan(grad_accumulation=8, max_grad_norm=1.0, **plan), Plan(pipeline_schedule="gpipe", **THREE, **plan)],
        4: [Plan(**THREE, **sequence, **plan), Plan(data_parallel=2, **THREE, **plan)] if RUNS else [],
    }
    for size, plans in cases.items():
        those = [(model("llama", 4), p) for p in plans]
        for (m, p), processes in zip(those, measured(size, those, tmp_path, "messages") if those else [], strict=True):
            for rank, real in enumerate(processes):
                assert accounted(m, p, 2 * rank // size) == totals(real), (m, p, rank)


def test_losses_are_those_of_one_process(tmp_path):
    """The mean over the micro-batches; equal to 1e-5, since a sum is in another order."""
    plan = {"batch_size": 2, "grad_accumulation": 2, "pipeline_parallel": 2}
    clips = {"optimizer": "sgd", "max_grad_norm": 0.1}  # to less than half of the norm
    cases = [
        (model("llama", 4), Plan(pipeline_schedule="1f1b", **clips, **plan)),
        (model("llama", 4), Plan(pipeline_schedule="gpipe", **plan)),
    ]
    for (m, p), (_, losses) in zip(cases, measured(2, cases, tmp_path, "losses"), strict=True):
        alone = losses_alone(build_step(m, Plan(batch_size=4, optimizer=p.optimizer)), p.max_grad_norm)
        assert losses == pytest.approx(alone, rel=1e-5)


def test_the_schedule_of_a_stage():
    """Narayanan et al. 2021, figure 4, of four stages and eight micro-batches; PyTorch's first stage runs 4 ahead."""
    assert written(one_forward_one_backward(4, 0, 2)) == "F0 F1 B0 F2 B1 F3 B2 B3"
    assert written(one_forward_one_backward(3, 1, 2)) == "F0 B0 F1 B1 F2 B2"
    assert [in_flight(one_forward_one_backward(8, stage, 4)) for stage in range(4)] == [4, 3, 2, 1]


@pytest.mark.parametrize("kind", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 2), (4, 4), (4, 16), (8, 32)])
def test_equal_stages_idle_as_the_paper_says(kind, stages, micro_batches):
    """(p - 1) / m of the work, Narayanan et al. 2021, equation in section 2.2.1, for GPipe and 1F1B alike."""
    each = [StageTime(1.0, 2.0, 0.0, 0.0)] * stages
    of = {"gpipe": lambda _: all_forward_first(micro_batches)}
    moves = [of.get(kind, lambda s: one_forward_one_backward(micro_batches, s, stages))(s) for s in range(stages)]
    work = 3.0 * micro_batches
    assert max(bar.end for bar in simulated(moves, each)) == pytest.approx(work * (1 + (stages - 1) / micro_batches))


def test_the_ends_of_many_steps_at_once_are_those_of_each_schedule():
    random = np.random.default_rng(0)
    for stages in (2, 3, 8):
        counts = np.array([stages, stages + 1, 3 * stages + 1])
        times = StageTime(*(random.random((stages, len(counts))) for _ in range(5)))
        ends = finished("1f1b", counts, times)
        for point, count in enumerate(counts.tolist()):
            each = [StageTime(*(float(x[stage, point]) for x in times)) for stage in range(stages)]
            bars = simulated([one_forward_one_backward(count, stage, stages) for stage in range(stages)], each)
            assert ends[:, point] == pytest.approx([bar.end for bar in bars[-stages:]])


def test_an_estimate_has_the_memory_of_each_stage():
    plan = Plan(precision="bf16", attention="sdpa", seq_len=4096, pipeline_parallel=4)
    r = est.estimate("llama-3.1-8b", plan, "h100-80gb-sxm", count=4, global_batch_size=16)
    assert len(r.stages) == 4
    assert r.memory.needed == max(stage.needed for stage in r.stages)
    middle = [stage.activations for stage in r.stages[:3]]
    assert middle == sorted(middle, reverse=True)  # a stage has as many micro-batches in flight as come after it
    alone = est.estimate("llama-3.1-8b", plan.replace(pipeline_parallel=1), "h100-80gb-sxm", global_batch_size=16)
    assert r.flops.model == alone.flops.model
    assert alone.time.seconds_per_step / 4 < r.time.seconds_per_step < alone.time.seconds_per_step / 2
    more = est.estimate("llama-3.1-8b", plan, "h100-80gb-sxm", count=4, global_batch_size=64)
    assert more.time.mfu > r.time.mfu  # the pipeline is filled and emptied once in either
    assert sum(r.time.parts.values()) == pytest.approx(r.time.seconds_per_step)


@pytest.mark.parametrize(
    ("name", "plan", "field"),
    [
        ("llama-3.1-8b", {"pipeline_parallel": 3, "grad_accumulation": 4}, "num_layers"),
        ("llama-3.1-8b", {"pipeline_parallel": 4}, "grad_accumulation"),
        ("gpt2", {"pipeline_parallel": 2, "grad_accumulation": 4}, "tie_embeddings"),
        (
            "llama-3.1-8b",
            {"pipeline_parallel": 2, "grad_accumulation": 2, "data_parallel": 2, "sharding": "zero3"},
            "pipeline_parallel",
        ),
        ("llama-3.1-8b", {"pipeline_parallel": 2, "grad_accumulation": 2, "precision": "fp16-mixed"}, "precision"),
        ("llama-3.1-8b", {"pipeline_schedule": "gpipe"}, "pipeline_parallel"),
        ("llama-3.1-8b", {"pipeline_parallel": 2, "grad_accumulation": 5, "virtual_stages": 2}, "grad_accumulation"),
        ("llama-3.1-8b", {"pipeline_parallel": 4, "grad_accumulation": 4, "virtual_stages": 3}, "num_layers"),
    ],
)
def test_what_is_not_known_is_refused(name, plan, field):
    with pytest.raises(ConfigError, match=field):
        est.estimate(name, Plan(seq_len=64, **plan))
