"""Which operators compute, and so are left out."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001 - the dispatcher's own answer
operators = torch._C._dispatch_get_all_op_names  # noqa: SLF001 - likewise


# Kernels that make a tensor or change its form without computing anything, and those that are written in terms of
# other operators and run as they are.
FORMS = ("empty", "empty_strided", "resize_", "set_", "resize_as_", "_resize_output_", "record_stream", "pin_memory")
WRITTEN = ("mean", "roll")
# Kernels that answer with values, or whose results have a shape that depends on values.
DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal")
COMPUTING = ("aten::copy_",)  # composites of all devices that compute nevertheless


@cache
def kernels_of() -> list[str]:
    """Names of the operators that compute: they have a kernel of their own, and their results no storage of others."""
    return [
        name
        for name, schema in schemas().items()
        if (has_kernel(name, "CPU") or name in COMPUTING)
        and "c10d" not in name  # messages go to the process group, which may be PyTorch's fake one
        and not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        and name.removeprefix("aten::").partition(".")[0] not in (*FORMS, *WRITTEN)
    ]


@cache
def dependent_kernels() -> list[str]:
    """Names of the operators in `DEPENDENT`."""
    return [name for name in operators() if name.removeprefix("aten::").partition(".")[0] in DEPENDENT]


@cache
def schemas() -> dict[str, Any]:
    """The schema of each operator, by its name as the dispatcher writes it."""
    found = torch._C._jit_get_all_schemas()  # noqa: SLF001 - likewise
    named = {f"{s.name}.{s.overload_name}" if s.overload_name else s.name: s for s in found}
    return {name: named[name] for name in operators() if name in named}
