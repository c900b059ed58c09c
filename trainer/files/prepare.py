"""Text files -> token files, streaming: memory holds some chunks of text and the tokenizer, never the corpus."""

from __future__ import annotations

import itertools
import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from estimator.describe.checks import ConfigError
from trainer.files.data import DTYPES, smallest_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"  # stands after each file; GPT-2's name for it
CHUNK = 1 << 16  # characters read at once; also the grain at which text goes to train or valid
BATCH = 64  # chunks that the tokenizer encodes at once, in parallel
TOKENIZER_BYTES = 1 << 28  # text that the BPE learns from; its merges hardly change beyond some hundred megabytes


@dataclass(frozen=True, slots=True)
class PrepareConfig:
    """Turn text into a corpus that `train` reads.

    Attributes:
        files: text files, or folders of them, in UTF-8; none: the sources of Python's own standard library.
        out: folder for train.bin, valid.bin, tokenizer.json and manifest.json.
        vocab_size: ids of the byte-level BPE, the 256 bytes and the end-of-text id included.
        bytes: no BPE: one token a byte, 257 ids.
        valid_fraction: share of the text held out for validation.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    out: Path = Path("data/stdlib")
    vocab_size: int = 2048
    bytes: bool = False
    valid_fraction: float = 0.05

    def __post_init__(self) -> None:
        if not self.bytes and self.vocab_size < 257:
            raise ConfigError(f"vocab_size = {self.vocab_size}: the 256 bytes and {END_OF_TEXT} need at least 257")
        if not 0 < self.valid_fraction < 1:
            raise ConfigError(f"valid_fraction = {self.valid_fraction}: must lie between 0 and 1")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Write the four files of `config.out` and return the manifest.

    The manifest is removed first and written last, and each file under another name until it is whole: a folder with
    a manifest is complete.

    Raises:
        ConfigError: a file is missing, or there is too little text for two splits.
    """
    files = text_files(config.files)
    total = sum(file.stat().st_size for file in files)
    chunk = max(64, min(CHUNK, total // 100))  # at least some hundred chunks, so that each split gets its share
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "manifest.json").unlink(missing_ok=True)

    if config.bytes:
        tokenizer = byte_tokenizer()
    else:
        every = max(1, total // TOKENIZER_BYTES)
        train_text = (text for text, valid in split(files, chunk, config.valid_fraction) if text and not valid)
        tokenizer = train_bpe(itertools.islice(train_text, 0, None, every), config.vocab_size)
    vocab_size = tokenizer.get_vocab_size()
    write_whole(config.out / "tokenizer.json", tokenizer.to_str(pretty=True).encode())

    dtype = smallest_dtype(vocab_size)
    counts = {name: np.zeros(vocab_size, dtype=np.int64) for name in ("train", "valid")}
    sizes = dict.fromkeys(counts, 0)
    parts = {name: (config.out / f"{name}.bin.part").open("wb") for name in counts}
    try:
        for batch in batches(split(files, chunk, config.valid_fraction), BATCH):
            for (text, valid), ids in zip(batch, encode(tokenizer, [text for text, _ in batch]), strict=True):
                name = "valid" if valid else "train"
                parts[name].write(ids.astype(DTYPES[dtype]).tobytes())
                counts[name] += np.bincount(ids, minlength=vocab_size)
                sizes[name] += len(text.encode())
    finally:
        for part in parts.values():
            part.close()
    for name, count in counts.items():
        if not count.sum():
            raise ConfigError(f"{total} bytes of text: too few for a train and a valid split")
        (config.out / f"{name}.bin.part").replace(config.out / f"{name}.bin")

    manifest = {
        "format": 1,
        "tokenizer": "bytes" if config.bytes else "byte-level BPE",
        "vocab_size": vocab_size,
        "dtype": dtype,
        "end_of_text": tokenizer.token_to_id(END_OF_TEXT),
        "source": f"{len(files)} files" if config.files else f"standard library of Python, {len(files)} files",
        "train_tokens": int(counts["train"].sum()),
        "valid_tokens": int(counts["valid"].sum()),
        "train_bytes": sizes["train"],
        "valid_bytes": sizes["valid"],
        "unigram_loss": unigram_loss(counts["train"], counts["valid"]),
    }
    write_whole(config.out / "manifest.json", (json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode())
    return manifest


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The files of `paths`, folders searched, in a fixed order; for none the standard library's modules.

    Raises:
        ConfigError: a path does not exist, or there is no file with text in it.
    """
    if not paths:
        library = Path(sysconfig.get_path("stdlib"))
        # Installed packages are not the library, and its tests are half of its bytes and repetitive.
        skip = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
        return sorted(f for f in library.rglob("*.py") if skip.isdisjoint(f.relative_to(library).parts))
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder")
        files += sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"{', '.join(map(str, paths))}: no text in them")
    return files


def split(files: Iterable[Path], chunk: int, valid_fraction: float) -> Iterator[tuple[str, bool]]:
    """(text, is validation) chunk by chunk; an empty text ends a file.

    Chunk k is validation when the running count of k x fraction passes a whole number: exact shares, evenly spread,
    the same on every pass.
    """
    k = 0
    for file in files:
        valid = False
        # Text that is not UTF-8 is kept, with U+FFFD for what cannot be read: one odd byte should not stop a corpus.
        with file.open(encoding="utf-8", errors="replace", newline="") as stream:
            # To the line's end, so that words stay whole, but bounded: a file may be one line of any length.
            while text := stream.read(chunk):
                valid = int((k + 1) * valid_fraction) > int(k * valid_fraction)
                yield text + stream.readline(chunk), valid
                k += 1
        yield "", valid


def batches(items: Iterable[tuple[str, bool]], n: int) -> Iterator[list[tuple[str, bool]]]:
    """Lists of `n` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, n)):
        yield batch


def encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.int64]]:
    """The ids of each text; the end-of-text id for an empty one."""
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.int64)
    for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        yield np.array(encoding.ids, dtype=np.int64) if text else end


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE (Radford et al. 2019, section 2.2): every byte has an id, so no text is out of vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415  (training has no use for it)

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_tokenizer() -> Tokenizer:
    """The byte-level BPE without a merge: id = byte, and 256 for the end of a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415  (as above)

    # Byte-level BPE writes bytes as printable characters: the printable ones stand for themselves, the other bytes,
    # in order, for the characters from 256 up (GPT-2's encoder.py, bytes_to_unicode).
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab={letter: byte for byte, letter in letters.items()}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    return tokenizer


def unigram_loss(train: NDArray[np.int64], valid: NDArray[np.int64]) -> float:
    """Nats a token that a model of word frequencies alone takes on `valid`: what any real model has to beat.

    Counts are of ids, (V,); one is added to each, so that an id unseen in training has a probability (Laplace).
    """
    probability = (train + 1) / (train + 1).sum()
    return float(-(valid * np.log(probability)).sum() / valid.sum())


def write_whole(path: Path, content: bytes) -> None:
    """Write `path` by renaming: it never holds half of `content`."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
