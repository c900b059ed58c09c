"""A vocabulary that is shared out by PyTorch's DTensor: each process has some rows of the embedding and of the head.

The embedding finds the rows of its own ids, and the sum over the processes has all of them; the head leaves each
process its part of the logits, and the cross entropy is taken of these parts (`loss_parallel`), so that no process ever
has whole logits: as torchtitan lays the ends of a model out.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

from torch.distributed.tensor import Replicate, distribute_module
from torch.distributed.tensor.parallel import RowwiseParallel, SequenceParallel, loss_parallel, parallelize_module

from trainer.parallel.columns import Columns
from trainer.parallel.sequence import TOKENS, cut_stream

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from estimator.describe.plan import Plan
    from trainer.model.decoder import Transformer


class TableRows(RowwiseParallel):
    """`RowwiseParallel` of the trainer's own Embedding, which is no `nn.Embedding`."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        take = partial(self._prepare_input_fn, self.input_layouts, (Replicate(),))
        give = partial(self._prepare_output_fn, self.output_layouts, self.use_local_output)
        return distribute_module(module, device_mesh, self._partition_embedding_fn, take, give)


def share_vocabulary(model: Transformer, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Share out the rows of embedding and head, in place; with `sequence` what is between them is cut by tokens.

    Where nothing but a scale lies between the embedding and the first block, the sum is scattered as it is made.
    """
    tied = model.head.weight is model.embedding.weight
    scatters = sequence and model.positions is None and model.embedding_norm is None
    given = TOKENS if sequence else Replicate()
    styles = {
        "embedding": TableRows(input_layouts=Replicate(), output_layouts=TOKENS if scatters else Replicate()),
        "head": Columns(input_layouts=given, use_local_output=False),
    }
    parallelize_module(model, mesh, styles)
    if sequence and not scatters:
        cut_stream(model, mesh)
    if sequence:
        parallelize_module(model, mesh, {"final_norm": SequenceParallel()})
    if tied:
        model.head.weight = model.embedding.weight


def loss_context(plan: Plan) -> AbstractContextManager[object]:
    """Where the loss of shared logits is taken, and where its backward runs."""
    return loss_parallel() if plan.vocabulary_parallel else nullcontext()
