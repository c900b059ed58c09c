"""The judge: one real training step, and what it did to memory, counted by PyTorch itself.

Three referees, none of which shares code with `estimator`: the profiler's raw memory events for the peak (they see the
step as it runs; any TorchDispatchMode would change what autograd does and read up to 6 % too high),
`saved_tensors_hooks` for what backward keeps, `FlopCounterMode` for matrix products.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
import weakref
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from estimator.describe.checks import ConfigError
from estimator.describe.schedules import FORWARD, accumulation, micro_batches
from trainer.model.adapters import to_precision
from trainer.model.decoder import build_model
from trainer.model.loss import cross_entropy
from trainer.model.quantised import flop_formulas, number_of_parameters, scales
from trainer.model.router import Router
from trainer.optim.clip import gradient_clipping
from trainer.optim.eight_bit import AdamW8bit
from trainer.optim.in_backward import InBackward, no_updates
from trainer.optim.optimizers import SGD, AdamW, Lion, MuonAdamW, is_for_muon
from trainer.optim.precision import AUTOCAST, Masters, autocast, float32_copy, loss_scaler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor, nn

    from estimator.describe.model import ModelConfig
    from estimator.describe.plan import Plan
    from estimator.describe.schedules import Schedule
    from trainer.parallel.distributed import Weights


class Step:
    """One whole optimizer step on fixed random tokens: micro-batches, clipping if asked, step, zero_grad.

    Attributes:
        model: the module.
        optimizer: the optimizer.
        inputs: (ids, targets), each (B, T) int64, the targets of the last positions only where no other logits are
            computed; every micro-batch of the step is the same one.
        masters: what the optimizer moves in place of the model's parameters; None if it moves these.
        scaler: of the loss; does nothing but in float16.
        schedule: in which order the micro-batches go forward and backward.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: tuple[Tensor, Tensor],
        p: Plan,
        masters: Masters | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        self.schedule = schedule or accumulation(p.grad_accumulation)
        self.model, self.optimizer, self.inputs, self.plan, self.masters = model, optimizer, inputs, p, masters
        self.module = model  # what is called, where that is not the model itself
        self.updated = [
            x for x in (model.parameters() if masters is None else masters.named.values()) if x.requires_grad
        ]
        # With the usual 2^16 the first gradients of random weights could overflow, and a step be left out.
        self.scaler = loss_scaler(p.precision, inputs[0].device.type, init_scale=2.0**8)
        self.scaler._maybe_opt_step = _step_anyway  # type: ignore[method-assign, assignment]  # noqa: SLF001 - what it has in place of a switch

    def __call__(self) -> None:
        """Run it."""
        losses: dict[int, Tensor] = {}
        for kind, turn in self.schedule:
            if kind == FORWARD:
                losses[turn] = self.forward()
            else:
                self.backward(losses.pop(turn))
        if self.masters is not None:
            self.masters.take_gradients()
        self.scaler.unscale_(self.optimizer)
        if self.plan.max_grad_norm is not None:
            gradient_clipping(self.updated, self.plan.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.masters is not None:
            self.masters.write_back()
        else:
            self.optimizer.zero_grad()

    def forward(self) -> Tensor:
        """The loss of one micro-batch, divided by their number."""
        turns = micro_batches(self.schedule)
        ids, targets = self.inputs
        with autocast(self.plan, ids.device.type):
            loss = loss_of(self.module, self.plan, ids, targets)
        return loss if turns == 1 else loss / turns

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch."""
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves Tensor.backward untyped

    def state(self) -> Iterable[Tensor]:
        """What the optimizer keeps from step to step, master weights included."""
        yield from (t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
        yield from getattr(self.optimizer, "tables", ())
        if self.masters is not None:
            yield from self.masters.named.values()

    def resident(self) -> Iterable[Tensor]:
        """All tensors that are alive between two steps."""
        yield from (*self.model.parameters(), *self.model.buffers(), *self.inputs, *self.state())
        yield from scales(self.model)
        yield from (x.grad for x in self.updated if x.grad is not None)
        yield from (x for x in vars(self.scaler).values() if isinstance(x, torch.Tensor))

    def gradients(self) -> Iterable[Tensor]:
        """The gradients, after backward."""
        yield from (x.grad for x in self.model.parameters() if x.grad is not None)
        if self.plan.fp32_gradients:
            yield from (x.grad for x in self.updated if x.grad is not None)


def _step_anyway(optimizer: torch.optim.Optimizer, state: dict[str, Any], *args: Any, **more: Any) -> Any:
    """`GradScaler._maybe_opt_step`, but for the decision: random weights may overflow, and the step is measured."""
    sum(found.item() for found in state["found_inf_per_device"].values())
    return optimizer.step(*args, **more)


def torch_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's own, to compare with. Shapes: (B, T, V), (B, T) -> ()."""
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def torch_cross_entropy_fp32(logits: Tensor, targets: Tensor) -> Tensor:
    """The same of the logits in float32, as most scripts do it in half precision."""
    return torch_cross_entropy(logits.float(), targets)


LOSSES = {"bundled": cross_entropy, "torch": torch_cross_entropy, "torch-fp32": torch_cross_entropy_fp32}


def loss_of(module: nn.Module, p: Plan, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss of `module` that `p` names."""
    with torch.autograd.graph.save_on_cpu(pin_memory=True) if p.saved_on_host else nullcontext():
        if p.loss == "chunked":
            return module(ids, targets_BT=targets)
        return own_tensor(LOSSES[p.loss](module(ids), targets))


def own_tensor(x: Tensor) -> Tensor:
    """A process's own part of a DTensor; other tensors as they are."""
    return x.to_local() if isinstance(x, DTensor) else x


def build_optimizer(named: Mapping[str, nn.Parameter], p: Plan, device: str) -> torch.optim.Optimizer:
    """The optimizer that `p` names for a model's parameters, with its default hyper-parameters."""
    kind, parameters = p.optimizer_on(device), list(named.values())
    torchs: dict[str, Any] = {"foreach": kind == "foreach", "fused": kind == "fused"}
    match p.optimizer:
        case "sgd" if kind == "bundled":
            return SGD(parameters)
        case "sgd":
            return torch.optim.SGD(parameters, **torchs)
        case "sgd-momentum":
            return torch.optim.SGD(parameters, momentum=0.9, **torchs)
        case "adam":
            return torch.optim.Adam(parameters, **torchs)
        case "lion":
            return Lion(parameters)
        case "adafactor":
            return torch.optim.Adafactor(parameters, foreach=kind == "foreach")
        case "adamw-8bit":
            return AdamW8bit(parameters)
        case "muon":
            matrices = [x for name, x in named.items() if is_for_muon(name, x)]
            others = [x for x in parameters if all(x is not matrix for matrix in matrices)]
            return MuonAdamW(matrices, others, **torchs)
        case _ if kind == "bundled":
            return AdamW(parameters)
        case _:
            return torch.optim.AdamW(parameters, **torchs)


def build_updates(
    named: Mapping[str, nn.Parameter], p: Plan, device: str, weights: Weights | None = None
) -> torch.optim.Optimizer:
    """`build_optimizer` or, in backward, one for each parameter; `weights` are those of a sharded model."""
    if p.update == "after":
        return build_optimizer(named, p, device)
    parts = {name: build_optimizer({name: x}, p, device) for name, x in named.items()}
    if weights is None:
        return InBackward(parts, named)
    return InBackward(parts, weights.originals, weights.shard)


def build_step(m: ModelConfig, p: Plan, device: str = "cpu", seed: int = 0, schedule: Schedule | None = None) -> Step:
    """A step of `m` run as `p` says, on `device`, its weights and tokens drawn from `seed`.

    `schedule` is the order of its micro-batches, in place of the plan's accumulation.

    Raises:
        ConfigError: the sequence is longer than the model's positions, the device has not the attention's kernel, or
            the plan is for several processes.
    """
    if p.accelerators > 1:
        raise ConfigError(f"accelerators = {p.accelerators}: this is one process; see `trainer.referee.replicas`")
    model, inputs = build_parts(m, p, device, seed)
    named, masters = trained(model), None
    if p.precision == "bf16-master":
        masters = Masters(named, trained(float32_copy(model)), fp32_gradients=p.fp32_gradients)
        named = dict(masters.named)
    return Step(model, build_updates(named, p, torch.device(device).type), inputs, p, masters, schedule)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that want a gradient, by name."""
    return {name: x for name, x in model.named_parameters() if x.requires_grad}


def build_parts(
    m: ModelConfig, p: Plan, device: str, seed: int, sequences: int | None = None
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """(the model, ids and targets of so many sequences, by default a micro-batch), drawn from `seed`.

    With an imbalance, routers deal tokens out by it, and evenly where experts are shared out: elsewhere no byte depends
    on it.
    """
    if p.implementation != "bundled":
        raise ConfigError(f"implementation = {p.implementation!r}: the trainer runs its own; allowed is bundled")
    T = p.tokens(m)
    p.attention_kernel(torch.device(device).type, m)  # refuses one that the device has not
    torch.manual_seed(seed)
    with torch.device(device):
        model = to_precision(build_model(m, p), p)
        ids, targets = (torch.randint(m.vocab_size, (sequences or p.batch_size, n)) for n in (T, p.logits_to_keep or T))
    for router in (x for x in model.modules() if isinstance(x, Router)):
        if p.imbalance > 1 or p.expert_parallel > 1:
            router.routing = p.imbalance if p.imbalance > 1 else "even"
    return model, (ids, targets)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one real step took; bytes, FLOPs (matrix products, of one micro-batch) and seconds.

    Attributes:
        parameters: number of parameters, shared ones once.
        parameter_bytes: their bytes.
        gradient_bytes: bytes of all gradients before the optimizer's step.
        optimizer_bytes: bytes of the optimizer's state on the device.
        saved_bytes: storages that autograd keeps after forward, each once, less parameters, buffers and inputs.
        peak_bytes: the most bytes of live tensors in a steady step, in kernels without scratch of their own.
        scratch_bytes: by how much oneDNN's matrix products in half precision raise that peak on this machine; their
            packed copies of the factors depend on the processor, the threads and oneDNN's version.
        forward_flops: FlopCounterMode's count of forward.
        backward_flops: FlopCounterMode's count of backward, recomputation included.
        seconds: median of the timed steps; not a number if none was timed.
        allocated_bytes, reserved_bytes: on CUDA, the most that the allocator has given out and has asked of the device
            in the first two steps; None elsewhere.
    """

    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    saved_bytes: int
    peak_bytes: int
    scratch_bytes: int
    forward_flops: int
    backward_flops: int
    seconds: float
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain fields."""
        return asdict(self)


def measure(
    m: ModelConfig,
    p: Plan,
    device: str = "cpu",
    seed: int = 0,
    timed_steps: int = 3,
    schedule: Schedule | None = None,
) -> Measurement:
    """Run real steps of `m` and `p` on `device` and count; see `Measurement` and, for `schedule`, `build_step`."""
    cuda = torch.device(device).type == "cuda"
    allocated, reserved = allocator_peaks(m, p, device, seed) if cuda else (None, None)
    step = build_step(m, p, device, seed, schedule)
    step()  # the first step makes the optimizer's state; the steady ones are alike
    parameters = list(step.model.parameters())
    base = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _resident(step, device)}
    saved, forward_flops, gradients, backward_flops = _count_micro_batch(step)
    with onednn(enabled=False):
        growth = peak_growth(step, device)
    half = p.precision in AUTOCAST or p.optimizer == "muon" or any(x.itemsize < 4 for x in parameters)
    packs = half and torch.device(device).type == "cpu" and torch.backends.mkldnn.enabled
    scratch = peak_growth(step, device) - growth if packs else 0
    return Measurement(
        parameters=number_of_parameters(step.model),
        parameter_bytes=nbytes([*parameters, *scales(step.model)]),
        gradient_bytes=gradients,
        optimizer_bytes=nbytes(x for x in step.state() if x.device.type == torch.device(device).type),
        saved_bytes=saved,
        peak_bytes=sum(base.values()) + growth,
        scratch_bytes=scratch,
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        seconds=statistics.median([_seconds(step, device) for _ in range(timed_steps)] or [math.nan]),
        allocated_bytes=allocated,
        reserved_bytes=reserved,
    )


def allocator_peaks(m: ModelConfig, p: Plan, device: str, seed: int) -> tuple[int, int]:
    """(allocated, reserved): the most bytes of CUDA's allocator in two steps from nothing, less what others hold."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - it has no public name; an earlier case's would be counted
    torch.cuda.empty_cache()
    others = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    step = build_step(m, p, device, seed)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - others[0], torch.cuda.max_memory_reserved() - others[1]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind `tensors`, each counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())  # noqa: SLF001 - the storage's identity


def _resident(step: Step, device: str) -> Iterable[Tensor]:
    kind = torch.device(device).type
    return (t for t in step.resident() if t.device.type == kind)


class Saved:
    """A tensor that autograd has been given to keep; alive as long as autograd keeps it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _count_micro_batch(step: Step) -> tuple[int, int, int, int]:
    """(saved bytes, forward FLOPs, gradient bytes, backward FLOPs) of one micro-batch."""
    held = (*step.model.parameters(), *step.model.buffers(), *step.inputs, *scales(step.model))
    resident = {t.untyped_storage()._cdata for t in held}  # noqa: SLF001 - the storage's identity
    kept: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(t: Tensor) -> Saved:
        saved = Saved(t.detach())  # a result that its own node keeps would never be freed
        kept.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = step.forward()
    gc.collect()
    alive = [saved.tensor for saved in kept]
    if step.plan.checkpointing == "selective":
        alive += kept_by_selective_checkpoints()
    saved = nbytes(t for t in alive if t.untyped_storage()._cdata not in resident)  # noqa: SLF001 - the storage's identity
    del alive
    step.model.zero_grad()
    formulas = flop_formulas() if step.plan.base_precision != "none" else None
    with FlopCounterMode(display=False, custom_mapping=formulas) as forward:
        loss = step.forward()
    with (
        FlopCounterMode(display=False, custom_mapping=formulas) as backward,
        no_updates(step.optimizer),
    ):  # whose products are not backward's
        step.backward(loss)
    if step.plan.update == "in-backward":
        step.model.zero_grad()
        step.backward(step.forward())
    gradients = nbytes(step.gradients())
    step.model.zero_grad()
    return saved, forward.get_total_flops(), gradients, backward.get_total_flops()


def kept_by_selective_checkpoints() -> Iterator[Tensor]:
    """The results that selective checkpoints hold for their recomputation, which no hook is told of."""
    recomputation = type(create_selective_checkpoint_contexts([])[1])  # type: ignore[no-untyped-call]
    for mode in gc.get_objects():
        if type(mode) is recomputation:  # isinstance would wake lazy modules
            held = (getattr(x, "val", None) for x in tree_leaves(dict(mode.storage)))
            yield from (x for x in held if isinstance(x, torch.Tensor))


@contextmanager
def onednn(*, enabled: bool) -> Iterator[None]:
    """Let oneDNN take matrix products in half precision, or leave them to the kernels that PyTorch has without it."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = enabled  # type: ignore[assignment]  # a property of the module
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def allocator_events(step: Callable[[], object]) -> list[tuple[int, int]]:
    """[(time in ns, signed bytes)] of the CPU allocator during one call of `step`, in order of time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        step()
    results = prof.profiler.kineto_results  # prof.events() drops most memory events
    assert results is not None
    cpu = torch._C._autograd.DeviceType.CPU  # noqa: SLF001 - kineto's own enum
    events = (e for e in results.events() if e.name() == "[memory]" and e.device_type() == cpu)
    return sorted(((e.start_ns(), e.nbytes()) for e in events), key=lambda event: event[0])


def peak_growth(step: Callable[[], object], device: str) -> int:
    """How far the live bytes rise above those before the step: profiler events on CPU, the allocator's on CUDA."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
    live = peak = 0
    for _, delta in allocator_events(step):
        live += delta
        peak = max(peak, live)
    return peak


def _seconds(step: Callable[[], object], device: str) -> float:
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
