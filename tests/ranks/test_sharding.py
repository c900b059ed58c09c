"""Several accelerators: what real processes hold, to the byte, and what must hold for any number of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import estimator as est
import trainer
from estimator.accounting.accounts import account, sizes_for
from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import FULLY_SHARDED, Plan
from estimator.describe.settings import choices
from estimator.eager.letters import ONE, evaluate, letter
from estimator.eager.repetition import layout
from estimator.eager.sizes import ShapeClass
from estimator.eager.tensor import Machine
from estimator.memory.device import rounded_peak, timeline
from estimator.models.layers import Module
from estimator.parallel.data import Sharing
from estimator.parallel.sharded import FullySharded
from estimator.timing import communication

sys.path.append(str(Path(__file__).parents[1] / "exact"))

SHARDINGS = choices(Plan)["sharding"]
RUNS = int(os.environ.get("RANKS_DRAWS", "0"))  # random recipes for each number of processes
SEED = int(os.environ.get("RANKS_SEED", "0"))  # added to the seeds, for other draws
OFFLOADED = float(os.environ.get("RANKS_OFFLOADED", "0.2"))  # how many of them are offloaded
quick = settings(derandomize=True, deadline=None, max_examples=12)

GPT2 = ModelConfig("gpt2", 4, 24, 3, 31, 16)  # a vocabulary that nothing divides
LLAMA = ModelConfig("llama", 3, 20, 4, 33, 14, 2, 6, 27)
TIED = ModelConfig("llama", 2, 16, 4, 32, 14, 2, 4, 32, tie_embeddings=True)
WORDS = LLAMA.replace(vocab_size=200)  # the peak is in the loss
ONE_BLOCK = GPT2.replace(num_layers=1)
REAL = [
    (GPT2, {"sharding": "none", "attention": "sdpa"}),
    (LLAMA, {"sharding": "none", "grad_accumulation": 2, "max_grad_norm": 1.0, "optimizer": "lion"}),
    (GPT2, {"sharding": "zero1"}),
    (LLAMA, {"sharding": "zero1", "optimizer_impl": "foreach", "grad_accumulation": 3, "max_grad_norm": 1.0}),
    (TIED, {"sharding": "zero2", "optimizer": "sgd-momentum"}),
    (LLAMA, {"sharding": "zero2", "checkpointing": "block", "optimizer_impl": "foreach"}),
    (GPT2, {"sharding": "zero3", "optimizer": "sgd", "attention": "sdpa"}),
    (LLAMA, {"sharding": "zero3", "grad_accumulation": 2, "optimizer": "lion", "max_grad_norm": 1.0}),
    (TIED, {"sharding": "zero3", "checkpointing": "block", "optimizer_impl": "fused"}),
    (GPT2, {"sharding": "zero3", "checkpointing": "attention", "loss": "torch"}),
    (ONE_BLOCK, {"sharding": "zero3", "optimizer": "sgd"}),
    (LLAMA, {"sharding": "none", "loss": "chunked", "precision": "bf16-mixed", "optimizer": "sgd"}),
    (GPT2, {"sharding": "zero1", "loss": "chunked", "grad_accumulation": 3, "optimizer": "lion"}),
    (TIED, {"sharding": "zero2", "loss": "chunked", "precision": "bf16", "optimizer": "sgd"}),
    (WORDS, {"sharding": "zero3", "loss": "chunked", "precision": "bf16-mixed", "grad_accumulation": 2}),
    (LLAMA, {"sharding": "zero3", "loss": "chunked", "checkpointing": "block", "optimizer": "sgd"}),
    (GPT2, {"sharding": "zero3", "checkpointing": "selective", "checkpoint_every": 2}),
    (LLAMA, {"sharding": "none", "checkpointing": "selective", "optimizer": "sgd"}),
    (LLAMA, {"sharding": "none", "precision": "fp16-mixed", "grad_accumulation": 2, "max_grad_norm": 1.0}),
    (LLAMA, {"precision": "bf16-master", "fp32_gradients": True, "grad_accumulation": 3, "max_grad_norm": 1.0}),
    (GPT2, {"sharding": "none", "precision": "bf16-master", "optimizer": "lion", "max_grad_norm": 1.0}),
    (TIED, {"sharding": "zero1", "precision": "fp16-mixed", "optimizer_impl": "fused", "max_grad_norm": 1.0}),
    (LLAMA, {"sharding": "zero1", "precision": "bf16-master", "optimizer": "sgd", "attention": "sdpa"}),
    (GPT2, {"sharding": "zero2", "precision": "fp16-mixed", "optimizer": "sgd", "attention": "sdpa"}),
    (LLAMA, {"sharding": "zero2", "precision": "bf16-master", "grad_accumulation": 2, "max_grad_norm": 1.0}),
    (LLAMA, {"sharding": "zero3", "precision": "fp16-mixed", "grad_accumulation": 3, "optimizer": "lion"}),
    (TIED, {"sharding": "zero3", "precision": "bf16-master", "checkpointing": "block", "optimizer_impl": "fused"}),
    (LLAMA.replace(sliding_window=5), {"sharding": "none", "optimizer": "sgd"}),
    (GPT2.replace(sliding_window=5), {"sharding": "zero3", "attention": "sdpa", "precision": "bf16-mixed"}),
]


def measured(processes, cases, folder, what="bytes"):
    """What each of so many real processes says of each model and plan."""
    return asked(what, processes, [(m.to_dict(), p.to_dict()) for m, p in cases], folder)


def differing(cases, found):
    """Those of the cases' processes whose figures are not their account's, each with what is real."""
    wrong = []
    for (m, p), processes in zip(cases, found, strict=True):
        for rank, real in enumerate(processes):
            v = account(m, p, "cpu", rank).evaluate(m, p, threads=1)
            if {name: getattr(v, name) for name in real} != real:
                wrong.append((m, p, rank, real, v.peak_bytes))
    return wrong


def losses_alone(step, max_grad_norm):
    """The losses of three steps of one process, with gradients clipped to less than half of their norm, if to any."""
    losses = []
    for _ in range(3):
        loss = step.forward()
        losses.append(loss.item())
        step.backward(loss)
        if max_grad_norm is not None:
            assert torch.nn.utils.clip_grad_norm_(step.model.parameters(), max_grad_norm) > 2 * max_grad_norm
        step.optimizer.step()
        step.optimizer.zero_grad()
    return losses


def asked(what, processes, cases, folder):
    """What each of so many real processes says of each case."""
    source, target = folder / f"cases{processes}.json", folder / f"found{processes}.json"
    source.write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = Path(__file__).with_name("sharding_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(trainer.__file__).parents[1])}
    done = subprocess.run(
        [*command, str(worker), str(source), str(target), what],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line and "USDT" not in line]
    assert done.returncode == 0, "\n".join(said)
    return json.loads(target.read_text())


@pytest.mark.parametrize("processes", [2, 3])
def test_each_process_holds_what_the_account_says_to_the_byte(processes, tmp_path):
    cases = [(m, Plan(batch_size=2, data_parallel=processes, **plan)) for m, plan in REAL]
    if processes == 3:  # where little divides
        cases = cases[::3]
    for (m, p), ranks in zip(cases, measured(processes, cases, tmp_path), strict=True):
        for rank, real in enumerate(ranks):
            v = account(m, p, "cpu", rank).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


def drawn(random, processes):
    """A model and how so many processes share it."""
    m = random.choice([GPT2, LLAMA, TIED, WORDS, ONE_BLOCK]).replace(num_layers=random.randint(1, 4))
    m = m.replace(vocab_size=random.randint(20, 90), d_ff=random.randint(9, 40))
    plan = {
        "batch_size": random.randint(1, 3),
        "data_parallel": processes,
        "sharding": random.choice(["zero2", "zero3", "zero3"]),
        "precision": random.choice(["bf16-fsdp", "bf16-fsdp", "bf16-fsdp", "fp32"]),
        "attention": random.choice(["naive", "sdpa"]),
        "checkpointing": random.choice(["none", "block", "attention", "selective"]),
        "loss": random.choice(["bundled", "torch", "torch-fp32", "chunked"]),
        "optimizer": random.choice(["adamw", "sgd", "sgd-momentum", "lion"]),
        "grad_accumulation": random.choice([1, 1, 2, 3]),
        "max_grad_norm": random.choice([None, None, 1.0]),
    }
    if plan["precision"] == "bf16-fsdp":
        plan |= {"reduce_dtype": random.choice(["fp32", "bf16"]), "autocast": random.random() < 0.2}
    if random.random() < OFFLOADED:
        plan |= {"offload": "parameters"}
    if random.random() < 0.25:
        plan |= {"update": "in-backward", "grad_accumulation": 1, "max_grad_norm": None}
    if processes == 4:
        plan |= {"shard_group": random.choice([None, 2])}
        if plan["sharding"] == "zero3":
            plan |= {"reshard_after_forward": random.choice([None, None, 2])}
    return m, Plan(**plan)


@pytest.mark.parametrize(("processes", "runs"), [(2, RUNS or 10), (3, RUNS or 6), (4, RUNS or 10)])
def test_random_recipes_of_fully_shard_are_exact_in_each_process(processes, runs, tmp_path):
    random = Random(SEED + processes)
    cases = [drawn(random, processes) for _ in range(runs)]
    for (m, p), ranks in zip(cases, measured(processes, cases, tmp_path), strict=True):
        for rank, real in enumerate(ranks):
            v = account(m, p, "cpu", rank).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


def partly_trained(random, processes):
    """A model of which a part is trained, or adapters, in any sharding."""
    m = random.choice([GPT2, LLAMA, TIED, WORDS, ONE_BLOCK]).replace(num_layers=random.randint(1, 5))
    names = ["qkv", "out", "up", "down"] if m.family == "gpt2" else ["q", "k", "v", "out", "gate", "up", "down"]
    kind = random.choice(["lora", "dora", "frozen", "trained"])
    sharding = random.choice(FULLY_SHARDED if processes == 4 else SHARDINGS)
    plan = {
        "batch_size": random.randint(1, 3),
        "data_parallel": processes,
        "sharding": sharding,
        "precision": random.choice(["fp32", "bf16", "bf16", "bf16-mixed"]),
        "attention": random.choice(["naive", "sdpa"]),
        "checkpointing": random.choice(["none", "block", "selective"]),
        "optimizer": random.choice(["adamw", "sgd", "lion", "adamw-8bit"]),
        "grad_accumulation": random.choice([1, 1, 2, 3]),
        "max_grad_norm": random.choice([None, None, 1.0]),
    }
    plan |= {"gradient_as_bucket_view": sharding in ("none", "zero1") and random.random() < 0.5}
    if sharding in FULLY_SHARDED and random.random() < 0.5:
        plan |= {"precision": "bf16-fsdp", "reduce_dtype": random.choice(["fp32", "bf16"])}
    if kind in ("lora", "dora"):
        some = ",".join(random.sample([*names, "head"], random.randint(1, 3)))
        plan |= {"adapter": kind, "adapter_rank": random.choice([1, 3, 4])}
        plan |= {"adapter_targets": random.choice(["all-linear", some])}
        plan |= {"adapter_dropout": random.choice([0.0, 0.1])}
        if "head" not in plan["adapter_targets"] and plan["precision"] in ("fp32", "bf16-mixed", "bf16-fsdp"):
            plan |= {"modules_to_save": random.choice(["", "embedding", "head"])}
        if m.d_ff % 8 == 0:  # what fully_shard takes for floats is a whole number of them
            eight = [] if sharding in FULLY_SHARDED else ["int8"]
            plan |= {"base_precision": random.choice(["none", "nf4", "nf4-double", *eight])}
    else:
        last = m.num_layers - 1
        parts = ["embedding", "norms", "attention", "feed-forward", f"layers:0-{random.randint(0, last)}"]
        plan |= {kind: random.choice([*parts, f"layers:{last}"])}
        if plan["precision"] == "bf16":
            plan |= {"precision": random.choice(["bf16", "bf16-master"])}
    if processes == 4 and sharding in FULLY_SHARDED:
        plan |= {"shard_group": random.choice([None, 2])}
        if sharding == "zero3":
            plan |= {"reshard_after_forward": random.choice([None, None, 2])}
    return m, Plan(**plan)


# Blocks without a backward, whose parts of the smaller mesh stay from step to step.
UNREACHED = Plan(data_parallel=4, sharding="zero3", reshard_after_forward=2, adapter="lora", adapter_targets="head")


@pytest.mark.parametrize(("processes", "runs"), [(2, RUNS or 6), (3, RUNS or 4), (4, RUNS or 4)])
def test_parts_and_adapters_are_exact_in_each_process(processes, runs, tmp_path):
    random, cases = Random(SEED + processes), [(GPT2, UNREACHED)] if processes == 4 else []
    while len(cases) < runs:
        m, p = partly_trained(random, processes)
        try:
            account(m, p, "cpu")
        except ConfigError:  # no parameter is left to train
            continue
        cases.append((m, p))
    for (m, p), ranks in zip(cases, measured(processes, cases, tmp_path), strict=True):
        for rank, real in enumerate(ranks):
            v = account(m, p, "cpu", rank).evaluate(m, p, threads=1)
            assert {name: getattr(v, name) for name in real} == real, (m, p, rank)


def test_losses_on_quantised_weights_that_are_shared_out_are_those_of_one_process(tmp_path):
    use = {"batch_size": 2, "base_precision": "nf4-double", "adapter_rank": 3}
    cases = [
        (GPT2, Plan(data_parallel=2, sharding="zero3", adapter="dora", checkpointing="block", **use)),
        (TIED, Plan(data_parallel=2, sharding="zero2", adapter="lora", **use)),
    ]
    for (m, p), processes in zip(cases, measured(2, cases, tmp_path, "losses"), strict=True):
        alone = losses_alone(trainer.build_step(m, p.replace(data_parallel=1, sharding="none")), None)
        assert processes == [pytest.approx(alone, rel=1e-5)] * 2


def test_parameters_of_any_shape_are_shared_out_as_fully_shard_does(tmp_path):
    """Shapes and names that no model has, over 2 to 8 processes: bytes of each shard, and rows that fill it."""
    random = Random(0)
    cases = []
    for processes in range(2, 9):
        for _ in range(4):
            shapes = [[random.randint(1, 40) for _ in range(random.randint(1, 4))] for _ in range(random.randint(2, 6))]
            words = [f"{a}_{b}" for a in ("w", "router", "lora_A", "_", "Σ") for b in range(9)]
            names = random.sample(words, len(shapes))
            cases.append((processes, dict(zip(names, shapes, strict=True))))
    for (processes, shapes), ranks in zip(cases, asked("shapes", 8, cases, tmp_path), strict=True):
        for rank in range(processes):
            assert shares(shapes, processes, rank) == ranks[rank], (shapes, processes, rank)


class Anything(Module):
    """A model of parameters of any shapes, the first of them in a block."""

    def __init__(self, machine, shapes):
        super().__init__(machine, "")
        self.buffers, self.blocks, self.named = [], [Module(machine, "blocks.0", 0)], {}
        self.child(self.blocks[0])
        for at, (name, shape) in enumerate(shapes.items()):
            sizes = [letter(f"{name}_{i}_{n}", "a size") if n > 1 else ONE for i, n in enumerate(shape)]
            self.named[name] = (self if at else self.blocks[0]).parameter(*sizes)


def shares(shapes, processes, rank):
    """[bytes of the storage, elements] of each parameter's shard on a rank, by the ledger."""
    sizes = {f"{name}_{i}_{n}": n for name, shape in shapes.items() for i, n in enumerate(shape)} | {"D": processes}
    kinds = ShapeClass(frozenset(), shared_width=False, grouped=True)
    machine = Machine(kinds, "cpu", layout((), ("any",), 1).stack, sizes)
    model = Anything(machine, shapes)
    replica = FullySharded(model, Sharing(rank=rank))
    shard = dict(zip(replica.parameters, replica.updated, strict=True))
    held = {name: shard[p] for name, p in model.named.items()}
    return {n: [evaluate(x.storage.nbytes, machine.sizes), evaluate(x.numel, machine.sizes)] for n, x in held.items()}


SENT = [  # wide enough for several buckets, of a first megabyte and of 25 more
    (GPT2.replace(d_model=256, num_heads=4), {"sharding": "none", "grad_accumulation": 2}),
    (LLAMA.replace(num_layers=9, d_model=256, num_heads=4, d_ff=512), {"sharding": "none", "max_grad_norm": 1.0}),
    (TIED.replace(num_layers=9, d_model=256, num_heads=4, d_ff=512, vocab_size=2000), {"sharding": "none"}),
    (LLAMA, {"sharding": "zero1", "max_grad_norm": 1.0, "grad_accumulation": 3}),
    (GPT2, {"sharding": "zero1", "precision": "fp16-mixed"}),
    (TIED, {"sharding": "zero2", "grad_accumulation": 2, "checkpointing": "block"}),
    (GPT2, {"sharding": "zero2", "precision": "bf16-fsdp", "reduce_dtype": "bf16"}),
    (LLAMA, {"sharding": "zero3", "grad_accumulation": 3, "max_grad_norm": 1.0}),
    (GPT2, {"sharding": "zero3", "precision": "bf16-fsdp", "checkpointing": "block"}),
    (ONE_BLOCK, {"sharding": "zero3", "precision": "fp16-mixed", "grad_accumulation": 2}),
    (GPT2, {"sharding": "zero3", "precision": "bf16-fsdp", "adapter": "lora", "base_precision": "nf4"}),
]
MESHES = [
    (LLAMA, {"sharding": "zero3", "shard_group": 2, "max_grad_norm": 1.0}),
    (GPT2, {"sharding": "zero2", "shard_group": 2, "precision": "bf16-fsdp", "grad_accumulation": 2}),
    (GPT2, {"sharding": "zero3", "reshard_after_forward": 2, "precision": "bf16-fsdp", "reduce_dtype": "bf16"}),
]


def totals(real):
    """kind -> (messages, bytes), of what a process was seen to send."""
    found = {}
    for kind, nbytes, count in real:
        messages, total = found.get(kind, (0, 0))
        found[kind] = messages + count, total + count * nbytes
    return found


def accounted(m, p, rank=0, device="cpu"):
    """The same, of the ledger."""
    found = {}
    a, sizes = account(m, p, device, rank), sizes_for(m, p, threads=1, stage=rank)
    for message in communication.messages(a, sizes, p.grad_accumulation):
        messages, total = found.get(message.collective, (0, 0))
        found[message.collective] = messages + message.count, total + message.nbytes
    sends = [x for x in a.traced.ledger.messages if x.kind == "send" and x.micro_batch == 0]
    if sends:  # which are the schedule's: the same of every micro-batch
        turns = p.grad_accumulation
        found["send"] = turns * len(sends), turns * sum(int(evaluate(x.nbytes, sizes)) for x in sends)
    return found


@pytest.mark.parametrize(("processes", "cases"), [(2, SENT), (4, MESHES)])
def test_each_process_sends_the_messages_of_the_ledger(processes, cases, tmp_path):
    cases = [(m, Plan(batch_size=2, data_parallel=processes, **plan)) for m, plan in cases]
    for (m, p), ranks in zip(cases, measured(processes, cases, tmp_path, "messages"), strict=True):
        for rank, real in enumerate(ranks):
            assert accounted(m, p) == totals(real), (m, p, rank)


@st.composite
def shared(draw):
    family, heads = draw(st.sampled_from(["gpt2", "llama"])), draw(st.sampled_from([1, 2, 4]))
    width = heads * draw(st.sampled_from([2, 6, 16]))
    m = ModelConfig(
        family, draw(st.integers(1, 6)), width, heads, draw(st.integers(2, 70)), draw(st.integers(2, 40)),
        d_ff=draw(st.integers(2, 50)),
    )  # fmt: skip
    p = Plan(
        batch_size=draw(st.integers(1, 4)),
        attention=draw(st.sampled_from(["naive", "sdpa"])),
        checkpointing=draw(st.sampled_from(["none", "block"])),
        optimizer=draw(st.sampled_from(["adamw", "lion", "sgd-momentum"])),
        grad_accumulation=draw(st.integers(1, 3)),
    )
    return m, p, draw(st.integers(2, 9)), draw(st.sampled_from(["cpu", "cuda"]))


def values(m, p, device, n=1, sharding="none"):
    p = p.replace(data_parallel=n, sharding=sharding)
    return account(m, p, device).evaluate(m, p, threads=1)


@quick
@given(shared())
def test_ddp_adds_exactly_a_copy_of_the_gradients_and_nothing_else_is_another(step):
    m, p, n, device = step
    alone, ddp = values(m, p, device), values(m, p, device, n)
    assert ddp.peak_categories["communication"] == alone.gradient_bytes
    more = ddp.peak_bytes - alone.peak_bytes
    scalars = 16  # while a gradient is divided into its bucket there is a Python number
    assert alone.gradient_bytes <= more <= alone.gradient_bytes + scalars
    for name in ("parameters", "parameter_bytes", "gradient_bytes", "optimizer_bytes", "activation_bytes"):
        assert getattr(ddp, name) == getattr(alone, name)
    assert ddp == values(m, p, device, 2 * n)  # however many there are


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "bf16-master"])
def test_every_precision_has_an_account_on_several_accelerators(precision, sharding):
    plan = Plan(precision=precision, sharding=sharding, data_parallel=2, attention="sdpa", max_grad_norm=1.0)
    memory = est.estimate("gpt2", plan, "a100-80gb-sxm").memory
    assert sum(memory.parts.values()) == memory.peak


def test_fp32_gradients_of_several_accelerators_are_summed_as_they_are_where_nothing_is_shared():
    Plan(precision="bf16-master", fp32_gradients=True, data_parallel=2)
    with pytest.raises(ConfigError, match="sharding is 'zero2', which sums bf16 gradients"):
        Plan(precision="bf16-master", fp32_gradients=True, data_parallel=2, sharding="zero2")


@quick
@given(shared())
def test_shards_add_up_to_the_whole_and_their_padding(step):
    m, p, n, device = step
    alone = values(m, p, device)
    sharded = {s: values(m, p, device, n, s) for s in SHARDINGS}
    columns = sum(x.numel() // x.shape[0] for x in trainer.build_step(m, Plan()).model.parameters())
    padding = 4 * (n - 1) * columns  # at most n - 1 rows of each parameter
    for name in ("parameter_bytes", "gradient_bytes"):
        assert alone.parameter_bytes <= n * getattr(sharded["zero3"], name) <= alone.parameter_bytes + padding
        assert getattr(sharded["zero2"], name) == getattr(sharded["zero3"], name)
        assert getattr(sharded["zero1"], name) == getattr(alone, name)
    state = sharded["zero3"].optimizer_bytes
    assert sharded["zero1"].optimizer_bytes == sharded["zero2"].optimizer_bytes == state
    assert alone.optimizer_bytes <= n * state
    for v in sharded.values():
        assert sum(v.peak_categories.values()) == v.peak_bytes
        assert (v.parameters, v.forward_flops, v.backward_flops) == (
            alone.parameters, alone.forward_flops, alone.backward_flops,
        )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16-fsdp"])
def test_what_is_offloaded_is_the_hosts(precision):
    p = Plan(optimizer="sgd", data_parallel=2, sharding="zero3", precision=precision)
    here, there = (est.estimate(LLAMA, p.replace(offload=name), "a100-80gb-sxm") for name in ("none", "parameters"))
    assert here.memory.host == here.memory.parts["optimizer"] == 0
    # CPUOffloadPolicy: "offloads parameters, gradients, and optimizer states to CPU"; SGD's update needs nothing more.
    assert there.memory.host == there.values.parameter_bytes + there.values.gradient_bytes
    assert there.values.parameter_bytes == here.values.parameter_bytes
    assert there.memory.parts["parameters"] == there.memory.parts["gradients"] == 0
    assert there.memory.peak < here.memory.peak
    assert there.plan.replace(optimizer="adamw").optimizer_on("cuda") == "loop"  # torch.optim's on CPU tensors
    assert there.time is None
    assert any("nor its link" in note for note in there.notes)
    assert any("The host keeps" in note for note in there.notes)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sharding": "zero2"}, "data_parallel is 1, and it is known of several accelerators"),
        ({"data_parallel": 2, "sharding": "zero1"}, "it is a policy of fully_shard"),
        ({"data_parallel": 2, "sharding": "zero3", "precision": "bf16-master"}, "the masters of 'bf16-master' are"),
    ],
    ids=str,
)
def test_what_cannot_be_offloaded_is_said(fields, said):
    with pytest.raises(ConfigError, match=said):
        est.estimate(LLAMA, Plan(offload="parameters", **fields), "a100-80gb-sxm")


@quick
@given(shared(), st.sampled_from(SHARDINGS))
def test_closed_form_timeline_and_vectorised_peak_agree(step, sharding):
    m, p, n, device = step
    p = p.replace(data_parallel=n, sharding=sharding)
    a, sizes = account(m, p, device), sizes_for(m, p, threads=1)
    peak = a.values(sizes).peak_bytes
    line = timeline(a, sizes)
    assert peak == line.live.max() == rounded_peak(a, sizes, granule=1)
    assert line.live[-1] == line.start
    letters = {name: sizes[name] for name in "BTLdhkefVCn"} | ({"D": n} if p.shards > 1 else {})
    several = a.lambdify()(**(letters | {"V": [m.vocab_size, m.vocab_size + 1]}))
    larger = m.replace(vocab_size=m.vocab_size + 1)
    assert several.tolist() == [peak, account(larger, p, device).evaluate(larger, p, threads=1).peak_bytes]


def test_one_accelerator_shares_with_nobody():
    m, p = est.preset("gpt2"), Plan(sharding="zero3", seq_len=64)
    alone, r = est.estimate(m, p.replace(sharding="none")), est.estimate(m, p)
    assert r.memory.parts == alone.memory.parts
    assert any("nobody to share" in note for note in r.notes)


def test_count_is_the_plans_data_parallel():
    m, p = est.preset("gpt2"), Plan(seq_len=64, sharding="fsdp")
    by_count, by_plan = est.estimate(m, p, count=8), est.estimate(m, p.replace(data_parallel=8))
    assert by_count.plan == by_plan.plan
    assert by_count.memory.peak == by_plan.memory.peak < est.estimate(m, p).memory.peak
    assert by_count.flops.sequences == 8
    with pytest.raises(ConfigError, match="count = 4: the plan's data_parallel is 8"):
        est.estimate(m, p.replace(data_parallel=8), count=4)
    uneven = est.estimate(m, p, "a100-80gb-sxm", count=12)  # nodes hold 8
    assert uneven.time is None
    assert any("whole nodes" in note for note in uneven.notes)


def test_each_stage_holds_less_than_the_one_before():
    p = Plan(seq_len=256, checkpointing="block")
    peaks = [values(est.preset("gpt2-xl"), p, "cuda", 8, s).peak_bytes for s in SHARDINGS]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == len(SHARDINGS)


def test_more_accelerators_hold_more_sequences():
    p = Plan(attention="sdpa", precision="bf16", sharding="zero3")
    most = [est.max_batch_size("gpt2-xl", p.replace(data_parallel=n), "a100-80gb-sxm") for n in (1, 2, 8, 64)]
    assert most == sorted(most)
    assert most[0] < most[-1]


def test_sharding_is_refused_for_updates_of_whole_matrices():
    with pytest.raises(ConfigError, match="works on whole matrices"):
        Plan(optimizer="muon", data_parallel=2, sharding="zero1")
    Plan(optimizer="muon", data_parallel=2)


def test_a_sharded_peak_is_asked_for_with_the_number_of_accelerators():
    m, p = GPT2, Plan(data_parallel=2, sharding="zero3")
    with pytest.raises(ConfigError, match="give how many"):
        account(m, p).lambdify()(B=1, T=16, L=4, d=24, h=3, V=31)
