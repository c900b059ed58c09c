"""Which operators compute, and so are left out."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torchgen  # type: ignore[import-untyped]  # comes with torch, untyped

has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # noqa: SLF001 - the dispatcher's own answer
operators = torch._C._dispatch_get_all_op_names  # noqa: SLF001 - likewise


# Kernels that make a tensor or change its form without computing anything, and those that are written in terms of
# other operators and run as they are.
FORMS = ("empty", "empty_strided", "resize_", "set_", "resize_as_", "_resize_output_", "record_stream", "pin_memory")
WRITTEN = ("mean", "roll")
# Written in Python in terms of aten's: messages go to the process group, `fully_shard` copies by operators of its own.
WRAPPED = ("c10d::", "_c10d_functional::", "fsdp::")
# Kernels that answer with values, or whose results have a shape that depends on values.
DEPENDENT = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_consecutive", "bincount", "equal")
COMPUTING = ("aten::copy_",)  # composites of all devices that compute nevertheless


# PyTorch's own table of which operator has a kernel on which device.
TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"


@cache
def kernels_of(device: str = "cpu") -> list[str]:
    """Names of the operators that compute: they have a kernel of their own, and their results no storage of others."""
    cuda = cuda_kernels() if device == "cuda" else frozenset()
    forms = FORMS if device == "cuda" else (*FORMS, *WRITTEN)
    return [
        name
        for name, schema in schemas().items()
        if (has_kernel(name, "CPU") or name in COMPUTING or name in cuda)
        and not name.startswith(WRAPPED)
        and not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        and name.removeprefix("aten::").partition(".")[0] not in forms
    ]


@cache
def cuda_kernels() -> frozenset[str]:
    """Names of the operators that have a kernel of their own on CUDA, whatever this PyTorch was built for.

    native_functions.yaml: an operator's own `dispatch`, or that of the one which its `structured_delegate` names.
    """
    own, delegates = set(), {}
    for entry in re.split(r"^- func: ", TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name = entry.partition("(")[0]
        if re.search(r"^    [\w, ]*\bCUDA\b[\w, ]*:", entry, flags=re.MULTILINE):
            own.add(name)
        delegate = re.search(r"^  structured_delegate: (\S+)", entry, flags=re.MULTILINE)
        if delegate is not None:
            delegates[name] = delegate[1]
    return frozenset(f"aten::{name}" for name in own | {name for name, other in delegates.items() if other in own})


@cache
def composites() -> list[str]:
    """Names of those of CUDA's kernels that have a definition by other operators, which differentiates itself.

    Autograd prefers that one where a device has no kernel of its own (`computeDispatchTableEntryWithDebug`). Copies are
    among them: `torch.tensor(..., device="cuda")` leaves `Fake` out; and what gives a storage another size, which a
    PyTorch that is built for CUDA would ask the card for.
    """
    own = [
        name
        for name in kernels_of("cuda")
        if name in cuda_kernels() and has_kernel(name, "CompositeImplicitAutograd") and not has_kernel(name, "CUDA")
    ]
    sizes = [name for name in schemas() if name.removeprefix("aten::").partition(".")[0] in ("resize_", "set_")]
    return [*own, *COMPUTING, *(name for name in sizes if has_kernel(name, "CPU"))]


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
