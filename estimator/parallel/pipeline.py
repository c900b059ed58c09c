"""A stage of a pipeline, as torch.distributed.pipelining runs it: what it receives, keeps, and sends.

The statements and names are those of `ScheduleGPipe._step_microbatches`, `Schedule1F1B._step_microbatches` and
`PipelineStage` in torch/distributed/pipelining: what lives how long follows from them. A send holds what it sends until
nobody holds the send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from estimator.describe.pipeline import ALIKE
from estimator.describe.schedules import BACKWARD, FORWARD, Part
from estimator.eager.autograd import backward
from estimator.eager.ledger import Category, Event, Phase, Storage
from estimator.eager.letters import letter
from estimator.eager.tensor import Locals, Tensor
from estimator.parallel.data import HELD
from estimator.parallel.placement import PIPELINE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.eager.ledger import Ledger
    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype, Machine, Shape


FILLED = 2  # backwards, after which come those that the executed ones stand for
MIDDLE = 1  # of those that a stage runs ahead, the micro-batch that stands for others
MICRO_BATCHES = letter("M", "micro-batches of a step, which go through the stages of a pipeline")
IN_FLIGHT = letter("w", "forwards that a stage runs before its first backward", ALIKE)


class Others:
    """What the micro-batches that one stands for leave: as many copies of what it leaves.

    The peak changes by the same amount from one of them to the next, so that those before and after tell it all.
    """

    def __init__(self, ledger: Ledger, count: Size) -> None:
        self.ledger, self.count = ledger, count
        self.copies: dict[Storage, Storage] = {}
        self.start = self.end = 0

    def begin(self) -> None:
        """The forward or the backward of the one begins."""
        self.start = len(self.ledger.events)

    def over(self) -> None:
        """It is over."""
        self.end = len(self.ledger.events)

    def keep(self) -> None:
        """The next one is over: what the one has made and is still there, is there of all, from its end on."""
        made = [e for e in self.ledger.events[self.start : self.end] if e.sign > 0 and e.storage.owners]
        events = [Event(1, self._copy(e.storage), e.where, e.micro_batch) for e in made]
        self.ledger.events[self.end : self.end] = events

    def let_go(self) -> None:
        """The next backward is over: what of the forward is gone by the end of this one, is gone of all."""
        self._free(self.ledger.events[: self.end], self.end)

    def finish(self) -> None:
        """The step is over, and nothing left."""
        self._free(self.ledger.events, len(self.ledger.events))

    def _copy(self, x: Storage) -> Storage:
        self.copies[x] = Storage(x.nbytes * self.count, x.itemsize, x.category, x.where, copies=self.count)
        return self.copies[x]

    def _free(self, events: Sequence[Event], at: int) -> None:
        gone = [e for e in events if e.sign < 0 and e.storage in self.copies]
        self.ledger.events[at:at] = [Event(-1, self.copies.pop(e.storage), e.where, e.micro_batch) for e in gone]


class Stage:
    """The blocks of one process, and the micro-batches that it has in flight.

    Attributes:
        micro_batches, ahead: those that are executed, and before the first backward.
        others: what those are that the middle one of `ahead` stands for; None where there are none.
        skipped: micro-batches that are not executed.
        received: the buffer of each micro-batch that the stage before sends into; none in the first stage.
        gradients: the same of what the stage after sends back; none in the last one.
        cache: of each micro-batch in flight, what came out (`fwd_cache`).
        losses: the last stage's, until the step is over (`_internal_losses`).
    """

    def __init__(
        self,
        machine: Machine,
        place: tuple[int, int],
        micro_batches: int,
        ahead: int,
        shape: Shape,
        dtype: Dtype,
        run: Callable[[Tensor], Tensor],
        inputs: Tensor | None,
        loss: Callable[[Tensor], Tensor],
        reduce: Callable[[], None],
    ) -> None:
        self.machine, self.run, self.inputs, self.loss, self.reduce = machine, run, inputs, loss, reduce
        self.index, self.stages = place
        self.micro_batches, self.ahead = micro_batches, ahead
        self.skipped = MICRO_BATCHES - micro_batches
        self.others = Others(machine.ledger, IN_FLIGHT - ALIKE) if ahead == ALIKE else None
        self.last = self.index == self.stages - 1
        with machine.ledger.inside("pipeline"):
            self.received = self._buffers(shape, dtype) if self.index else []
            self.gradients = [] if self.last else self._buffers(shape, dtype)
        for x in self.received:
            x.requires_grad = True
        self.cache: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        self.unseen: Storage | None = None  # losses of micro-batches that are not executed

    def _buffers(self, shape: Shape, dtype: Dtype) -> list[Tensor]:
        """One for each micro-batch of the step."""
        self.machine.ledger.allocate(self.machine.product(shape), dtype.itemsize, HELD, self.skipped)
        return [self.machine.empty(shape, dtype, category=HELD).hold() for _ in range(self.micro_batches)]

    def begins(self, i: int, middle: int) -> None:
        """The forward or backward `i` begins, of which the one numbered `middle` stands for others."""
        if self.others is not None and i == middle:
            self.others.begin()

    def ends(self, i: int, middle: int, then: Callable[[Others], None]) -> None:
        """It is over; `then` is what the end of the next one tells."""
        if self.others is not None and i == middle:
            self.others.over()
        if self.others is not None and i == middle + 1:
            then(self.others)

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
        if self.last and self.others is None:
            like, ledger = self.losses[0], self.machine.ledger
            with ledger.inside("loss"):
                self.unseen = ledger.allocate(like.numel, like.dtype.itemsize, Category.TEMPORARY, self.skipped)

    def sent_by_others(self) -> list[Storage]:
        """What the micro-batches that are not executed send on and back, where all sends are held."""
        ledger, buffers = self.machine.ledger, (self.gradients, self.received)  # as large as what goes the other way
        with ledger.inside("pipeline"):
            return [
                ledger.allocate(each[0].numel, each[0].dtype.itemsize, HELD, self.skipped) for each in buffers if each
            ]

    def end(self) -> None:
        """`_update_losses` and `perform_reduce_grad`."""
        for loss in self.losses:
            loss.drop()
        self.losses.clear()
        if self.unseen is not None:
            self.machine.ledger.free(self.unseen)
        self.reduce()


def gpipe(stage: Stage) -> None:
    """`ScheduleGPipe`: all forwards, then all backwards; every send is held until the end."""
    sends: list[Tensor] = []
    with Locals() as v:
        for i in range(stage.micro_batches):
            stage.begins(i, MIDDLE)
            stage.forward(v, i)
            _keep(sends, stage.sent(i))
            stage.take_loss(v)
            stage.ends(i, MIDDLE, Others.keep)
        for i in range(stage.micro_batches):
            stage.begins(i, MIDDLE)
            _keep(sends, stage.backward(i))
            stage.ends(i, MIDDLE, _gone_and_kept)
        stage.end()
        for x in sends:
            x.drop()
    if stage.others is not None:
        stage.others.finish()


def _gone_and_kept(others: Others) -> None:
    others.let_go()
    others.keep()


def _keep(sends: list[Tensor], x: Tensor | None) -> None:
    if x is not None:
        sends.append(x.hold())


def one_forward_one_backward(stage: Stage) -> None:
    """`Schedule1F1B`: as many forwards ahead as there are stages after this one, then a backward for each forward."""
    warm_up = stage.ahead
    forwards = backwards = 0
    with Locals() as v:
        v.send_work = None
        for _ in range(warm_up):
            stage.begins(forwards, MIDDLE)
            stage.forward(v, forwards)
            v.fwd_sends = stage.sent(forwards)
            if forwards != warm_up - 1:
                v.send_work = v.fwd_sends
            stage.take_loss(v)
            stage.ends(forwards, MIDDLE, Others.keep)
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
        middle = backwards
        while backwards < stage.micro_batches:
            stage.begins(backwards, middle)
            v.bwd_sends = stage.backward(backwards)
            v.send_work = v.bwd_sends
            stage.ends(backwards, middle, Others.let_go)
            backwards += 1
        stage.end()
    if stage.others is not None:
        stage.others.finish()


def interleaved(parts: Sequence[Stage], moves: Sequence[Part]) -> None:
    """`_PipelineScheduleRuntime._step_microbatches` of `ScheduleInterleaved1F1B`: every send is held until the end.

    Micro-batches that are not executed come where the first group has gone back through all parts, and leave their
    sends.
    """
    group = next(i for i, move in enumerate(moves) if move.part)
    skip_after = 1 + moves.index(Part(BACKWARD, group - 1, 0))
    sends: list[Tensor] = []
    unseen: list[Storage] = []
    for at, move in enumerate(moves):
        if at == skip_after:
            for part in parts:
                unseen += part.sent_by_others()
                part.skip()
        part = parts[move.part]
        with Locals() as v:
            if move.kind == FORWARD:
                part.forward(v, move.micro_batch)
                part.take_loss(v)
        _keep(sends, part.sent(move.micro_batch) if move.kind == FORWARD else part.backward(move.micro_batch))
    for x in sends:
        x.drop()
    for storage in unseen:
        parts[0].machine.ledger.free(storage)
    for part in parts:
        part.end()


SCHEDULES: dict[str, Callable[[Stage], None]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}
