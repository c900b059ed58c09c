"""DeepSpeed's ZeRO: parameters of 16 bits, and in fp32 a part each of masters and states, which only its owner updates.

After deepspeed 0.19.8, whose names the docstrings have: runtime/zero/stage_1_and_2.py and stage3.py, with the defaults
of runtime/zero/config.py. A model, near to what `tools/check_deepspeed.py` measures and not equal: parameters are cut
one by one and not as one flat tensor (as many bytes, but for its padding), and what a single reduction or norm takes
for a moment is left out.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from estimator.describe.deepspeed import PERSISTENCE, PREFETCHED
from estimator.eager.ledger import Category, Storage
from estimator.eager.letters import ZERO, D, constant, larger, letter, smaller
from estimator.eager.ops import python_number
from estimator.eager.tensor import FLOAT32, Tensor
from estimator.optim.updates import at_parameter, in_place, zero_grad
from estimator.parallel.data import HELD, Replica, clip_parts
from estimator.parallel.placement import DATA
from estimator.parallel.tensor import part_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from estimator.eager.letters import Size
    from estimator.eager.tensor import Dtype
    from estimator.parallel.data import Model, Sharing

BUCKET = letter("b_r", "elements of a bucket that DeepSpeed reduces gradients in (reduce_bucket_size)")
LIVE = letter("b_l", "parameters that DeepSpeed's ZeRO-3 has whole at once, at most (stage3_max_live_parameters)")
PERSISTENT, PREFETCH = constant(PERSISTENCE), constant(PREFETCHED)
SUB_GROUP = letter("b_s", "parameters that DeepSpeed's ZeRO-3 updates at once, at most (sub_group_size)")


class ZeroStage1(Replica):
    """`DeepSpeedZeroOptimizer` with partition_gradients off: whole gradients until the last micro-batch's are reduced.

    Attributes:
        parts: of each parameter, this accelerator's part of its gradient once that is summed.
        buffers: in which gradients are laid one after the other to be reduced (`ipg_buckets`).
    """

    shares_gradients = False

    def __init__(self, model: Model, sharing: Sharing) -> None:
        super().__init__(model, sharing)
        self.parts: dict[Tensor, Tensor] = {}
        self.buffers: list[Tensor] = []
        self.mains: list[Tensor] = []
        for p in self.parameters:
            with at_parameter(p, "single_partition_of_fp32_groups"), self.at_masters():
                self.mains.append(self._part(p, FLOAT32, Category.OPTIMIZER))
        self.updated = self.mains
        self.padded = [main.shape for main in self.mains]
        self.machine.on_gradient = self.gradient_ready
        self.machine.on_backward_end = self.after_backward

    def at_masters(self) -> AbstractContextManager[None]:
        """Where masters, states and the update are: here, or on the host."""
        return self.machine.on_host() if self.sharing.offload else nullcontext()

    def _part(self, p: Tensor, dtype: Dtype, category: Category) -> Tensor:
        """A D-th of a parameter's elements, held."""
        return self.machine.empty((part_of(p.numel, D),), dtype, category=category).hold()

    @property
    def last_micro_batch(self) -> bool:
        """The step's last (`is_gradient_accumulation_boundary`)."""
        return self.machine.ledger.micro_batch == self.last

    def gradient_ready(self, p: Tensor) -> None:
        """`process_gradients`: the bucket is made with the first gradient of a backward."""
        if not self.buffers:
            with self.machine.ledger.at("", None, "setup_buckets"):
                self.buffers = [self.machine.empty((BUCKET,), p.dtype, category=HELD).hold()]
        if self.shares_gradients:
            self.reduce(p)

    def after_backward(self) -> None:
        """The bucket goes once all is reduced (`_release_ipg_buffers`)."""
        if self.shares_gradients:
            self.release()

    def release(self) -> None:
        """The bucket goes."""
        for buffer in self.buffers:
            buffer.drop()
        self.buffers = []

    def reduce(self, p: Tensor) -> None:
        """`reduce_ipg_grads`: the owner's part of the sum stays."""
        before = self.parts.get(p)
        with at_parameter(p, "reduce_ipg_grads"):
            self.scatter(p, divides=True)
            part = self._part(p, p.dtype, Category.GRADIENT if self.shares_gradients else HELD)
            self.machine.kernel("copy_", (part,), (part,))
            if before is not None:
                in_place("add_", before, part, arithmetic=1)
                part.drop()
            else:
                self.parts[p] = part

    def scatter(self, p: Tensor, *, divides: bool = False) -> None:
        """The gradient goes into the bucket, is divided there if this implementation does, is summed, and is gone."""
        assert p.grad is not None
        grad, p.grad = p.grad, None
        self.machine.kernel("copy_", (grad,), (grad,))
        if divides:
            with python_number(self.machine, p.dtype):
                self.machine.kernel("div_", (grad,), (grad,))
        waits = "update" if self.last_micro_batch else "step"
        self.machine.collective("reduce-scatter", DATA, grad, waits=waits)
        grad.drop()

    def before_update(self) -> None:
        """`reduce_gradients`, then `step`: the parts as one flat tensor, then in fp32; those of 16 bits go."""
        if not self.shares_gradients:
            for p in self.parameters:
                self.reduce(p)
            self.release()
        flats = []
        for p in self.parameters:
            with at_parameter(p, "flatten"):
                flats.append(self._part(p, p.dtype, HELD))
                self.machine.kernel("cat", (self.parts[p],), (flats[-1],))
        for p, main, flat in zip(self.parameters, self.mains, flats, strict=True):
            with at_parameter(p, "to"):
                main.grad = self._part(p, FLOAT32, HELD)
                self.machine.kernel("to", (flat,), (main.grad,))
        for p, flat in zip(self.parameters, flats, strict=True):
            flat.drop()
            self.parts.pop(p).drop()

    def after_update(self) -> None:
        """`step`: fp32 gradients go, the owner's part of each parameter is written, and all gather it, in place."""
        zero_grad(self.mains)
        for p, main in zip(self.parameters, self.mains, strict=True):
            with at_parameter(p, "all_gather_dp_groups"):
                self.machine.kernel("copy_", (main,), (main,))
                self.machine.collective("all-gather", DATA, p, waits="step")

    def clip(self, parameters: Sequence[Tensor]) -> None:
        """`scaled_global_norm`: each accelerator has its parts' share of the norm."""
        clip_parts(parameters, (DATA,))


class ZeroStage2(ZeroStage1):
    """The same with partition_gradients: gradients are summed as they come in each backward, and a part stays."""

    shares_gradients = True


class OffloadedStates(ZeroStage2):
    """The same with cpu_offload, also of ZeRO-1: each summed gradient goes to the host, into its master's in fp32.

    Gradients of several micro-batches add up there. The update's result comes back through a buffer of 16 bits
    (`param_buffer_of_bit16_for_cpu_offload_groups`), and `temp_grad_buffer_for_gpu_offload` stays here.
    """

    def __init__(self, model: Model, sharing: Sharing) -> None:
        super().__init__(model, sharing)
        largest = larger(*(p.numel for p in self.parameters))
        with self.machine.ledger.at("", None, "temp_grad_buffer_for_gpu_offload"):
            self.temporary = self.machine.empty((largest,), self.machine.dtype, category=HELD).hold()
        for p in self.parameters:
            with at_parameter(p, "param_buffer_of_bit16_for_cpu_offload_groups"), self.machine.on_host():
                self._part(p, p.dtype, HELD)
                self.parts[p] = self._part(p, FLOAT32, Category.GRADIENT)

    def reduce(self, p: Tensor) -> None:
        """`async_inplace_copy_grad_to_fp32_buffer_from_gpu`."""
        with at_parameter(p, "reduce_ipg_grads"):
            self.scatter(p)
            with self.machine.on_host():
                in_place("add_", self.parts[p], arithmetic=1)

    def before_update(self) -> None:
        """The masters' gradients are there."""
        for p, main in zip(self.parameters, self.mains, strict=True):
            main.grad = self.parts[p].hold()


class ZeroStage3(ZeroStage2):
    """`DeepSpeedZeroOptimizer_Stage3`: parameters are parts too, whole around their use.

    How many are whole at once goes by their order and by how soon each is used again, which
    `PartitionedParameterCoordinator` watches; here it is the most that it allows, or all, from a forward to the end of
    its backward, and in forward beside them the buffer in which those ahead came (`AllGatherCoalescedHandle`), until
    the last module that waits for one of them has it: the head. Small ones (`ds_persist`) stay whole from one update to
    the next, in which none is. Buckets and the gradients' parts are there all the time.

    Attributes:
        persistent: what is whole of small parameters.
    """

    def __init__(self, model: Model, sharing: Sharing) -> None:
        stack, total, fetched, ahead = model.machine.stack, ZERO, ZERO, ZERO
        small = {p: model.machine.at_most(p.numel, PERSISTENT) for p in model.parameters()}
        for p, stays in small.items():
            numel = stack.times(p.storage.where.block) * p.numel
            total, fetched = total + numel, fetched if stays else fetched + numel
            ahead = ahead if stays or p.storage.where.module == "embedding" else ahead + numel
            self._cut(p)
        super().__init__(model, sharing)
        self.small, self.persistent = [p for p, stays in small.items() if stays], list[Tensor]()
        self.gather_small()
        self.whole: Size = smaller(fetched, LIVE)
        self.ahead: Size = smaller(ahead, PREFETCH)
        self.flat: Tensor | None = None
        head: Any = getattr(model, "head")  # noqa: B009 - a Transformer's
        head.unit = Fetched(self)
        self.at_once: Size = smaller(part_of(total, D), SUB_GROUP)
        self.live: Tensor | None = None
        with self.machine.ledger.at("", None, "ipg_buckets"):
            self.bucket = self.machine.empty((BUCKET,), self.machine.dtype, category=HELD).hold()
        for p in self.parameters:
            with at_parameter(p, "grad_partitions_flat_buffer"):
                self.parts[p] = self._part(p, p.dtype, Category.GRADIENT)

    def _cut(self, p: Tensor) -> None:
        """`partition`: a part of the parameter, which itself has no storage of its own."""
        machine, where = p.machine, p.storage.where
        with machine.ledger.at(where.module, where.block, "ds_tensor"):
            machine.empty((part_of(p.numel, D),), p.dtype, category=Category.PARAMETER).hold()
        machine.ledger.free(p.storage)
        p.storage = Storage(ZERO, p.dtype.itemsize, HELD, where, owners=1)

    def before_forward(self) -> None:
        """`fetch_sub_module`, of all modules, in forward and again in backward."""
        if self.live is None:
            with self.machine.ledger.at("", None, "fetch_sub_module"):
                self.live = self.machine.empty((self.whole,), self.machine.dtype, category=HELD).hold()
                self.flat = self.machine.empty((self.ahead,), self.machine.dtype, category=HELD).hold()
        for p in self.parameters:
            with at_parameter(p, "all_gather_into_tensor"):
                for _ in ("forward", "backward") if p not in self.small else ():
                    self.machine.collective("all-gather", DATA, p, waits="unit")

    def all_fetched(self) -> None:
        """The last module has what it waited for, and with that goes the buffer of the all-gather."""
        if self.flat is not None:
            self.flat.drop()
            self.flat = None

    def gather_small(self) -> None:
        """`persistent_parameters[0].all_gather`."""
        for p in self.small:
            with at_parameter(p, "all_gather"):
                self.persistent.append(self.machine.empty((p.numel,), p.dtype, category=HELD).hold())

    def gradient_ready(self, p: Tensor) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`."""
        self.reduce(p)

    def after_backward(self) -> None:
        """`release_and_reset_all`: what was fetched goes."""
        self.all_fetched()
        assert self.live is not None
        self.live.drop()
        self.live = None

    def reduce(self, p: Tensor) -> None:
        """`partition_grads`: the part is added to what is there."""
        with at_parameter(p, "partition_grads"):
            self.scatter(p)
            in_place("add_", self.parts[p], arithmetic=1)

    def before_update(self) -> None:
        """`_partition_all_parameters`, then `_prepare_sub_group`: gradients as one flat tensor, then in fp32.

        That is of one sub-group at a time.
        """
        for p, whole in zip(self.small, self.persistent, strict=True):
            with at_parameter(p, "partition"):
                whole.drop()
        self.persistent.clear()
        with self.machine.ledger.at("", None, "_prepare_fp32_grad_for_sub_group"):
            flat = self.machine.empty((self.at_once,), self.machine.dtype, category=HELD).hold()
            shared = self.machine.empty((self.at_once,), FLOAT32, category=HELD)
            flat.drop()
        for p, main in zip(self.parameters, self.mains, strict=True):
            with at_parameter(p, "to"):
                main.grad = Tensor(self.machine, shared.storage, main.shape, main.stride, FLOAT32).hold()
                self.machine.kernel("to", (self.parts[p],), (main.grad,))
        shared.discard()  # the masters' gradients are what holds its storage

    def after_update(self) -> None:
        """`_reassign_or_swap_out_partitioned_parameters`: the parts are written, and the gradients' are zero again."""
        zero_grad(self.mains)
        for p, main in zip(self.parameters, self.mains, strict=True):
            with at_parameter(p, "copy_"):
                self.machine.kernel("copy_", (main,), (main,))
                self.machine.kernel("zero_", (), (self.parts[p],))
        self.gather_small()
        for p in self.small:
            with at_parameter(p, "all_gather"):
                self.machine.collective("all-gather", DATA, p, waits="step")


class Fetched:
    """What `pre_sub_module_forward_function` does for the head, the last module that is fetched."""

    def __init__(self, stage: ZeroStage3) -> None:
        self.stage = stage

    def cast_inputs(self, args: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """As they are."""
        return args

    def before_forward(self, args: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`fetch_sub_module`."""
        self.stage.all_fetched()
        return args

    def before_recomputation(self) -> None:
        """No head is in a checkpoint."""

    def after_forward(self, out: Tensor) -> None:
        """What is whole stays so."""


STAGES: dict[str, type[Replica]] = {
    "deepspeed-zero1": ZeroStage1,
    "deepspeed-zero2": ZeroStage2,
    "deepspeed-zero3": ZeroStage3,
    "deepspeed-zero1-offload": OffloadedStates,
    "deepspeed-zero2-offload": OffloadedStates,
}
