"""Random windows of a token file, by position in the stream: nothing is read but the windows themselves."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from estimator.describe.checks import ConfigError, choose, positive_int, shown

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Little-endian on every machine, so that a prepared corpus can be copied between machines.
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
SPLITS = ("train", "valid")
ADVISES = hasattr(mmap.mmap, "madvise")


def smallest_dtype(vocab_size: int) -> str:
    """The narrowest of "uint16" and "uint32" that holds ids 0 to vocab_size - 1."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def get_batch(
    dataset: NDArray[Any],
    batch_size: int,
    context_length: int,
    device: str | torch.device,
    *,
    rng: np.random.Generator | None = None,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`batch_size` windows of `dataset` and, one token later, their targets.

    Args:
        dataset: (n,) integer token ids; a memory map is read only where a window lies.
        batch_size: B, windows; each of the n - T start indices is equally likely, with replacement.
        context_length: T, tokens a window.
        device: where the two tensors go; on CUDA through pinned memory, without waiting for the copy.
        rng: the source of the start indices; None draws from the operating system's entropy.
        vocab_size: V; ids of V or more are refused. None checks nothing.

    Returns:
        inputs and targets, each (B, T) int64 and contiguous; targets[b, t] is the token after inputs[b, t].

    Raises:
        ConfigError: the corpus is shorter than T + 1 tokens, is not a row of integers, or holds an id beyond V.
    """
    B, T = positive_int("batch_size", batch_size), positive_int("context_length", context_length)
    if dataset.ndim != 1 or dataset.dtype.kind not in "iu":
        raise ConfigError(f"dataset of shape {dataset.shape} and dtype {dataset.dtype}: must be one row of integers")
    if len(dataset) < T + 1:
        raise ConfigError(
            f"context_length = {T}: a window and its target need {T + 1} tokens, the corpus has {len(dataset)}"
        )
    starts = (rng or np.random.default_rng()).integers(len(dataset) - T, size=B)
    # One gather of B rows of T + 1 tokens out of a strided view: no Python loop, and no token read twice.
    windows = np.lib.stride_tricks.sliding_window_view(dataset, T + 1)[starts]
    if vocab_size is not None and (largest := int(windows.max())) >= vocab_size:
        raise ConfigError(f"token id {largest} in the corpus: beyond the vocabulary (vocab_size = {vocab_size})")
    on_cuda = torch.device(device).type == "cuda"
    pair = torch.empty(2, B, T, dtype=torch.int64, pin_memory=on_cuda)
    out = pair.numpy()
    out[0], out[1] = windows[:, :-1], windows[:, 1:]  # widens to int64 on the way
    # From pinned memory the copy runs beside the GPU's work; torch keeps the pinned block until the copy has finished.
    inputs, targets = pair.to(device, non_blocking=on_cuda).unbind()
    return inputs, targets


def philox(seed: int, stream: int, index: int) -> np.random.Generator:
    """The generator of draw `index` of `stream`.

    Philox is counter-based (Salmon et al. 2011): draw i is reached without draws 0 to i - 1. So the position in the
    data *is* the index: resuming needs no generator's state, and n processes share one stream without talking.
    """
    # The counter has four 64-bit words and counts up from the lowest: index and stream stay clear of it.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, stream]))


class Dataset:
    """A folder with `train.bin` and `valid.bin`: raw token ids, memory-mapped.

    `manifest.json`, which `python -m trainer prepare` writes beside them, gives dtype and vocabulary; a folder without
    one holds uint16, as nanoGPT's do, unless `dtype` says otherwise.

    Args:
        path: the folder.
        context_length: T, tokens a window.
        batch_size: B, windows a batch.
        device: where batches go.
        seed: of the stream of windows.
        dtype: "uint16" or "uint32"; None takes the manifest's.
        vocab_size: V of the model, if it is to be checked against; None takes the manifest's.

    Raises:
        ConfigError: a file is missing, shorter than a window or of broken length, or its ids exceed the vocabulary.
    """

    def __init__(
        self,
        path: str | Path,
        context_length: int,
        batch_size: int,
        device: str | torch.device = "cpu",
        *,
        seed: int = 0,
        dtype: str | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.context_length, self.batch_size, self.device, self.seed = context_length, batch_size, device, seed
        self.manifest = read_manifest(self.path)
        words = self.manifest.get("vocab_size")
        if vocab_size is not None and words is not None and words > vocab_size:
            raise ConfigError(f"vocab_size = {vocab_size}: the tokenizer of {self.path} has {words} ids")
        self.vocab_size = vocab_size or words
        self.dtype = choose("dtype", dtype or self.manifest.get("dtype", "uint16"), DTYPES)
        self._maps: dict[str, mmap.mmap] = {}
        self._tokens = {split: self._open(split) for split in SPLITS}

    def _open(self, split: str) -> NDArray[Any]:
        file, dtype = self.path / f"{split}.bin", DTYPES[self.dtype]
        if not file.is_file():
            raise ConfigError(f"{file}: no such file; make it with `python -m trainer prepare --out {self.path}`")
        size = file.stat().st_size
        if size % dtype.itemsize:
            raise ConfigError(f"{file}: {size} bytes is no whole number of {self.dtype} tokens")
        if size // dtype.itemsize < self.context_length + 1:
            raise ConfigError(
                f"{file}: {size // dtype.itemsize} tokens, a window of {self.context_length} and its target need "
                f"{self.context_length + 1}"
            )
        with file.open("rb") as opened:
            mapped = self._maps[split] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        if ADVISES:
            mapped.madvise(mmap.MADV_RANDOM)  # no pages but those of a window
        return np.frombuffer(mapped, dtype=dtype)

    def tokens(self, split: str) -> int:
        """The number of tokens in `split` ("train" or "valid")."""
        return len(self._tokens[choose("split", split, SPLITS)])

    def get_batch(self, split: str, index: int | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and targets, each (B, T): batch number `index` of the split's stream, or a random one if None."""
        stream = SPLITS.index(choose("split", split, SPLITS))
        batch = get_batch(
            self._tokens[split],
            self.batch_size,
            self.context_length,
            self.device,
            rng=None if index is None else philox(self.seed, stream, index),
            vocab_size=self.vocab_size,
        )
        if ADVISES:  # the pages stay in the system's cache; as this process's memory they would add up to the file
            self._maps[split].madvise(mmap.MADV_DONTNEED)
        return batch


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus; empty if the folder has none.

    Raises:
        ConfigError: it is not a JSON object, or a field of it cannot be.
    """
    file = path / "manifest.json"
    if not file.is_file():
        return {}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    if not isinstance(manifest, dict):
        raise ConfigError(f"{file}: must hold a JSON object, holds a {type(manifest).__name__}")
    if manifest.get("vocab_size") is not None:
        positive_int(f"{file}: vocab_size", manifest["vocab_size"])
    choose(f"{file}: dtype", manifest.get("dtype", "uint16"), DTYPES)
    loss = manifest.get("unigram_loss")
    if loss is not None and (isinstance(loss, bool) or not isinstance(loss, (int, float))):
        raise ConfigError(f"{file}: unigram_loss = {shown(loss)}: must be a number")
    return manifest
