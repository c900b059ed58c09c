"""The search over layouts against a loop over `estimate`, one layout at a time."""

import itertools
from dataclasses import replace

import pytest

import estimator as est
from estimator.answers.layouts import KINDS, MEGATRON, search
from estimator.describe.checks import ConfigError
from estimator.hardware.accelerators import accelerator
from estimator.show.layouts import said

MODEL = est.preset("gpt2").replace(num_layers=8)
PLAN = est.Plan(precision="bf16-mixed", attention="sdpa", seq_len=512, loss="torch-fp32")
CARD = replace(accelerator("a100-80gb-sxm"), id="small", memory_bytes=int(3.7 * 2**30), per_node=4)
SEQUENCES, COUNT = 24, 8
FIELDS = (
    "data_parallel",
    "tensor_parallel",
    "pipeline_parallel",
    "context_parallel",
    "sharding",
    "shard_group",
    "batch_size",
    "grad_accumulation",
    "checkpointing",
)


@pytest.fixture(scope="module")
def found():
    return search(MODEL, PLAN, CARD, count=COUNT, global_batch_size=SEQUENCES)


def estimated(**changes):
    """The estimate of one layout, or None where it cannot be."""
    several = changes["data_parallel"] * changes.get("context_parallel", 1) > 1
    sharded = changes["sharding"] in ("zero2", "zero3") and several
    try:
        p = PLAN.replace(precision="bf16-fsdp" if sharded else "bf16-mixed", **changes)
        return est.estimate(MODEL, p, CARD, global_batch_size=SEQUENCES)
    except ConfigError:
        return None


def beside(ranks, *, vocabulary):
    """What is best with shared matrices; tied embeddings and pipelines do not share the vocabulary."""
    return {"sequence_parallel": ranks > 1, "vocabulary_parallel": ranks > 1 and vocabulary}


def brute(count):
    """Every layout of so many accelerators that fits, by its fields."""
    groups = [(s, g) for s in ("zero2", "zero3") for g in (None, *range(2, count)) if g is None or count % g == 0]
    ways = [(1, 1, "none", None), (1, 1, "zero1", None), *((1, 1, *group) for group in groups)]
    shares = [n for n in range(2, CARD.per_node + 1) if count % n == 0]
    ways += [(n, 1, s, None) for n in shares for s in ("zero2", "zero3")]
    ways += [(1, n, s, None) for n in shares for s in ("zero2", "zero3")]
    for (ranks, context, sharding, group), kind in itertools.product(ways, KINDS):
        replicas = count // (ranks * context)
        for batch in range(1, SEQUENCES // replicas + 1):
            r = estimated(
                data_parallel=replicas, tensor_parallel=ranks, context_parallel=context, sharding=sharding,
                shard_group=group, checkpointing=kind, batch_size=batch, **beside(ranks, vocabulary=False),
            )  # fmt: skip
            if r is not None and r.fits:
                yield key(r), r


def key(o):
    p = o.plan
    return (
        (p.tensor_parallel, p.context_parallel),
        p.sharding,
        p.shards,
        p.batch_size,
        p.grad_accumulation,
        p.checkpointing,
    )


def test_it_finds_what_a_loop_over_all_layouts_finds(found):
    expected = dict(brute(COUNT))
    listed = {key(o): o for o in found.options}
    assert 20 < len(listed) <= len(expected)
    turns = {}  # of micro-batches that take as many turns the smallest is as good as any
    for ranks, sharding, shards, batch, steps, kind in expected:
        turns.setdefault((ranks, sharding, shards, steps, kind), []).append(batch)
    assert set(listed) == {(*k[:3], min(found), *k[3:]) for k, found in turns.items()}
    assert {k[0] for k in listed} == {(1, 1), (2, 1), (4, 1), (1, 2), (1, 4)}
    assert sum(found.refused.values()) > 0
    best = min(expected.values(), key=lambda r: r.time.seconds_per_step)
    assert found.options[0].seconds == pytest.approx(best.time.seconds_per_step)
    for k, o in listed.items():
        r = expected[k]
        assert o.needed == r.memory.needed
        assert o.seconds == pytest.approx(r.time.seconds_per_step)
        assert o.mfu == pytest.approx(r.time.mfu)
        assert o.tokens_per_second == pytest.approx(r.time.tokens_per_second_per_accelerator)


def test_interleaved_stages_are_searched_with_the_micro_batches_that_they_take():
    model = MODEL.replace(num_layers=4, tie_embeddings=False)
    plan = PLAN.replace(precision="bf16", seq_len=16, pipeline_parallel=2, virtual_stages=2, grad_accumulation=2)
    fixed = ("checkpointing", "pipeline_parallel", "tensor_parallel")
    found = search(model, plan, CARD, count=2, global_batch_size=10, fixed=fixed).options
    assert {o.plan.grad_accumulation for o in found} == {2, 3, 4, 10}  # not 5, of which two stages make two groups
    for o in found:
        r = est.estimate(model, o.plan, CARD)
        assert (o.needed, o.seconds) == (r.memory.needed, pytest.approx(r.time.seconds_per_step))


def test_pipelines_are_searched_too_and_each_row_estimated_alone_is_the_same():
    model = MODEL.replace(num_layers=4, tie_embeddings=False)
    plan = PLAN.replace(precision="bf16", seq_len=128)
    card = replace(CARD, memory_bytes=int(3.4 * 2**30), per_node=2)
    found = search(model, plan, card, count=4, global_batch_size=12, fixed=("checkpointing",)).options
    expected = {}
    for ranks, stages, context in [*itertools.product((1, 2), (1, 2, 4), (1,)), (1, 1, 2)]:
        replicas = 4 // (ranks * stages * context)
        shardings = ("none", "zero1", "zero2", "zero3")[2 * (context > 1) :] if stages == 1 else ("none",)
        batches = [n for n in range(1, 13) if replicas and 12 // replicas % n == 0]
        for sharding, batch in itertools.product(shardings, batches):
            try:
                p = plan.replace(
                    tensor_parallel=ranks, pipeline_parallel=stages, data_parallel=replicas, batch_size=batch,
                    sharding=sharding, context_parallel=context, **beside(ranks, vocabulary=stages == 1),
                )  # fmt: skip
                r = est.estimate(model, p, card, global_batch_size=12)
            except ConfigError:
                continue
            if r.fits:
                expected[stages, *key(r)] = r
    listed = {(o.plan.pipeline_parallel, *key(o)): o for o in found}
    assert {stages for stages, *_ in listed} == {1, 2, 4}
    assert {ranks for stages, ranks, *_ in listed if stages == 2} == {(1, 1), (2, 1)}
    best = min(expected.values(), key=lambda r: r.time.seconds_per_step)
    assert found[0].seconds == pytest.approx(best.time.seconds_per_step)
    for at, r in expected.items():
        if at[0] > 1:
            assert listed[at].needed == r.memory.needed
            assert listed[at].seconds == pytest.approx(r.time.seconds_per_step)
            assert listed[at].parts == pytest.approx(dict(r.time.parts))
    assert {at for at in listed if at[0] > 1} == {at for at in expected if at[0] > 1}


def test_experts_are_shared_out_and_each_row_estimated_alone_is_the_same():
    model = est.preset("mixtral-8x7b").replace(num_layers=2, d_model=512, d_expert=256, vocab_size=1024)
    plan = PLAN.replace(precision="bf16", seq_len=128)
    found = search(model, plan, CARD, count=4, global_batch_size=8, fixed=("checkpointing",)).options
    shared = [o for o in found if o.plan.expert_parallel > 1]
    assert {o.plan.sharding for o in shared} == {"none", "zero2", "zero3"}
    assert {o.plan.expert_parallel for o in shared} == {4}
    for o in shared:
        r = est.estimate(model, o.plan, CARD, global_batch_size=8)
        assert (r.memory.needed, r.plan) == (o.needed, o.plan)
        assert r.time.seconds_per_step == pytest.approx(o.seconds)
        assert r.time.mfu == pytest.approx(o.mfu)


def test_megatrons_layouts_have_all_axes_together_and_are_those_of_an_estimate():
    model = MODEL.replace(num_layers=4, tie_embeddings=False, vocab_size=1024)
    card = replace(CARD, per_node=2)
    plan = MEGATRON.replace(seq_len=128)
    found = search(model, plan, card, count=8, global_batch_size=16, fixed=("checkpointing",)).options
    assert {(o.plan.tensor_parallel, o.plan.pipeline_parallel, o.plan.data_parallel) for o in found} >= {
        (2, 2, 2), (2, 4, 1), (1, 2, 4), (1, 1, 8), (2, 1, 4),
    }  # fmt: skip
    assert all(o.plan.sequence_parallel == (o.plan.tensor_parallel > 1) for o in found)
    assert all(o.headroom >= 0 for o in found)
    for o in found[:: len(found) // 6]:
        r = est.estimate(model, o.plan, card, global_batch_size=16)
        assert (r.memory.needed, r.plan) == (o.needed, o.plan)
        assert r.time.seconds_per_step == pytest.approx(o.seconds)


def test_those_on_the_front_are_not_bettered(found):
    for o in found.options:
        better = [x for x in found.options if x.seconds < o.seconds and x.headroom >= o.headroom]
        assert o.best == (not better)


def test_the_smallest_number_is_the_first_on_which_anything_fits():
    card = replace(CARD, memory_bytes=int(2.3 * 2**30))
    smallest = search(MODEL, PLAN, card, count=8, global_batch_size=SEQUENCES).smallest

    def fits(count):
        shardings = ("none", "zero1", "zero2", "zero3") if count > 1 else ("none",)
        for sharding, kind in itertools.product(shardings, KINDS):
            r = estimated(data_parallel=count, sharding=sharding, checkpointing=kind)
            if r is not None and r.memory.needed <= card.memory_bytes:
                return True
        return False

    assert smallest is not None
    assert smallest > 1
    assert [fits(n) for n in (1, 2, 3, 4, 8)] == [n >= smallest for n in (1, 2, 3, 4, 8)]


def test_a_field_that_is_fixed_stays_and_the_frame_has_the_plans_fields():
    p = PLAN.replace(checkpointing="block", batch_size=3)
    frame = est.layouts(MODEL, p, CARD, count=COUNT, global_batch_size=SEQUENCES, fixed=("checkpointing", "batch_size"))
    assert set(frame["checkpointing"]) == {"block"}
    assert set(frame["batch_size"]) == {3}
    assert list(frame["seconds_per_step"]) == sorted(frame["seconds_per_step"])
    row = frame.iloc[0]
    again = estimated(**{name: row[name] if isinstance(row[name], str) else int(row[name]) for name in FIELDS
                         if name != "shard_group" or row["sharding"] in ("zero2", "zero3")})  # fmt: skip
    assert again.memory.needed == row["needed"]
    assert frame.attrs["network"].startswith("between nodes 12.5 GB/s")


def test_a_network_of_ones_own_is_said_and_makes_a_difference(found):
    slow = search(MODEL, PLAN, CARD, count=COUNT, global_batch_size=SEQUENCES, network=1e9)
    assert "1 GB/s" in slow.network
    assert slow.options[0].seconds > found.options[0].seconds


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"count": 0}, "count"),
        ({"global_batch_size": 1}, "global_batch_size"),
        ({"fixed": ("d_model",)}, "fixed"),
        ({"network": "ethernet"}, "network"),
    ],
)
def test_what_cannot_be_asked(changes, field):
    with pytest.raises(ConfigError, match=field):
        search(MODEL, PLAN, CARD, **({"count": 8, "global_batch_size": 24} | changes))


def test_where_nothing_fits_it_says_so():
    card = replace(CARD, memory_bytes=2**30)
    nothing = search(MODEL, PLAN, card, count=2, global_batch_size=4)
    assert nothing.options == ()
    assert nothing.smallest is None
    assert said(nothing, 2, "small").startswith("No layout fits on 2 x small")
