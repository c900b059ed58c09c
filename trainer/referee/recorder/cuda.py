"""CUDA where there is none: what Python asks `torch.cuda`, answered as on a machine with one card."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend

from estimator.describe.checks import ConfigError
from estimator.describe.plan import fused_on_cuda

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

AMPERE = (8, 0)  # the least compute capability whose kernels the rules are of
FLASH_WIDEST = 256  # head_dim
STATE_BYTES = 16  # of the generator's state, in the host's memory


def attention_kernel(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], itemsize: int, masked: bool, causal: bool, grouped: bool
) -> int:
    """Which kernel SDPA takes, as `torch.nn.attention.SDPBackend`; the arguments are shapes and bytes an element.

    The first of the preferred that takes these inputs and is not switched off, else the separate operators: the
    constraints of `can_use_flash_attention` and `can_use_mem_efficient_attention` in
    aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
    """
    half = itemsize < 4
    dense = len(q) == len(k) == len(v) == 4 and all((*q, *k, *v))
    heads = len({x[:2] for x in map(tuple, (q, k, v))}) == 1  # `check_batch_size_and_num_heads_dense`
    flash = (
        torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        and fused_on_cuda(half=half, masked=masked) == "flash"
        and q[-1] == k[-1] == v[-1] <= FLASH_WIDEST
        and (heads or grouped)
        and not (causal and q[-2] != k[-2])
    )
    alignment = 16 // itemsize  # elements of 16 bytes: `minimum_gemm_alignment`
    efficient = (
        torch.backends.cuda.mem_efficient_sdp_enabled()  # type: ignore[no-untyped-call]  # likewise
        and heads
        and not (q[-1] % alignment or v[-1] % alignment)
    )
    if not dense:
        return SDPBackend.MATH.value
    if flash:
        return SDPBackend.FLASH_ATTENTION.value
    return (SDPBackend.EFFICIENT_ATTENTION if efficient else SDPBackend.MATH).value


class Stream:
    """A stream on which nothing runs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def wait_event(self, event: Any) -> None:
        """At once."""

    def wait_stream(self, stream: Any) -> None:
        """At once."""

    def synchronize(self) -> None:
        """At once."""

    def query(self) -> bool:
        """Whether it has nothing to do."""
        return True

    def record_event(self, event: Event | None = None) -> Event:
        """One that has happened."""
        return event or Event()


class Event:
    """What has happened as soon as it is there."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        """At once."""

    def wait(self, stream: Any = None) -> None:
        """At once."""

    def synchronize(self) -> None:
        """At once."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def elapsed_time(self, end: Any) -> float:  # noqa: ARG002 - nothing takes any time
        """Milliseconds."""
        return 0.0


CURRENT = Stream()


def _state(*_: Any, **__: Any) -> torch.Tensor:
    return torch.zeros(STATE_BYTES, dtype=torch.uint8, device="cpu")


ANSWERS: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "_initialized": True,
    "is_initialized": lambda: True,
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "_exchange_device": lambda _: 0,
    "_maybe_exchange_device": lambda _: 0,
    "get_device_capability": lambda *_: AMPERE,
    "get_rng_state": _state,
    "set_rng_state": lambda *_, **__: None,
    "manual_seed": lambda _: None,
    "manual_seed_all": lambda _: None,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "get_device_name": lambda *_: "a card that is not there",
    "memory_stats": lambda *_: {},
    "Stream": Stream,
    "Event": Event,
    "current_stream": lambda *_: CURRENT,
    "default_stream": lambda *_: CURRENT,
    "stream": nullcontext,
    "set_stream": lambda _: None,
    "reset_peak_memory_stats": lambda *_: None,
    **dict.fromkeys(
        ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), lambda *_: 0
    ),
}
LOGGER: Any = torch._C._distributed_c10d.Logger  # noqa: SLF001 - DDP's, which reads CUDA's clock
RANGES = ("range_push", "range_pop", "mark")  # of torch.cuda.nvtx, for a profiler that does not look on


def _no_duals() -> int:
    raise ConfigError(
        "the step: derivatives that are taken forward (torch.func.jvp) are not recorded by CUDA's rules; those of a "
        "CPU can be (--device cpu)"
    )


@contextmanager
def cuda(native: Any) -> Iterator[None]:
    """One card, as far as Python sees. Backward runs on the thread that asks for it, in the order of CUDA's own."""
    native.set_choose(attention_kernel)
    resize: Any = torch.UntypedStorage.resize_
    clone: Any = torch.UntypedStorage.clone

    def cloned(storage: torch.UntypedStorage) -> Any:
        if storage.device.type != "cuda":
            return clone(storage)
        whole = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return whole.clone().untyped_storage()

    def resized(storage: torch.UntypedStorage, size: int) -> Any:
        if storage.device.type != "cuda":
            return resize(storage, size)
        native.resize(storage._cdata, size)  # noqa: SLF001 - the storage's identity
        return storage

    with ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resized))
        stack.enter_context(patch.object(torch.UntypedStorage, "clone", cloned))
        stack.enter_context(patch.object(torch.autograd.forward_ad, "enter_dual_level", _no_duals))
        stack.enter_context(patch.object(LOGGER, "set_runtime_stats_and_log", lambda _: None))
        stack.enter_context(patch.object(torch.backends.cudnn, "is_acceptable", lambda _: False))
        for name in RANGES:
            stack.enter_context(patch.object(torch.cuda.nvtx, name, lambda *_: 0))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        try:
            yield
        finally:
            native.set_choose(None)
