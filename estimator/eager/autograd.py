"""What autograd records in forward and how its engine runs it: the rules of torch/csrc/autograd, by the same names."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from estimator.eager.checkpointing import Holder, OnHost, as_activation, pack
from estimator.eager.ledger import Category
from estimator.eager.letters import ONE
from estimator.eager.tensor import FLOAT32, Locals, Machine, Tensor, converted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from estimator.eager.tensor import Dtype, Shape

    Backward = Callable[..., "Sequence[Tensor | None]"]


class Context(Locals):
    """What a node's backward sees: `saved`, `needs` (which inputs want a gradient), and names of its own."""

    saved: tuple[Tensor, ...]
    needs: tuple[bool, ...]


class Node:
    """A node of the graph. `owners` counts the tensors it produced and the nodes that lead to it."""

    __slots__ = (
        "backward",
        "block",
        "dtypes",
        "edges",
        "expected",
        "held",
        "hook",
        "module",
        "name",
        "owners",
        "saved",
        "sequence",
        "shapes",
        "variable",
        "wrapped",
    )

    def __init__(self, machine: Machine, name: str, inputs: Sequence[Tensor | None], backward: Backward | None) -> None:
        self.name, self.backward = name, backward
        self.sequence = float(machine.sequence)
        machine.sequence += 1
        self.module, self.block = machine.ledger.module, machine.ledger.block
        self.owners = 0
        self.wrapped = machine.makes_dtensors
        self.expected = False  # the engine holds it, until it has run it
        self.saved: list[Tensor | Holder | OnHost] = []
        self.held: list[tuple[Node, Tensor]] = []  # attributes of Python functions' contexts
        self.variable: Tensor | None = None
        self.hook: Callable[[], None] | None = None  # of its output (`Tensor.register_hook`), called before it
        self.shapes: list[Shape | None] = [t.shape if t is not None else None for t in inputs]
        self.dtypes: list[Dtype | None] = [t.dtype if t is not None else None for t in inputs]
        self.edges: list[tuple[Node, int] | None] = [_edge(t) for t in inputs]
        for edge in self.edges:
            if edge is not None:
                edge[0].owners += 1

    def save(self, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor] = ()) -> None:
        """Keep `tensors` for backward; of an output, an alias, since the output holds this node."""
        for t in tensors:
            if t is not None:
                kept = t.alias() if any(t is o for o in outputs) else t
                try:
                    self.saved.append(pack(kept))
                finally:
                    kept.discard()

    def release(self) -> None:
        """Let go of what was saved (`release_variables`)."""
        for s in self.saved:
            s.drop()
        self.saved = []
        self.backward = None

    def keep(self, x: Tensor) -> None:
        """`ctx.x = x`: out of sight of saved_tensors_hooks and checkpoints, and there until the node itself is gone.

        A node that has run keeps its edges, and with them all nodes before it, until the loss is gone.
        """
        self.held.append((self, as_activation(x).alias().hold()))

    def let_go(self) -> None:
        """The end of the node."""
        for node, x in self.held:
            with x.machine.ledger.at(node.module, node.block, node.name):
                x.drop()
        self.held = []

    def drop(self) -> None:
        """One owner less; a node that nobody holds takes its saved tensors and edges with it."""
        self.owners -= 1
        if self.owners == 0 and not self.expected:
            self.release()
            self.let_go()
            for edge in self.edges:
                if edge is not None:
                    edge[0].drop()
            self.edges = []


def _edge(t: Tensor | None) -> tuple[Node, int] | None:
    if t is None or not t.requires_grad:
        return None
    if t.grad_fn is not None:
        return t.grad_fn, t.output_nr
    if t.accumulator is None:
        node = Node(t.machine, "AccumulateGrad", (), None)
        node.sequence, node.variable, node.owners = math.inf, t, 1
        node.wrapped = t.partial or t.whole_gradient
        t.accumulator = node
    return t.accumulator, 0


def record(
    name: str,
    inputs: Sequence[Tensor | None],
    backward: Backward,
    save: Sequence[Tensor | None] = (),
) -> Node | None:
    """Before an operator computes: its node, with the inputs that it saves; None if nothing needs a gradient."""
    machine = next(t for t in inputs if t is not None).machine
    if not machine.grad_enabled or not any(t is not None and t.requires_grad for t in inputs):
        return None
    node = Node(machine, name, inputs, backward)
    node.owners += 1  # the operator, until attach
    try:
        node.save(save)
    except BaseException:
        node.drop()
        raise
    return node


def attach(node: Node | None, *outputs: Tensor, save: Sequence[Tensor] = ()) -> Tensor:
    """After an operator has computed: its outputs get the node, which saves those among `save`. Returns the first."""
    if node is not None:
        for nr, out in enumerate(outputs):
            out.grad_fn, out.output_nr, out.requires_grad = node, nr, True
            node.owners += 1
        try:
            node.save(save, outputs)
        except BaseException:
            for out in outputs:
                out.discard()
            raise
        finally:
            node.drop()
    return outputs[0]


Buffer = list[Tensor | None]
VIEWS = frozenset({"ViewBackward0", "UnsafeViewBackward0", "TransposeBackward0"})  # nodes whose backward is a view


def backward(loss: Tensor, gradient: Tensor | None = None) -> None:
    """Run `loss.backward(gradient)`: torch/csrc/autograd/engine.cpp on one thread.

    Nodes run from the latest recorded to the earliest, AccumulateGrad at once. The gradient of the loss, made by
    Python where none is given, lives until the end.
    """
    machine, root = loss.machine, loss.grad_fn
    assert root is not None, "the loss does not depend on a parameter"
    ledger = machine.ledger
    before, machine.grad_enabled = machine.grad_enabled, False
    with ledger.at(ledger.module, ledger.block, "ones_like"):
        seed = (machine.empty(loss.shape, loss.dtype) if gradient is None else gradient).hold()
    waits = _dependencies(root)
    ready: list[tuple[float, int, Node, Buffer]] = [(-root.sequence, 0, root, [seed.hold()])]
    pending: dict[Node, Buffer] = {}
    pushed = 0
    root.owners += 1
    while ready:
        *_, node, buffer = heapq.heappop(ready)
        with ledger.at(node.module, node.block, node.name):
            if node.variable is not None:
                _accumulate_grad(node.variable, buffer)
                if machine.on_gradient is not None:
                    machine.on_gradient(node.variable)
                continue
            if node.hook is not None:
                node.hook()
            for (target, nr), grad in _evaluate(node, buffer):
                slots = pending.setdefault(target, [])
                slots.extend([None] * (nr + 1 - len(slots)))
                if grad is not None:
                    _add_to_buffer(slots, nr, grad, wrapped=target.wrapped)
                waits[target] -= 1
                if waits[target] == 0:
                    pushed += 1
                    heapq.heappush(ready, (-target.sequence, pushed, target, pending.pop(target)))
            if node is not root:
                root.held += node.held
                node.held = []
    if machine.on_backward_end is not None:
        machine.on_backward_end()
    root.drop()
    seed.drop()
    machine.grad_enabled = before


def _dependencies(root: Node) -> dict[Node, int]:
    waits: dict[Node, int] = {}
    seen, stack = {root}, [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is not None:
                waits[edge[0]] = waits.get(edge[0], 0) + 1
                if edge[0] not in seen:
                    seen.add(edge[0])
                    stack.append(edge[0])
    return waits


def _evaluate(node: Node, buffer: Buffer) -> list[tuple[tuple[Node, int], Tensor | None]]:
    """Call a node, bring its results to its inputs' shapes and dtypes, drop what came in and what was saved."""
    node.expected = False
    assert node.backward is not None, "backward through a graph that has been released"
    context = Context()
    object.__setattr__(context, "needs", tuple(edge is not None for edge in node.edges))
    unpacked = [s if isinstance(s, Tensor) else s.unpack() for s in node.saved]
    object.__setattr__(context, "saved", tuple(unpacked))
    _wait_for(node, buffer)
    results = list(node.backward(context, *buffer))
    for r in results:
        if r is not None:
            r.hold()
    context.__exit__()
    for s, t in zip(node.saved, unpacked, strict=True):
        if not isinstance(s, Tensor):  # what a checkpoint recomputed or the host had is a local of this call
            t.drop()
    for i, (r, edge) in enumerate(zip(results, node.edges, strict=True)):
        if r is not None and edge is None:
            r.drop()
            results[i] = None
        elif r is not None and r.shape != node.shapes[i]:
            shape = node.shapes[i]
            assert shape is not None
            results[i] = sum_to(r, shape).hold()
            r.drop()
        wide, dtype = results[i], node.dtypes[i]
        if wide is not None and dtype is not None and wide.dtype != dtype:  # `validate_outputs`
            results[i] = converted(wide, dtype).hold()
            wide.drop()
    for grad in buffer:
        if grad is not None:
            grad.drop()
    node.release()
    edges, node.edges = node.edges, []
    out = []
    for edge, r in zip(edges, results, strict=True):
        if edge is not None:
            out.append((edge, r))
    for edge in edges:
        if edge is not None and edge[0].variable is None:
            edge[0].owners -= 1
            edge[0].expected = True
    return out


def _wait_for(node: Node, buffer: Buffer) -> None:
    """`AsyncCollectiveTensor`: waited for by the first operator that is no view, after what was saved is unpacked."""
    for grad in buffer:
        if grad is not None and node.name not in VIEWS:
            wait = grad.machine.unwaited.pop(grad.storage, None)
            if wait is not None:
                wait()


def _add_to_buffer(slots: Buffer, nr: int, grad: Tensor, *, wrapped: bool) -> None:
    """`InputBuffer::add`: a second gradient is added in place only if the first has no other owner, nor its storage.

    And not where they are `wrapped`, of a subclass of Tensor (`can_accumulate_inplace`).
    """
    old = slots[nr]
    if old is None:
        slots[nr] = grad
        return
    if old.owners == 1 and old.storage.owners == 1 and not wrapped:
        old.machine.kernel("add_", (old, grad), (old,))
    else:
        part = None
        if wrapped and old.shape != grad.shape:  # of DTensors one is whole: a rank's part of it is taken
            part = old.machine.empty(old.shape, old.dtype).hold()
            old.machine.kernel("clone", (part,), (part,))
        total = old.machine.empty(old.shape, old.dtype).hold()
        old.machine.kernel("add", (old, part or grad), (total,))
        slots[nr] = total
        if part is not None:
            part.drop()
        old.drop()
    grad.drop()


def _accumulate_grad(variable: Tensor, buffer: Buffer) -> None:
    """`AccumulateGrad`: steal the gradient if nobody else holds it and its layout is the variable's, else clone it."""
    (grad,) = buffer
    assert grad is not None
    machine = variable.machine
    gathered = variable.storage.category is Category.COMMUNICATION  # then its gradient is to be scattered
    category = Category.COMMUNICATION if gathered else Category.GRADIENT
    if variable.grad is not None:
        machine.kernel("add_", (variable.grad, grad), (variable.grad,))
    elif grad.owners == 1 and grad.is_contiguous:
        variable.grad = grad.alias().hold()
        variable.grad.storage.category = category
    else:
        variable.grad = machine.empty(variable.shape, variable.dtype, category=category).hold()
        machine.kernel("clone", (grad,), (variable.grad,))
    # The first op that made a gradient of it may be elsewhere: the head's, where that shares the embedding's matrix.
    held = variable.grad.storage
    machine.ledger.gradients.setdefault(held, [(variable.storage.where, held.nbytes)])
    if variable.after_accumulation is not None:
        variable.after_accumulation(variable)
    grad.drop()


def add_wider(total: Tensor, x: Tensor) -> None:
    """`total.add_(x)`; a CPU kernel reads x through a copy in the dtype of the total."""
    casts = total.machine.casts_operands and x.dtype != total.dtype
    read = converted(x, total.dtype).hold() if casts else x.hold()
    total.machine.kernel("add_", (total, read), (total,))
    read.drop()


def sum_to(x: Tensor, shape: Shape) -> Tensor:
    """`at::sum_to`: one sum; leading dimensions are then viewed away."""
    leading = len(x.shape) - len(shape)
    kept = (ONE,) * leading + shape
    total = summed(x, kept)
    return total.view(shape, total.stride[leading:]) if leading else total


def summed(x: Tensor, kept: Shape, dtype: Dtype | None = None) -> Tensor:
    """x.sum to `kept`, a shape with 1 in place of each dimension that goes; autograd knows nothing of it.

    CUDA's autocast asks for a `dtype`, in which its kernel adds up what it reads as it is.

    The CPU sums half precision in fp32, from a copy, where the two innermost dimensions of its loop are both summed
    (`should_use_acc_buffer` in aten/src/ATen/native/ReduceOps.cpp): where what is summed is not one run of strides.
    """
    machine = x.machine
    total = machine.empty(kept, dtype or x.dtype)
    if machine.device == "cpu" and x.dtype.itemsize < FLOAT32.itemsize and _runs_summed(x, kept) > 1:
        wide = machine.empty(kept, FLOAT32).hold()
        copy = converted(x, FLOAT32).hold()
        machine.kernel("sum", (copy,), (wide,))
        copy.drop()
        machine.kernel("copy_", (wide,), (total,))
        wide.drop()
        return total
    machine.kernel("sum", (x,), (total,))
    return total


def _runs_summed(x: Tensor, kept: Shape) -> int:
    """Into how many loops the dimensions that are summed coalesce: those whose strides follow from one another."""
    dims = [(s, n) for n, s, left in zip(x.shape, x.stride, kept, strict=True) if left is ONE and n is not ONE]
    dims.sort(key=lambda dim: x.machine.width(dim[0]))
    runs, following = 0, None
    for stride, size in dims:
        runs += stride is not following
        following = x.machine.product((stride, size))
    return runs
