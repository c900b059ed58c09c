"""The recorder of steps without data against real steps under the profiler, and against the symbolic step."""

import itertools
import os
from random import Random

import pytest
import torch
import transformers
from random_parts import draw
from recorder_symbolic import against_symbolic
from torch import nn
from torch.nn import functional as F

import estimator as est
import trainer
from estimator.describe.checks import ConfigError
from trainer.referee.first_difference import Event, real_events
from trainer.referee.measure import build_step
from trainer.referee.recorder.check import unknown
from trainer.referee.recorder.steps import as_step
from trainer.referee.recorder.truth import compare, judged

transformers.logging.set_verbosity_error()
B, T, V = 2, 40, 200


def own(family, **plan):
    m = est.ModelConfig(family=family, num_layers=2, d_model=64, num_heads=4, d_ff=96, vocab_size=V, context_length=T)
    return lambda: build_step(m, est.Plan(batch_size=B, **{"precision": "fp32", **plan}))


def hugging_face(config, model, **sizes):
    def build():
        torch.manual_seed(0)
        module = model(config(vocab_size=V, **sizes)).train()
        ids = torch.randint(2, V, (B, T))
        return module, lambda module, ids: module(input_ids=ids, labels=ids).loss, (ids,)

    return build


class Skips(nn.Module):
    """Convolutions down and up again, with a skip, normalised by groups and by batch."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.group = nn.GroupNorm(4, 32)
        self.out = nn.Conv2d(48, 3, 1)

    def forward(self, x):
        skip = F.silu(self.norm(self.into(x)))
        low = F.relu(self.group(self.down(skip)))
        return self.out(torch.cat([skip, F.interpolate(low, scale_factor=2)], dim=1))


class Tagger(nn.Module):
    """An LSTM over embedded tokens."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(V, 24), nn.LSTM(24, 32, num_layers=2, batch_first=True)
        self.out = nn.Linear(32, V)

    def forward(self, ids):
        return self.out(self.lstm(self.embedding(ids))[0])


class Upwards(nn.Module):
    """A convolution down, a transposed one up again, and a skip beside it."""

    def __init__(self):
        super().__init__()
        self.down, self.group = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.GroupNorm(4, 16)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(11, 3, 1)

    def forward(self, x):
        return self.out(torch.cat([self.up(F.silu(self.group(self.down(x)))), x], 1))


def upwards():
    torch.manual_seed(0)
    return Upwards(), lambda module, x: F.mse_loss(module(x), x), (torch.rand(B, 3, 16, 16),)


def compiled():
    module, loss, inputs = tagger()
    return torch.compile(module), loss, inputs


class Mixture(nn.Module):
    """Two of four experts a token, each expert's rows looked for in the choices."""

    def __init__(self):
        super().__init__()
        self.embedding, self.router = nn.Embedding(V, 32), nn.Linear(32, 4)
        self.experts, self.head = nn.ModuleList(nn.Linear(32, 32) for _ in range(4)), nn.Linear(32, V)

    def forward(self, ids):
        x = self.embedding(ids).flatten(0, 1)
        weights, choices = self.router(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, choice = torch.where(choices == i)
            y = y.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return self.head(y)


class Hears(nn.Module):
    """Features over time, convolved and added up, to classes."""

    def __init__(self):
        super().__init__()
        self.ear, self.norm, self.out = nn.Conv1d(8, 16, 3, padding=1), nn.LayerNorm(16), nn.Linear(16, V)

    def forward(self, x):
        return self.out(self.norm(F.gelu(self.ear(x)).transpose(1, 2)).mean(1))


def ids():
    return torch.randint(V, (B,))


def tagger():
    torch.manual_seed(0)
    ids = torch.randint(V, (B, T))
    return Tagger(), lambda module, ids: F.cross_entropy(module(ids).flatten(0, 1), ids.flatten()), (ids,)


MODULES = {
    "our gpt2": own("gpt2"),
    "our llama, autocast, checkpoints, two micro-batches": own(
        "llama", precision="bf16-mixed", attention="sdpa", checkpointing="block", grad_accumulation=2, max_grad_norm=1.0
    ),
    "transformers' gpt2": hugging_face(
        transformers.GPT2Config, transformers.GPT2LMHeadModel, n_embd=64, n_layer=2, n_head=4, n_positions=64,
        bos_token_id=None, eos_token_id=None,
    ),
    "transformers' qwen3": hugging_face(
        transformers.Qwen3Config, transformers.Qwen3ForCausalLM, hidden_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
    ),
    "transformers' t5": hugging_face(
        transformers.T5Config, transformers.T5ForConditionalGeneration, d_model=64, d_kv=16, num_heads=4, num_layers=2,
        d_ff=96, decoder_start_token_id=0,
    ),
    "an lstm": tagger,
    "a transposed convolution, the mean of squares": upwards,
}  # fmt: skip


def in_runs(events):
    """Bytes of the events, each run of allocations or of frees in order of size: nothing depends on their order."""
    runs = itertools.groupby((e.nbytes for e in events), key=lambda nbytes: nbytes > 0)
    return [sorted(run) for _, run in runs]


@pytest.mark.parametrize("name", MODULES)
def test_every_event_is_that_of_a_real_step(name):
    recording = trainer.record(MODULES[name])
    events = [Event(e.sign * int(e.storage.nbytes.number), "") for e in recording.ledger.events]
    setup = sum(e.where.phase == "setup" for e in recording.ledger.events)
    step = as_step(MODULES[name]())
    real = real_events(step)
    assert in_runs(events[setup:]) == in_runs(real)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in step.resident() if t.numel()}
    live, most = sum(held.values()), 0
    for event in real:
        live += event.nbytes
        most = max(most, live)
    assert recording.peak_bytes >= most  # what a module holds besides parameters and buffers is found here only
    assert sum(recording.categories.values()) == sum(recording.modules.values()) == recording.peak_bytes
    assert recording.peak_line is not None
    assert not recording.assumptions


def test_a_module_in_half_precision_has_its_real_inputs_cast_too():
    """Speech in, tokens out: features of real numbers beside whole ones (Whisper)."""
    plan = est.Plan(precision="bf16")
    truth = judged(lambda: (Hears(), lambda m, x, y: F.cross_entropy(m(x), y), (torch.rand(B, 8, T), ids())), plan)
    assert not any(truth.differences.values())


def test_the_symbolic_step_says_the_same():
    m = est.ModelConfig(
        family="llama", num_layers=3, d_model=64, num_heads=4, num_kv_heads=2, d_ff=96, vocab_size=V, context_length=T
    )
    p = est.Plan(batch_size=3, checkpointing="block", optimizer="adafactor")
    symbolic = est.account(m, p, device="cpu").evaluate(m, p)
    recording = trainer.record(lambda: build_step(m, p))
    assert recording.peak_bytes == symbolic.peak_bytes
    assert recording.categories == symbolic.peak_categories
    assert recording.peak_where.phase == symbolic.peak_where.phase
    assert recording.peak_where.module == symbolic.peak_where.module


@pytest.mark.parametrize(
    ("family", "width", "plan"),
    [
        ("llama", 64, {"precision": "fp32"}),
        ("llama", 64, {"precision": "bf16", "attention": "sdpa", "dropout": 0.1, "optimizer_impl": "fused"}),
        ("llama", 64, {"precision": "bf16-mixed", "attention": "sdpa", "checkpointing": "selective"}),
        ("llama", 80, {"precision": "bf16", "attention": "sdpa"}),  # heads of 20, which flash pads
        ("llama", 72, {"attention": "sdpa"}),  # heads of 18, which no fused kernel takes in fp32
        ("gpt2", 64, {"precision": "fp16-mixed", "attention": "sdpa", "max_grad_norm": 1.0, "grad_accumulation": 2}),
        ("gpt2", 64, {"attention": "sdpa", "checkpointing": "block", "optimizer": "adafactor", "loss": "torch"}),
        ("gpt2", 64, {"precision": "bf16-master", "optimizer": "muon", "loss": "chunked", "saved_on_host": True}),
        ("gpt2", 64, {"precision": "bf16-mixed", "loss": "torch"}),  # whose log_softmax autocast does not widen
    ],
)
def test_cudas_rules_are_those_of_the_symbolic_step(family, width, plan):
    """No card is here: PyTorch's dispatcher is told of one, and the symbolic step has its rules from the source."""
    m = est.ModelConfig(
        family=family, num_layers=3, d_model=width, num_heads=4, num_kv_heads=4 if family == "gpt2" else 2, d_ff=96,
        vocab_size=V, context_length=T,
    )  # fmt: skip
    p = est.Plan(batch_size=B, **plan)
    recording = trainer.record(lambda: build_step(m, p, "cuda"), device="cuda")
    found = against_symbolic(m, p, recording)
    assert {name: ours for name, (ours, _) in found.items()} == {name: theirs for name, (_, theirs) in found.items()}
    assert not torch.cuda.is_available() or torch.version.cuda  # what was put in place is gone
    memory, symbolic = (est.estimate(*x, "a100-80gb-sxm").memory for x in ((recording, p), (m, p)))
    assert (memory.allocated, memory.needed) == (symbolic.allocated, symbolic.needed)


class Asks(nn.Module):
    """What has a kernel of its own on CUDA alone, and questions to the card."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.rnn = nn.Embedding(V, 24), nn.RMSNorm(24), nn.GRU(24, 24, batch_first=True)
        self.depth, self.out = nn.Conv1d(24, 24, 3, padding=1, groups=24), nn.Linear(24, V)

    def forward(self, ids):
        assert ids.is_cuda
        torch.cuda.nvtx.range_push("forward")
        x = self.rnn(self.norm(self.embedding(ids)))[0]
        torch.cuda.nvtx.range_pop()
        assert torch.cuda.max_memory_allocated() >= 0
        return self.out(self.depth(x.transpose(1, 2)).transpose(1, 2))


def test_code_that_asks_for_a_card_is_told_of_one():
    def build():
        module, ids = Asks().cuda(), torch.randint(V, (B, T), device="cuda" if torch.cuda.is_available() else "cpu")
        return module, lambda module, ids: F.cross_entropy(module(ids).flatten(0, 1), ids.flatten()), (ids,)

    recording = trainer.record(build, device="cuda")
    names = {kernel.name for kernel in recording.ledger.kernels}
    assert {"_fused_rms_norm", "_thnn_fused_gru_cell", "_conv_depthwise2d", "_foreach_addcdiv_"} <= names
    assert not recording.assumptions
    said = " ".join(unknown(recording))
    assert "Convolutions" in said
    assert "GRU" in said


def test_a_recording_of_bytes_alone_has_the_same_bytes():
    whole, alone = (trainer.record(tagger, bytes_alone=x) for x in (False, True))
    assert alone.account.delta.tolist() == whole.account.delta.tolist()
    assert not alone.ledger.kernels
    assert alone.saved_bytes is None


def routed(read):
    """A module whose loss reads values that come of its weights."""
    module = nn.Linear(64, 64)
    return lambda: (module, lambda m, x: read(m(x)).mean(), (torch.rand(32, 64),))


def test_values_that_are_asked_for_are_assumed_and_counted_with_their_line():
    def read(y):
        counts = torch.bincount(y.argmax(-1), minlength=6).tolist()
        assert sum(counts) == 32
        assert not y.isnan().any()
        return torch.cat(torch.split(y, counts))

    recording = trainer.record(routed(read))
    said = {str(a).rpartition("/")[2].partition(":")[0] for a in recording.assumptions}
    assert said == {"test_recorder.py"}
    assert {a.what.split(" for ")[0] for a in recording.assumptions} == {"even counts of 32 in 6", "false"}


@pytest.mark.filterwarnings("ignore")  # of what torch.compile imports, and that it is told not to compile
def test_what_is_compiled_is_recorded_without_the_compiler():
    assert trainer.record(compiled).peak_bytes == trainer.record(tagger).peak_bytes


def mixture():
    """A module whose experts' rows are values: 2 x 40 tokens, two choices each, four experts."""
    torch.manual_seed(0)
    ids = torch.randint(V, (B, T))
    return Mixture(), lambda module, ids: F.cross_entropy(module(ids), ids.flatten()), (ids,)


def test_the_choices_of_a_router_are_dealt_out():
    """Every expert has as many rows."""
    recording = trainer.record(mixture)
    assert {a.what for a in recording.assumptions} == {"each chosen as often as any other, for the choices of topk"}
    rows = [e.storage.nbytes.number for e in recording.ledger.events if e.sign > 0 and e.where.op == "addmm"]
    assert rows.count(4 * 32 * B * T * 2 // 4) == 4


def test_a_step_whose_choices_are_dealt_out_is_recorded_event_by_event():
    """Its experts, with rows as many as is assumed; where the router chooses for itself they have others."""
    truth = judged(mixture)
    assert truth.first is None
    assert not any(truth.differences.values())
    assert truth.own_routing == truth.peak[1]  # which is in the loss
    chosen = {e.nbytes for e in real_events(as_step(mixture()))}
    assert chosen - {e.nbytes for run in truth.runs[1] for e in run}
    assert "whose router's choices are dealt out as is assumed: all" in compare(mixture)


class Scaled:
    """A step with a loss scaler, as a user writes it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.inputs = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), (torch.rand(4, 32),)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=False)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    def __call__(self):
        with torch.autocast("cpu", torch.float16):
            loss = self.model(*self.inputs).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()


def test_a_loss_scaler_finds_no_overflow():
    """It asks before it updates: the update is not skipped, and the states are there."""
    truth = judged(Scaled)
    assert truth.first is None
    assert not any(truth.differences.values())
    assert {a.what.partition(" ")[0] for a in truth.recording.assumptions} == {"0"}


def test_code_whose_shapes_are_values_is_refused_with_its_line():
    with pytest.raises(ConfigError, match=r"test_recorder.py:\d+: `return y\[y > 0\]` wants values"):
        trainer.record(routed(chosen))


def chosen(y):
    return y[y > 0]


@pytest.mark.parametrize("seed", range(int(os.environ.get("RECORDER_SEEDS", "10"))))
def test_random_decoders_and_recipes_are_what_the_symbolic_step_says(seed):
    m, p = draw(Random(seed))
    found = against_symbolic(m, p, trainer.record(lambda: build_step(m, p)))
    found.pop("events")  # of what never makes a peak the symbolic step leaves some out: a loss of one class, the norm
    assert {name: ours for name, (ours, _) in found.items()} == {name: theirs for name, (_, theirs) in found.items()}


@pytest.mark.parametrize(
    "plan",
    [
        {"precision": "fp32"},
        {"precision": "bf16-mixed", "attention": "sdpa", "checkpointing": "block", "max_grad_norm": 1.0},
        {"precision": "bf16", "attention": "sdpa", "grad_accumulation": 3},
    ],
)
def test_kernels_and_time_are_those_of_the_symbolic_step(plan):
    """FLOPs to the FLOP, in each micro-batch; the device's time within 10 %: here and there a kernel is two."""
    m = est.ModelConfig(
        family="llama", num_layers=3, d_model=256, num_heads=4, num_kv_heads=2, d_ff=512, vocab_size=512,
        context_length=256,
    )  # fmt: skip
    p = est.Plan(batch_size=2, loss="torch", optimizer_impl="foreach", **plan)
    recording = trainer.record(lambda: build_step(m, p))
    values = est.account(m, p, device="cpu").evaluate(m, p)
    for turn in range(p.grad_accumulation):
        own = [k for k in recording.ledger.kernels if k.micro_batch == turn and k.gemm is not None]
        flops = {x: sum(int(k.flops.number) for k in own if k.where.phase == x) for x in ("forward", "backward")}
        assert flops == {"forward": values.forward_flops, "backward": values.backward_flops}
    answer, symbolic = est.estimate(recording, p, "a100-80gb-sxm"), est.estimate(m, p, "a100-80gb-sxm")
    assert answer.fits
    assert answer.time.parts["matmul"] == pytest.approx(symbolic.time.parts["matmul"], rel=0.02)
    device, theirs = (sum(t.parts.values()) - t.parts["launch"] for t in (answer.time, symbolic.time))
    assert device == pytest.approx(theirs, rel=0.1)
    assert answer.time.seconds == pytest.approx(symbolic.time.seconds_per_step, rel=0.2)  # with the host's


class Product(torch.autograd.Function):
    """x w^T of factors in 8 bits, whose gradients are products in 16; (b, n), (m, n) -> (b, m)."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        one = torch.ones((), device=x.device)
        x, w = (t.to(torch.float8_e4m3fn) for t in (x, w))
        return torch._scaled_mm(x, w.t(), one, one, out_dtype=torch.bfloat16)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.t() @ x


class Eighths(nn.Linear):
    """A layer that multiplies so."""

    def forward(self, x):
        return Product.apply(x, self.weight)


def test_products_in_8_bits_are_the_modules_own():
    """Their FLOPs are counted, at their rate; the plan cannot ask for them."""
    p = est.Plan(precision="bf16", optimizer="sgd")

    def answer(kind):
        def build():
            return kind(4096, 4096, bias=False), lambda module, x: module(x).square().mean(), (torch.rand(8192, 4096),)

        return est.estimate(trainer.record(build, p, "cuda"), p, "h100-80gb-sxm").time

    plain, eighths = answer(nn.Linear), answer(Eighths)
    assert eighths.flops == plain.flops + 2 * 8192 * 4096 * 4096  # x has a gradient here
    assert eighths.parts["matmul"] < plain.parts["matmul"] * 3 / 2
    with pytest.raises(ConfigError, match="float8 = 'rowwise': a recorded step multiplies in 8 bits where"):
        trainer.record(tagger, p.replace(compile=True, float8="rowwise"))


def test_what_a_module_keeps_from_step_to_step_is_freed_in_the_next():
    kept = []

    def build():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Embedding(V, 32), nn.Linear(32, V))
        module[0].register_forward_hook(lambda _, __, out: kept.append(out.detach().float().std()))

        def loss(module, ids):
            kept.clear()
            return F.cross_entropy(module(ids).flatten(0, 1), ids.flatten()) + kept[0]

        return module, loss, (torch.randint(V, (B, T)),)

    for device in ("cpu", "cuda"):
        memory = est.estimate(trainer.record(build, est.Plan(), device), est.Plan(), "a100-80gb-sxm").memory
        assert memory.reserved >= memory.allocated


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_derivatives_that_are_taken_forward_are_refused_by_cudas_rules():
    def build():
        module = nn.Linear(8, 8)

        def loss(module, x):
            out, along = torch.func.jvp(module, (x,), (torch.ones_like(x),))
            return (out + along).mean()

        return module, loss, (torch.randn(2, 8),)

    assert trainer.record(build, est.Plan(), "cpu").peak_bytes
    with pytest.raises(ConfigError, match=r"taken forward .torch.func.jvp. are not recorded by CUDA's rules"):
        trainer.record(build, est.Plan(), "cuda")
