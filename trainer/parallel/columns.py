"""`ColwiseParallel` and `RowwiseParallel` of the trainer's own Linear, which is no `nn.Linear`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch.distributed.tensor import Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh


class Columns(ColwiseParallel):
    """Each process has some of what comes out."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        take = partial(self._prepare_input_fn, self.input_layouts, (Replicate(),))
        give = partial(self._prepare_output_fn, self.output_layouts, self.use_local_output)
        return distribute_module(module, device_mesh, self._partition_linear_fn, take, give)


class Rows(RowwiseParallel):
    """Each process takes some of what goes in, and the sum over them comes out."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        take = partial(self._prepare_input_fn, self.input_layouts, (Shard(-1),))
        give = partial(self._prepare_output_fn, self.output_layouts, self.use_local_output)
        return distribute_module(module, device_mesh, self._partition_linear_fn, take, give)
