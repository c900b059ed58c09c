"""A stage of a pipeline, as torch.distributed.pipelining runs it: what it receives, keeps, and sends.

The statements and names are those of `ScheduleGPipe._step_microbatches`, `Schedule1F1B._step_microbatches` and
`PipelineStage` in torch/distributed/pipelining: what lives how long follows from them. A send holds what it sends until
nobody holds the send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.eager.autograd import backward
from estimator.eager.ledger import Phase
from estimator.eager.tensor import Locals, Tensor
from estimator.parallel.data import HELD
from estimator.parallel.placement import PIPELINE

if TYPE_CHECKING:
    from collections.abc import Callable

    from estimator.eager.tensor import Machine, Shape


FILLED = 2  # micro-batches, after which come those that the executed ones stand for


class Stage:
    """The blocks of one process, and the micro-batches that it has in flight.

    Attributes:
        micro_batches: those that are executed; there are buffers for all of the step's.
        received: the buffer of each micro-batch that the stage before sends into; none in the first stage.
        gradients: the same of what the stage after sends back; none in the last one.
        cache: of each micro-batch in flight, what came out (`fwd_cache`).
        losses: the last stage's, until the step is over (`_internal_losses`).
    """

    def __init__(
        self,
        machine: Machine,
        place: tuple[int, int],
        micro_batches: tuple[int, int],
        shape: Shape,
        run: Callable[[Tensor], Tensor],
        inputs: Tensor | None,
        loss: Callable[[Tensor], Tensor],
    ) -> None:
        self.machine, self.run, self.inputs, self.loss = machine, run, inputs, loss
        self.index, self.stages = place
        self.micro_batches, room = micro_batches
        self.skipped = room - self.micro_batches
        self.last = self.index == self.stages - 1
        buffers = range(room)
        with machine.ledger.inside("pipeline"):
            self.received = [self._buffer(shape) for _ in buffers] if self.index else []
            self.gradients = [] if self.last else [self._buffer(shape) for _ in buffers]
        for x in self.received:
            x.requires_grad = True
        self.cache: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        self.others: list[Tensor] = []  # losses of micro-batches that are not executed

    def _buffer(self, shape: Shape) -> Tensor:
        return self.machine.empty(shape, self.machine.dtype, category=HELD).hold()

    def forward(self, v: Locals, i: int) -> None:
        """`output = forward_one_chunk(i)`."""
        ledger = self.machine.ledger
        ledger.phase, ledger.micro_batch = Phase.FORWARD, i
        x = self.received[i] if self.index else self.inputs
        assert x is not None
        output = self.run(x).hold()
        self.cache[i] = output
        v.output = output
        if i == 0:
            ledger.saved = [storage for storage in ledger.saved if storage.owners]

    def take_loss(self, v: Locals) -> None:
        """`_maybe_compute_loss`."""
        if self.last:
            self.losses.append(self.loss(v.output))

    def sent(self, i: int) -> Tensor | None:
        """`get_fwd_send_ops`: what came out, detached."""
        if self.last:
            return None
        ledger = self.machine.ledger
        with ledger.at("pipeline", None, "send"):
            self.machine.collective("send", PIPELINE, self.cache[i], waits="step")
        return self.cache[i].alias()

    def backward(self, i: int) -> Tensor | None:
        """`backward_one_chunk` and `get_bwd_send_ops`: the gradient of what came in, to be sent."""
        ledger = self.machine.ledger
        ledger.phase, ledger.micro_batch = Phase.BACKWARD, i
        output = self.cache.pop(i)
        if self.last:
            backward(self.losses[i])
        else:
            backward(output, self.gradients[i])
        output.drop()
        if self.index == 0:
            return None
        gradient, self.received[i].grad = self.received[i].grad, None
        assert gradient is not None
        with ledger.at("pipeline", None, "send"):
            self.machine.collective("send", PIPELINE, gradient, waits="step")
        gradient.owners -= 1
        return gradient

    def skip(self) -> None:
        """The micro-batches that others stand for leave their losses."""
        like = self.losses[0] if self.last else None
        if like is not None:
            self.others += [self.machine.empty(like.shape, like.dtype).hold() for _ in range(self.skipped)]

    def end(self) -> None:
        """`_update_losses`."""
        for loss in (*self.losses, *self.others):
            loss.drop()
        self.losses.clear()
        self.others.clear()


def gpipe(stage: Stage) -> None:
    """`ScheduleGPipe`: all forwards, then all backwards; every send is held until the end."""
    sends: list[Tensor] = []
    with Locals() as v:
        for i in range(stage.micro_batches):
            stage.forward(v, i)
            _keep(sends, stage.sent(i))
            stage.take_loss(v)
        for i in range(stage.micro_batches):
            _keep(sends, stage.backward(i))
        stage.end()
        for x in sends:
            x.drop()


def _keep(sends: list[Tensor], x: Tensor | None) -> None:
    if x is not None:
        sends.append(x.hold())


def one_forward_one_backward(stage: Stage) -> None:
    """`Schedule1F1B`: as many forwards ahead as there are stages after this one, then a backward for each forward."""
    warm_up = min(stage.micro_batches, stage.stages - stage.index)
    forwards = backwards = 0
    with Locals() as v:
        v.send_work = None
        for _ in range(warm_up):
            stage.forward(v, forwards)
            v.fwd_sends = stage.sent(forwards)
            if forwards != warm_up - 1:
                v.send_work = v.fwd_sends
            stage.take_loss(v)
            forwards += 1
        while True:
            v.bwd_sends = stage.backward(backwards)
            backwards += 1
            if backwards == FILLED:
                stage.skip()
            if forwards == stage.micro_batches:
                break
            stage.forward(v, forwards)
            stage.take_loss(v)
            v.fwd_sends = stage.sent(forwards)
            forwards += 1
        v.send_work = v.bwd_sends
        while backwards < stage.micro_batches:
            v.bwd_sends = stage.backward(backwards)
            v.send_work = v.bwd_sends
            backwards += 1
        stage.end()


SCHEDULES: dict[str, Callable[[Stage], None]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
