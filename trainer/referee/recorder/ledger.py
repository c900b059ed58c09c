"""From the log of a step to the project's own ledger: each storage with its phase, module, operator and category."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from estimator.eager.ledger import Category, Event, Ledger, Message, Phase, Storage, Where
from estimator.eager.letters import ONE, Size, constant
from trainer.referee.recorder.kernels import Turn, kernel_of
from trainer.referee.recorder.log import ENGINE, LEFT_OUT, NODE, RUN, Kind, Mark
from trainer.referee.recorder.scratch import scratch_of, turns_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from trainer.referee.recorder.log import Log, Sent


@cache
def size(nbytes: int) -> Size:
    """So many bytes, as the ledger has them."""
    return constant(nbytes)


@dataclass
class Known:
    """What is known of storages that are alive before the step.

    Attributes:
        storages: of each, its bytes, what it is for and the module that has it.
        parameters: names of the parameters, in the order of their numbers.
        modules: names of the modules, in the order of their numbers.
    """

    storages: Mapping[int, tuple[int, Category, str]]
    parameters: Sequence[str]
    modules: Sequence[str]


@dataclass
class Reading:
    """A ledger, and the line of source of each of its events.

    Attributes:
        ledger: the project's.
        lines: of each event, the index of its line in the log, or -1.
        numbers: of each event, the number of its storage in the log; 0 of a kernel's scratch.
        checkpoints: how often backward has run modules again.
    """

    ledger: Ledger = field(default_factory=Ledger)
    lines: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    checkpoints: int = 0


@dataclass
class _Running:
    """An operator that has begun: its name, what it is, what its kernel has for itself, and if it calls itself."""

    name: str
    kind: int
    scratch: Sequence[Storage] = ()
    inputs: Sequence[Any] | None = None
    again: bool = False


class Reader:
    """Walks a log from the step's first row.

    Args:
        log: the whole log.
        known: what was alive before.
        device: "cpu" or "cuda": whose rules.
        threads: PyTorch's CPU threads.
        saved: storages that autograd keeps for backward, by their position among the step's allocations.
        kernels: whether the ledger gets the kernels, too.
    """

    def __init__(
        self, log: Log, known: Known, device: str, threads: int, saved: Iterable[int] = (), *, kernels: bool = True
    ) -> None:
        self.kernels = kernels
        self.log, self.known, self.device, self.threads = log, known, device, threads
        self.saved = frozenset(saved)
        self.reading = Reading()
        self.ledger = self.reading.ledger
        self.live: dict[int, Storage] = {}
        self.line = -1
        self.phase, self.updating = Phase.FORWARD, False
        self.modules: list[str] = []
        self.running: list[_Running] = []
        self.nodes: list[tuple[str, int]] = []  # where in forward each node that runs was made
        self.made: dict[int, tuple[str, int]] = {}  # by sequence number, (module, line) of what made the node
        self.pending: list[int] = []  # events between a backward and what tells whether the update has begun
        self.pending_kernels: list[int] = []  # likewise
        self.pending_messages: list[int] = []  # likewise
        self.allocations = 0

    def read(self, first: int) -> Reading:
        """The ledger of the rows from `first` on."""
        for number, (nbytes, category, module) in self.known.storages.items():
            if nbytes and self._counted(number):
                storage = Storage(size(nbytes), 1, category, Where(Phase.SETUP, module, None, ""))
                self.live[number] = storage
                self._event(1, storage, storage.where, number)
        act = {
            Kind.ALLOCATED: self._allocated,
            Kind.FREED: self._freed,
            Kind.BEGUN: self._begun,
            Kind.ENDED: self._ended,
            Kind.MARKED: self._marked,
        }
        rows = self.log.rows
        for i in range(first, len(rows)):
            act[Kind(rows[i][0])](rows[i])
        return self.reading

    def _counted(self, number: int) -> bool:
        return number > 0

    def _event(self, sign: int, storage: Storage, where: Where, number: int) -> None:
        if not storage.nbytes:
            return
        if self.phase is Phase.OPTIMIZER and not self.updating:
            self.pending.append(len(self.ledger.events))
        self.ledger.events.append(Event(sign, storage, where, self.ledger.micro_batch))
        self.reading.lines.append(self.line)
        self.reading.numbers.append(number)

    @property
    def _here(self) -> Where:
        module = self.modules[-1] if self.modules else ""
        if self.nodes and not self.modules:
            module = self.nodes[-1][0]
        op = ""
        for running in reversed(self.running):
            if running.kind in (RUN, LEFT_OUT) or not op:
                op = running.name
            if running.kind in (RUN, LEFT_OUT):
                break
        return Where(self.phase, module, None, op.removeprefix("aten::").split(".")[0].removeprefix(ENGINE))

    def _allocated(self, row: tuple[int, ...]) -> None:
        _, number, nbytes, *_ = row
        ordinal = self.allocations
        self.allocations += 1
        category = Category.ACTIVATION if ordinal in self.saved else Category.TEMPORARY
        storage = Storage(size(nbytes), 1, category, self._here)
        self.live[number] = storage
        self._event(1, storage, storage.where, number)

    def _freed(self, row: tuple[int, ...]) -> None:
        storage = self.live.pop(row[1], None)
        if storage is not None:
            self._event(-1, storage, self._here, row[1])

    def _begun(self, row: tuple[int, ...]) -> None:
        _, name, sequence, kind, operands, line = row
        named = self.log.names[name]
        if named.startswith(ENGINE):
            kind = NODE
        if kind == NODE:
            if self.phase is not Phase.BACKWARD:
                self._settle(Phase.BACKWARD)
            where = self.made.get(sequence, ("", -1)) if sequence >= 0 else ("", -1)
            if where != ("", -1) and self.nodes:  # the engine's own part of this node
                self.nodes[-1] = where
            self.nodes.append(where)
            self.line = where[1]
        elif not self.running or all(r.kind == NODE for r in self.running):
            self.line = line if line >= 0 and (not self.nodes or self.modules) else self.line
        if kind != NODE and sequence >= 0:
            self.made[sequence] = (self.modules[-1] if self.modules else "", self.line)
        running = _Running(named, kind)
        if self.running and self.running[-1].name == named:  # autocast calls the operator again, of what it has cast
            self.running[-1].again = True
        self.running.append(running)
        if operands >= 0 and (self.kernels or kind == LEFT_OUT):
            running.inputs = self.log.values(operands)
        if kind == LEFT_OUT:
            held = scratch_of(self.device, named, running.inputs or (), self.threads)
            running.scratch = [Storage(size(n), 1, Category.TEMPORARY, self._here) for n in held]
            for storage in running.scratch:
                self._event(1, storage, storage.where, 0)

    def _ended(self, row: tuple[int, ...]) -> None:
        running = self.running[-1]
        if running.kind == LEFT_OUT and not running.again:
            for n in turns_of(self.device, running.name, running.inputs or ()):
                storage = Storage(size(n), 1, Category.TEMPORARY, self._here)
                self._event(1, storage, storage.where, 0)
                self._event(-1, storage, storage.where, 0)
        if self.kernels and running.inputs is not None and row[4] >= 0:
            self._kernel(running, self.log.values(row[4]))
        for storage in reversed(running.scratch):
            self._event(-1, storage, storage.where, 0)
        self.running.pop()
        if running.kind == NODE:
            self.nodes.pop()
            if not self.nodes:
                self.phase, self.updating = Phase.OPTIMIZER, False

    def _kernel(self, running: _Running, results: Sequence[Any]) -> None:
        again = bool(self.nodes and self.modules)  # a checkpoint runs forward within backward
        turn = Turn(self._here, self.ledger.micro_batch, again)
        kernel = kernel_of(running.name, running.inputs or (), results, turn, self.live)
        if kernel is None:
            return
        if self.phase is Phase.OPTIMIZER and not self.updating:
            self.pending_kernels.append(len(self.ledger.kernels))
        self.ledger.kernels.append(kernel)

    def _message(self, sent: Sent) -> None:
        if self.phase is Phase.OPTIMIZER and not self.updating:
            self.pending_messages.append(len(self.ledger.messages))
        dtype, width = str(sent.dtype).removeprefix("torch."), sent.dtype.itemsize
        place, at = self._here, self.ledger.micro_batch
        self.ledger.messages.append(
            Message(sent.kind, sent.axis, size(sent.nbytes), ONE, dtype, width, "step", place, at)
        )

    def _marked(self, row: tuple[int, ...]) -> None:
        _, what, value, more, *_ = row
        match Mark(what):
            case Mark.MODULE:
                self.reading.checkpoints += bool(self.nodes and not self.modules)
                self.modules.append(self.known.modules[value] if value >= 0 else "loss")
                if not self.nodes and self.phase is not Phase.FORWARD:
                    self._settle(Phase.FORWARD)
            case Mark.MODULE_END:
                self.modules.pop()
            case Mark.UPDATE:
                self.phase, self.updating = Phase.OPTIMIZER, True
                self.pending.clear()
                self.pending_kernels.clear()
                self.pending_messages.clear()
            case Mark.MESSAGE:
                self._message(self.log.sent[value])
            case Mark.SAVED | Mark.LET_GO | Mark.REMADE | Mark.UPDATE_END:
                pass
            case Mark.GRADIENT:
                storage = self.live.get(value)
                if storage is not None and storage.category is not Category.PARAMETER:
                    storage.category = Category.GRADIENT
                    module = self.known.parameters[more].rpartition(".")[0]
                    place = storage.where._replace(module=module)
                    self.ledger.gradients.setdefault(storage, [(place, storage.nbytes)])

    def _settle(self, phase: Phase) -> None:
        """It has turned out that the step goes on with `phase`: the update that might have begun has not."""
        if phase is Phase.FORWARD and not self.updating:
            self.ledger.micro_batch += 1
        self.phase = phase
        for i in () if self.updating else self.pending:
            event = self.ledger.events[i]
            place = event.where._replace(phase=phase)
            self.ledger.events[i] = event._replace(where=place, micro_batch=self.ledger.micro_batch)
        for i in () if self.updating else self.pending_kernels:
            kernel = self.ledger.kernels[i]
            place = kernel.where._replace(phase=phase)
            self.ledger.kernels[i] = kernel._replace(where=place, micro_batch=self.ledger.micro_batch)
        for i in () if self.updating else self.pending_messages:
            sent = self.ledger.messages[i]
            place = sent.where._replace(phase=phase)
            self.ledger.messages[i] = replace(sent, where=place, micro_batch=self.ledger.micro_batch)
        self.pending.clear()
        self.pending_kernels.clear()
        self.pending_messages.clear()
