"""One process or many: DDP, FSDP2, and the weights as each process has them.

`torchrun` starts the processes and tells each its rank by the environment. Everything here is a no-op in a run of one
process, so that the training loop reads the same for both.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from estimator.describe.checks import ConfigError
from trainer.model.decoder import Transformer
from trainer.optim.clip import gradient_clipping
from trainer.optim.precision import Masters, float32_copy
from trainer.parallel.context import context_parallel
from trainer.parallel.expert import expert_parallel, of_experts, shard_experts
from trainer.parallel.pipeline import Stage, Stages, stages_of
from trainer.parallel.tensor import tensor_parallel

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.distributed.device_mesh import DeviceMesh

    from estimator.describe.plan import Plan


class World:
    """The processes of a run, and this one's place among them.

    Attributes:
        rank: this process's number, from 0.
        size: how many there are.
        device: this process's.
    """

    def __init__(self, device: str) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device = 'cuda': torch sees no CUDA device here; allowed are auto, cpu")
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        self.device = (
            torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
        )
        if device == "cuda":
            torch.cuda.set_device(self.device)
        self.of_experts: DeviceMesh | None = None
        self.grids: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}
        self.joined = self.size > 1 and not dist.is_initialized()  # a group that the caller has made stays the caller's
        if self.joined:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")

    def leave(self) -> None:
        """End the talk with the others."""
        if self.joined:
            dist.destroy_process_group()

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x` over the processes; `x` itself is overwritten."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def mean(self, x: Tensor) -> None:
        """Make `x` the mean over the processes, in place."""
        dist.all_reduce(x)
        x.div_(self.size)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process: what one decides on a signal, all must do in the same step."""
        return bool(self.total(torch.tensor(float(flag), device=self.device))) if self.size > 1 else flag

    def barrier(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, plan: Plan, sharding: str) -> nn.Module:
        """What to call instead of `model`: DDP, or `model` itself with its parameters sharded in place by FSDP2.

        ZeRO-3 empties a block's parameters after its forward and gathers them again for its backward; ZeRO-2 does not.
        """
        if self.size == plan.tensor_parallel:
            return model
        if plan.offload != "none" and self.device.type != "cpu":
            raise ConfigError(f"offload = {plan.offload!r}: the trainer runs it on the CPU alone; allowed is none")
        if plan.fp32_gradients:  # which are summed as they are: `mean`
            return model
        if sharding in ("none", "zero1"):
            devices = [self.device] if self.device.type == "cuda" else None
            if plan.expert_parallel > 1:
                leave_out(model, of_experts(model))
            return nn.parallel.DistributedDataParallel(
                model, devices, gradient_as_bucket_view=plan.gradient_as_bucket_view
            )
        return self.shard(model, plan, policy(plan), keeps=sharding == "zero2")

    def shard(
        self, model: nn.Module, plan: Plan, mixed: MixedPrecisionPolicy | None = None, *, keeps: bool = False
    ) -> nn.Module:
        """`model`, of whose parameters each process holds its rows, by FSDP2; `keeps` them whole until backward."""
        options: dict[str, Any] = {"mesh": self.mesh(plan), "mp_policy": mixed or MixedPrecisionPolicy()}
        root: dict[str, Any] = {"reshard_after_forward": False} if keeps else {}
        if plan.offload != "none":
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
        inner = root if plan.reshard_after_forward is None else {"reshard_after_forward": plan.reshard_after_forward}
        blocks = "model.blocks" if plan.is_pipeline else "blocks"
        for block in model.get_submodule(blocks).children():  # one block is gathered at a time
            if plan.expert_parallel > 1:
                shard_experts(block, self.size, **options | inner | {"mesh": self.experts(plan)["data"]})
            fully_shard(block, **options, **inner)
        fully_shard(model, **options, **root)
        return model

    def mesh(self, plan: Plan) -> DeviceMesh:
        """The processes that share shards; with `shard_group` a row of them for each group that has all (HSDP)."""
        group = plan.shard_group
        if plan.tensor_parallel > 1 or plan.is_pipeline:
            return (
                self.grid(plan)["data"]
                if plan.shard_group in (None, plan.data_parallel)
                else self.grid(plan)["replicate", "data"]
            )
        if group is None or group == self.size:
            return init_device_mesh(self.device.type, (self.size,))
        return init_device_mesh(self.device.type, (self.size // group, group), mesh_dim_names=("replicate", "data"))

    def experts(self, plan: Plan) -> DeviceMesh:
        """Those that share the experts, side by side, and those that have the same ones: so far each has its own."""
        if self.of_experts is None:
            shape = self.size // plan.expert_parallel, plan.expert_parallel
            self.of_experts = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "expert"))
        return self.of_experts

    def grid(self, plan: Plan) -> DeviceMesh:
        """All processes, those that share a block's matrices side by side, the stages of a pipeline furthest apart."""
        sizes = {"pipeline": plan.pipeline_parallel, "data": plan.data_parallel, "tensor": plan.tensor_parallel}
        if plan.shards > 1 and plan.replicas > 1:
            sizes = {"pipeline": plan.pipeline_parallel, "replicate": plan.replicas, "data": plan.shards}
            sizes["tensor"] = plan.tensor_parallel
        axes = tuple(sizes.items())
        if axes not in self.grids:  # each makes process groups of its own
            shape, names = tuple(sizes.values()), tuple(sizes)
            self.grids[axes] = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        return self.grids[axes]

    def prepare(
        self, model: nn.Module, plan: Plan, sharding: str
    ) -> tuple[nn.Module, Weights, Weights, Masters | None]:
        """(What to call for `model`, its weights, those that the optimizer updates, how the two are kept equal).

        With master weights the optimizer's are float32 copies, shared out as the model's own are updated; without, the
        weights are one and the same.
        """
        if plan.tensor_parallel > 1:
            ends = {"sequence": plan.sequence_parallel, "vocabulary": plan.vocabulary_parallel}
            tensor_parallel(model, self.grid(plan)["tensor"], **ends)
        if plan.context_parallel > 1:
            shape = (self.size // plan.context_parallel, plan.context_parallel)
            mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=("data", "context"))
            context_parallel(model, mesh["context"])
        if plan.expert_parallel > 1:
            if plan.expert_parallel != self.size:
                raise ConfigError(f"expert_parallel = {plan.expert_parallel}: there are {self.size} processes")
            expert_parallel(model, self.experts(plan)["expert"])
        copied = float32_copy(model) if plan.precision == "bf16-master" else None
        module, held = self.wrap(model, plan, sharding), self.weights(model, sharding)
        if copied is None:
            return module, held, held, None
        updated = Weights(self.shard(copied, plan) if self.shares(sharding) else copied)
        mean = self.mean if plan.fp32_gradients and self.size > 1 else None
        return module, held, updated, Masters(held.named, updated.named, fp32_gradients=plan.fp32_gradients, mean=mean)

    def prepare_stage(self, model: Transformer, plan: Plan) -> tuple[Stage | Stages, Weights]:
        """(This process's stage of `model`, its weights), shared out by tensors and by rows as `plan` says."""
        grid = self.grid(plan)
        if plan.tensor_parallel > 1:
            tensor_parallel(model, grid["tensor"], sequence=plan.sequence_parallel)
        stage = stages_of(model, grid["pipeline"].get_local_rank(), plan)
        if plan.shards > 1:
            self.shard(stage, plan, policy(plan), keeps=True)
        return stage, Weights(stage, stages=grid["pipeline"])

    def shares(self, sharding: str) -> bool:
        """Whether each process updates a part of the parameters."""
        return self.size > 1 and sharding != "none"

    def parts_gradients(self, plan: Plan, sharding: str) -> bool:
        """Whether each process has a part of the gradients only, when the optimizer is to move the weights."""
        return self.shares(sharding) or plan.shares_matrices

    def weights(self, model: nn.Module, sharding: str) -> Weights:
        """The parameters of a model that has been wrapped, as the optimizer sees them."""
        shares = sharding == "zero1" and self.shares(sharding)
        return Weights(model, init_device_mesh(self.device.type, (self.size,)) if shares else None)

    def micro_batch(self, module: nn.Module, *, last: bool) -> AbstractContextManager[object]:
        """Where a micro-batch is computed: DDP exchanges gradients once a step, in its last one's backward.

        FSDP does in each: it could add up whole gradients first, which is what sharding them saves.
        """
        if isinstance(module, nn.parallel.DistributedDataParallel) and not last:
            return module.no_sync()
        return nullcontext()


class Weights:
    """A model's parameters as the optimizer sees them: themselves or, sharded, this process's rows of them.

    An optimizer works element by element, so it may as well work on plain tensors, the shards, which share memory with
    the model's: no dispatch of DTensors, and any optimizer will do. Under FSDP2 each process has its shards only; under
    ZeRO-1 it has all, updates its shards, and gets the others' after the step.

    Names are those of the whole model, also where this process has some blocks of it only.

    Attributes:
        named: name -> what the optimizer updates.
        names: name in the model's own state -> name in the whole model.
        shapes: of all tensors of the whole model's state.
        sharded: whether these are shards.
        mesh: the processes of ZeRO-1; None without it.
        stages: the processes that have the other stages of a pipeline; None without one.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh | None = None, stages: DeviceMesh | None = None) -> None:
        self.model, self.mesh, self.stages = model, mesh, stages
        own = model.state_dict(keep_vars=True)
        self.names = {name: name for name in own}
        self.shapes: dict[str, torch.Size] = {name: x.shape for name, x in own.items()}
        if isinstance(model, Stage | Stages):
            self.names, self.shapes = model.whole_names(), model.shapes
        self.orders: dict[str, Tensor] = model.dealt if isinstance(model, Stage | Stages | Transformer) else {}
        self.originals = {self.names[name]: p for name, p in model.named_parameters() if p.requires_grad}
        self.sharded = mesh is not None or any(isinstance(p, DTensor) for p in self.originals.values())
        self.named = {
            name: nn.Parameter(self.shard(name, p.detach())) if self.sharded else p
            for name, p in self.originals.items()
        }

    def gather_gradients(self) -> None:
        """Hand the shards their part of the gradients; nothing to do without shards."""
        if self.sharded:
            for name, p in self.originals.items():
                self.named[name].grad = None if p.grad is None else self.shard(name, placed_as(p.grad, p))
                p.grad = None
            self.average_experts()

    def average_experts(self) -> None:
        """Experts beside DDP have all processes' tokens in their gradients: a sum, to be the mean that DDP makes.

        `fully_shard` has divided it (`trainer.parallel.expert.shard_experts`), on a mesh of two dimensions.
        """
        for name, p in self.originals.items():
            mesh, grad = p.device_mesh if isinstance(p, DTensor) else None, self.named[name].grad
            if mesh is not None and mesh.mesh_dim_names == ("expert",) and grad is not None:
                grad.div_(mesh.size())

    def shard(self, name: str, x: Tensor) -> Tensor:
        """This process's rows of a parameter `name` or of a tensor of its shape: a DTensor's own, else a view."""
        if isinstance(x, DTensor):
            return x.to_local()
        mesh = self.mesh or shard_mesh(self.originals[name])
        return x if mesh is None else rows(x, mesh.size(), mesh.get_local_rank())

    def spread(self) -> None:
        """After ZeRO-1's step: give every process all others' rows, in place."""
        if self.mesh is not None:
            for p in self.originals.values():
                for rank in range(self.mesh.size()):
                    part = rows(p.detach(), self.mesh.size(), rank)
                    if part.numel():
                        dist.broadcast(part, rank)

    def clip(self, max_norm: float, eps: float = 1e-6) -> Tensor:
        """`gradient_clipping` by the norm of the whole gradients; returns that norm, a scalar."""
        if not self.sharded and self.stages is None:
            return gradient_clipping(self.originals.values(), max_norm, eps)
        having = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        gradients = list(having.values())
        shared = {name: mesh for name in having if (mesh := part_mesh(self.originals[name])) is not None}
        if any(self.meshes()):  # whose processes are those that have the other experts
            shared = {name: mesh for name, mesh in shared.items() if "expert" not in (mesh.mesh_dim_names or ())}
        squares: Tensor | None = None
        if shared:  # summed over those that share the matrices; all of them have the same of what is whole
            squares = squared([having[name] for name in shared])
            dist.all_reduce(squares, group=next(iter(shared.values())).get_group())
        whole = [gradient for name, gradient in having.items() if name not in shared]
        if whole:
            squares = squared(whole) if squares is None else squares + squared(whole)
        assert squares is not None
        for mesh in self.meshes():
            dist.all_reduce(squares, group=mesh.get_group())
        norm = squares.sqrt()
        factor = torch.where(norm.isfinite(), (max_norm / (norm + eps)).clamp(max=1.0), 1.0)
        torch._foreach_mul_(gradients, factor)  # what torch.nn.utils.clip_grad_norm_ calls
        return norm

    def meshes(self) -> Iterable[DeviceMesh]:
        """The processes that have other rows, or other blocks."""
        rows = (self.mesh, *(shard_mesh(p) for p in self.originals.values()))
        return [mesh for mesh in (next(filter(None, rows), None), self.stages) if mesh is not None]

    def clear_gradients(self) -> None:
        """Drop all gradients, so that the next backward writes instead of adding."""
        for p in (*self.originals.values(), *self.named.values()):
            p.grad = None

    def whole(self, name: str, shard: Tensor) -> Tensor:
        """`shard`, of this process's shape, as the part of a tensor of the parameter's whole shape that it is."""
        original = self.originals[name]
        mesh = original.device_mesh if isinstance(original, DTensor) else self.mesh
        if mesh is None:
            return shard
        placed = original.placements if isinstance(original, DTensor) else [Shard(0)]
        return DTensor.from_local(shard, mesh, placed, run_check=False, shape=original.shape, stride=original.stride())

    def state(self) -> dict[str, Tensor]:
        """The model's tensors, by their names in the whole model."""
        return {self.names[name]: x for name, x in self.model.state_dict().items()}

    def in_order(self, name: str, x: Tensor) -> Tensor:
        """`x`, laid out as the parameter `name`, with its rows as one process has them: what a checkpoint holds.

        Tensor parallelism deals out the rows of matrices in one (`trainer.parallel.tensor.deal`). All processes that
        share it call this.
        """
        if name not in self.orders or not isinstance(x, DTensor):
            return x
        dealt = x.full_tensor()
        whole = torch.empty_like(dealt)
        whole[self.orders[name]] = dealt
        placed = [placement if placement.is_replicate() else Shard(0) for placement in x.placements]
        return distribute_tensor(whole, x.device_mesh, placed, src_data_rank=None)

    def take(self, name: str, own: Tensor, x: Tensor) -> None:
        """Copy into `own`, laid out as the parameter `name`, a tensor of its whole shape with rows in order."""
        x = x.full_tensor() if isinstance(x, DTensor) else x
        local(own).copy_(piece(self.dealt(name, x), own))

    def dealt(self, name: str, whole: Tensor) -> Tensor:
        """`whole`, of a checkpoint, with its rows as tensor parallelism deals them out."""
        return whole[self.orders[name]] if name in self.orders else whole


def policy(plan: Plan) -> MixedPrecisionPolicy | None:
    """In which dtypes `fully_shard` gathers parameters and sums gradients; None for those that they have."""
    if plan.precision != "bf16-fsdp":
        return None
    summed = torch.float32 if plan.reduce_dtype == "fp32" else torch.bfloat16
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=summed)


def end_process(status: int) -> NoReturn:
    """End this process; one of several without Python's own tidying up.

    DTensor's caches keep a mesh, and so gloo's threads, to the end; one of these that lets go of a collective's tensor
    while the interpreter is taken down is ended by it inside C++ code, which aborts the process after all its work is
    done ("terminate called without an active exception"), and torchrun then reports a failed run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def shard_mesh(x: Tensor) -> DeviceMesh | None:
    """The processes that share the rows of a DTensor, as `fully_shard` cuts it; None of other tensors."""
    if not isinstance(x, DTensor) or x.device_mesh.mesh_dim_names in (("tensor",), ("expert",)):
        return None
    return x.device_mesh["data"] if x.device_mesh.ndim > 1 else x.device_mesh


def leave_out(model: nn.Module, names: Sequence[str]) -> None:
    """Have DDP leave these parameters alone; it has no public way."""
    leave = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model  # noqa: SLF001
    leave(model, list(names))  # type: ignore[no-untyped-call]  # torch leaves it untyped


def part_mesh(x: Tensor) -> DeviceMesh | None:
    """The processes that have other columns of a matrix that tensor parallelism cuts, or other experts; else None."""
    names = (isinstance(x, DTensor) and x.device_mesh.mesh_dim_names) or ()
    if not isinstance(x, DTensor):
        return None
    for axis in ("tensor", "expert"):
        if axis in names and not x.placements[names.index(axis)].is_replicate():
            return x.device_mesh[axis]
    return None


def placed_as(x: Tensor, like: Tensor) -> Tensor:
    """`x`, the gradient of `like`, laid out over the processes as that is.

    Those of weights that each process uses for other heads or other tokens are parts of a sum (`Partial`); of a table
    of which each has some rows every process makes the whole gradient.
    """
    if not isinstance(x, DTensor) or not isinstance(like, DTensor) or x.placements == like.placements:
        return x
    return x.redistribute(placements=like.placements)


def squared(gradients: Iterable[Tensor]) -> Tensor:
    """The square of the norm of all of them."""
    return torch.stack([torch.linalg.vector_norm(g) for g in gradients]).square().sum()


def local(x: Tensor) -> Tensor:
    """This process's shard of a DTensor, sharing its memory; other tensors as they are."""
    return x.to_local() if isinstance(x, DTensor) else x


def rows(x: Tensor, size: int, rank: int, dim: int = 0) -> Tensor:
    """The rows of x that are the `rank`-th of `size` processes', as Shard(dim), FSDP2's placement, cuts: a view.

    That is as torch.chunk does; with fewer chunks than processes the last ones are empty.
    """
    chunks = x.chunk(size, dim)
    return chunks[rank] if rank < len(chunks) else x.narrow(dim, 0, 0)


def piece(value: Tensor, like: Tensor) -> Tensor:
    """The part of the whole tensor `value` that this process holds if it is laid out as the parameter `like`.

    What tensor or expert parallelism leaves to a process, `fully_shard` cuts by rows.
    """
    if not isinstance(like, DTensor):
        return value
    mesh, names = like.device_mesh, like.device_mesh.mesh_dim_names or ()
    for axis in ("tensor", "expert"):
        if axis in names and isinstance(placed := like.placements[names.index(axis)], Shard):
            value = rows(value, mesh[axis].size(), mesh[axis].get_local_rank(), placed.dim)
    shards = shard_mesh(like)
    return value if shards is None else rows(value, shards.size(), shards.get_local_rank())
