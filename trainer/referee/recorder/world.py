"""One rank of a world whose other ranks are not there: collectives allocate what a backend's do, and send nothing.

PyTorch's own fake process group allocates nothing, and its answer is none that DDP's reducer takes. Here a tensor of
the CPU is treated by the statements of gloo (torch/csrc/distributed/c10d/ProcessGroupGloo.cpp): what it copies is
copied. A tensor of CUDA is NCCL's, which sends from and receives into the tensors that it is given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.futures import Future

from estimator.describe.checks import ConfigError
from trainer.referee.recorder.extension import extension
from trainer.referee.recorder.log import Mark, Sent

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

NAME = "one_rank"  # of the backend
SENT: list[Sent] = []  # in the recording that is running; the log has their places here
c10d: Any = torch._C._distributed_c10d  # noqa: SLF001 - what torch's stubs have half of


def one_rank(ranks: int, rank: int = 0) -> None:
    """Be `rank` of so many, as `init_process_group` would: DTensor's layouts, `fully_shard` and DDP are built on it.

    Raises:
        ConfigError: fewer than one rank, or a rank that is not among them.
    """
    if ranks < 1:
        raise ConfigError(f"fake_world = {ranks}: must be 1 or more")
    if not 0 <= rank < ranks:
        raise ConfigError(f"fake_rank = {rank}: must be from 0 to {ranks - 1}, the ranks of fake_world = {ranks}")
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, _create, devices=["cpu", "cuda"])
    dist.init_process_group(NAME, store=c10d.HashStore(), rank=rank, world_size=ranks)


def _done(result: Any) -> dist.Work:
    """Work that is over, and holds `result` until it is let go; DDP takes the sums from its future."""
    future: Future[Any] = Future()
    future.set_result(result)
    work: dist.Work = c10d._create_work_from_future(future)  # noqa: SLF001 - as PyTorch's own groups in Python do
    return work


def _receive(into: Tensor, own: Tensor, kind: str) -> None:
    """What others send is not known; of whole numbers, which may be read, it is taken to be what this rank sends."""
    _forget(into, kind)
    if not own.is_floating_point():
        into.copy_(own.view_as(into))


def _forget(x: Tensor, kind: str) -> None:
    """Whole numbers stay what they are."""
    if x.is_floating_point():
        extension().forget(x.untyped_storage()._cdata, kind)  # noqa: SLF001 - the storage's identity


def told(outputs: Sequence[Tensor]) -> None:
    """The flight recorder is shown a tensor like what a gather will have given, made for it (`getOutputTensors`)."""
    outputs[0].new_empty((len(outputs), *outputs[0].shape))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """`flattenDenseTensors`: of one a view."""
    return tensors[0].contiguous().view(-1) if len(tensors) == 1 else torch.cat([x.reshape(-1) for x in tensors])


class Collectives:
    """What PyTorch asks a process group for."""

    rank: Callable[[], int]  # of `ProcessGroup`
    size: Callable[[], int]
    group_desc: str

    @property
    def group_name(self) -> str:
        """The name under which PyTorch has registered it."""
        names: Any = dist.distributed_c10d._world.pg_names  # noqa: SLF001 - as PyTorch's own groups in Python do
        return str(names[self])

    def getBackendName(self) -> str:
        """What it is called."""
        return NAME

    def _sends(self, kind: str, tensors: Sequence[Tensor]) -> None:
        """A message of these tensors, as the ledger counts it: what a gather gives, what a reduction takes."""
        if self.size() > 1:
            nbytes = sum(x.nbytes for x in tensors)
            SENT.append(Sent(kind, nbytes, tensors[0].dtype, self.group_desc.removeprefix("mesh_"), self.size()))
            extension().mark(Mark.MESSAGE, len(SENT) - 1, 0)

    def _reduce(self, x: Tensor, options: Any) -> None:
        """In place; gloo has no mean, and divides the sum by a number."""
        if x.is_cpu and options.reduceOp == c10d.ReduceOp.RedOpType.AVG:
            with torch.no_grad():
                x.div_(self.size())

    def allreduce(self, tensors: list[Tensor], options: Any) -> dist.Work:
        """`AsyncAllreduceWork`."""
        self._sends("all-reduce", tensors)
        for x in tensors:
            self._reduce(x, options)
            _forget(x, "all_reduce")
        return _done(tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], _: Any = None) -> dist.Work:
        """`AsyncAllreduceCoalescedWork`: through one flat tensor."""
        self._sends("all-reduce", tensors)
        with torch.no_grad():
            if tensors[0].is_cpu:
                flat = _flat(tensors)
                for x, part in zip(tensors, torch.split(flat, [x.numel() for x in tensors]), strict=True):
                    x.copy_(part.view_as(x))
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], _: Any = None) -> dist.Work:
        """In place."""
        self._sends("broadcast", tensors)
        for x in tensors:
            _forget(x, "broadcast")
        return _done(tensors)

    def reduce(self, tensors: list[Tensor], _: Any = None) -> dist.Work:
        """In place."""
        self._sends("reduce", tensors)
        return _done(tensors)

    def barrier(self, _: Any = None) -> dist.Work:
        """Nothing is waited for."""
        return _done([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """`AsyncAllgatherWork`."""
        self._sends("all-gather", outputs[0])
        self._gather(outputs[0], inputs)
        return _done((outputs, inputs))

    def _gather(self, outputs: list[Tensor], inputs: list[Tensor]) -> None:
        """gloo receives into one flat tensor of its own, and copies what came out of it."""
        with torch.no_grad():
            if inputs[0].is_cpu:
                told(outputs)
                own = _flat(inputs)
                received = own.new_empty((len(outputs), *outputs[0].shape))
                for x, part in zip(outputs, received, strict=True):
                    _receive(part, own, "all_gather")
                    x.copy_(part)
            else:
                for x in outputs:
                    _receive(x, inputs[0], "all_gather")

    def all_gather_single(self, output: Tensor, own: Tensor, _: Any = None) -> dist.Work:
        """`_allgather_base`: of the parts of one tensor."""
        self._sends("all-gather", [output])
        self._gather(list(output.detach().chunk(self.size())), [own])
        return _done((output, own))

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], _: Any = None) -> dist.Work:
        """`AsyncAllgatherCoalescedWork`: all of them in one flat tensor, and what all send in another."""
        self._sends("all-gather", outputs)
        with torch.no_grad():
            if inputs[0].is_cpu:
                told([x.chunk(self.size())[0] for x in outputs])
                own = _flat(inputs)
                received = own.new_empty(own.numel() * self.size())
                _forget(received, "all_gather")
                parts = torch.split(received, [x.numel() for x in outputs])
                for x, part in zip(outputs, parts, strict=True):
                    x.copy_(part.view_as(x))
            for x in outputs:
                _forget(x, "all_gather")
        return _done((outputs, inputs))

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, options: Any) -> dist.Work:
        """`_reduce_scatter_base`."""
        return self.reduce_scatter_single_coalesced([output], [whole], options)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> dist.Work:
        """`reduce_scatter_tensor_coalesced`: gloo reduces all of it in a copy, and takes this rank's part of that."""
        self._sends("reduce-scatter", inputs)
        if not inputs[0].is_cpu:
            for x in outputs:
                _forget(x, "reduce_scatter")
            return _done((outputs, inputs))
        with torch.no_grad():
            copies = [x.clone() for x in inputs]
            for output, copy in zip(outputs, copies, strict=True):
                self._reduce(copy, options)
                _forget(copy, "reduce_scatter")
                output.copy_(copy.chunk(self.size())[self.rank()])
        return _done((outputs, copies))

    def all_to_all_single(self, output: Tensor, own: Tensor, *_: Any) -> dist.Work:
        """gloo receives straight into it; each rank sends here as many whole numbers as this one sends to itself."""
        self._sends("all-to-all", [max(output, own, key=lambda x: x.nbytes)])
        _forget(output, "all_to_all")
        if not own.is_floating_point() and output.shape == own.shape:
            for part in output.chunk(self.size()):
                part.copy_(own.chunk(self.size())[self.rank()])
        return _done((output, own))

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], *_: Any) -> dist.Work:
        """Likewise."""
        self._sends("all-to-all", max(outputs, inputs, key=lambda those: sum(x.nbytes for x in those)))
        for x in outputs:
            _forget(x, "all_to_all")
        return _done((outputs, inputs))

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], *_: Any) -> dist.Work:
        """From and to where they lie."""
        self._sends("scatter", inputs[0] if inputs else outputs)
        with torch.no_grad():
            for x in inputs[:1]:
                _receive(outputs[0], x[self.rank()], "scatter")
        return _done(outputs)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any) -> dist.Work:
        """`AsyncGatherWork`: where they come to, through one flat tensor."""
        self._sends("gather", outputs[0] if outputs else inputs)
        if outputs:
            self._gather(outputs[0], inputs)
        return _done((outputs, inputs))

    def send(self, tensors: list[Tensor], *_: Any) -> dist.Work:
        """From where it lies."""
        self._sends("send", tensors)
        return _done(tensors)

    def recv(self, tensors: list[Tensor], *_: Any) -> dist.Work:
        """To where it will lie.

        Raises:
            ConfigError: it is whole numbers: a stage of a pipeline asks another for shapes.
        """
        for x in tensors:
            if not x.is_floating_point():
                raise ConfigError(
                    "recv: another rank would send whole numbers, such as a pipeline's shapes; it is not there"
                )
            _forget(x, "recv")
        return _done(tensors)

    # Names before 2.12.
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single


Alone: Any = type("Alone", (Collectives, dist.ProcessGroup), {})  # torch's stubs have other signatures


def _create(_: Any, rank: int, ranks: int, __: Any) -> Any:
    """As `register_backend` has it."""
    return Alone(rank, ranks)
