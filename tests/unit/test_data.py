import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from estimator.describe.checks import ConfigError
from trainer.files.data import Dataset, get_batch, philox
from trainer.files.prepare import END_OF_TEXT, PrepareConfig, prepare, split, text_files


@given(
    n=st.integers(2, 300),
    B=st.integers(1, 9),
    data=st.data(),
    dtype=st.sampled_from(["uint16", "uint32", "int64"]),
    seed=st.integers(0, 2**32),
)
def test_batches_are_windows_of_the_corpus_and_targets_are_one_token_later(n, B, data, dtype, seed):
    T = data.draw(st.integers(1, n - 1))
    corpus = np.arange(n, dtype=dtype)  # the value of a token is its place
    inputs, targets = get_batch(corpus, B, T, "cpu", rng=np.random.default_rng(seed))
    for x in (inputs, targets):
        assert x.shape == (B, T)
        assert x.dtype == torch.int64
        assert x.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(T))
    assert inputs.min() >= 0
    assert targets.max() <= n - 1


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_ids_keep_their_value_up_to_the_last_of_the_dtype(dtype):
    top = np.iinfo(dtype).max
    inputs, targets = get_batch(np.full(10, top, dtype=dtype), 2, 9, "cpu")
    assert (inputs == int(top)).all()
    assert (targets == int(top)).all()


def test_every_start_is_equally_likely_first_and_last_included():
    n, T, draws = 12, 4, 16_000
    inputs, _ = get_batch(np.arange(n, dtype=np.uint16), draws, T, "cpu", rng=np.random.default_rng(0))
    counts = Counter(inputs[:, 0].tolist())
    assert sorted(counts) == list(range(n - T))
    expected = draws / (n - T)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    assert chi_squared < 24.3  # the 99.9 % point of chi-squared with 7 degrees of freedom


def test_a_corpus_shorter_than_a_window_is_refused_with_the_figures():
    with pytest.raises(ConfigError, match="need 9 tokens, the corpus has 8"):
        get_batch(np.zeros(8, dtype=np.uint16), 1, 8, "cpu")


def test_an_id_beyond_the_vocabulary_is_refused_with_the_figure():
    corpus = np.array([1, 2, 300, 4], dtype=np.uint16)
    get_batch(corpus, 1, 3, "cpu", vocab_size=301)
    with pytest.raises(ConfigError, match=r"token id 300 .*vocab_size = 300"):
        get_batch(corpus, 1, 3, "cpu", vocab_size=300)


@pytest.mark.parametrize("corpus", [np.zeros((4, 4), dtype=np.uint16), np.zeros(16, dtype=np.float32)])
def test_a_corpus_that_is_no_row_of_integers_is_refused(corpus):
    with pytest.raises(ConfigError, match="one row of integers"):
        get_batch(corpus, 1, 2, "cpu")


def test_only_the_windows_are_read_into_memory(tmp_path):
    n = 20_000_000
    np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.uint16, shape=(n,)).flush()
    corpus = np.load(tmp_path / "x.npy", mmap_mode="r")
    tracemalloc.start()
    get_batch(corpus, 4, 32, "cpu")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # the corpus is 40,000,000 bytes


def test_draws_of_the_stream_do_not_depend_on_those_before():
    first = [philox(7, 0, i).integers(1 << 40, size=4).tolist() for i in range(50)]
    again = [philox(7, 0, i).integers(1 << 40, size=4).tolist() for i in reversed(range(50))]
    assert first == again[::-1]
    others = [philox(7, 1, i).integers(1 << 40, size=4).tolist() for i in range(50)]
    other_seed = [philox(8, 0, i).integers(1 << 40, size=4).tolist() for i in range(50)]
    assert len({tuple(x) for x in first + others + other_seed}) == 150


def write(folder: Path, tokens: int, code: str = "<u2", **manifest: object) -> Path:
    for name in ("train", "valid"):
        np.arange(tokens, dtype=code).tofile(folder / f"{name}.bin")
    if manifest:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_dataset_gives_the_same_batch_for_the_same_index(tmp_path):
    a = Dataset(write(tmp_path, 500), 8, 4, seed=3)
    b = Dataset(tmp_path, 8, 4, seed=3)
    a.get_batch("train")
    assert torch.equal(a.get_batch("train", 5)[0], b.get_batch("train", 5)[0])
    assert not torch.equal(a.get_batch("train", 5)[0], a.get_batch("train", 6)[0])
    assert not torch.equal(a.get_batch("train", 5)[0], a.get_batch("valid", 5)[0])


def test_dataset_takes_the_dtype_of_the_manifest(tmp_path):
    data = Dataset(write(tmp_path, 500, "<u4", dtype="uint32", vocab_size=500), 499, 1)
    assert data.tokens("train") == 500
    assert data.get_batch("valid", 0)[1].tolist() == [list(range(1, 500))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context_length": 10}, r"train.bin: 10 tokens, a window of 10 .* 11"),
        ({"context_length": 4, "vocab_size": 9}, r"vocab_size = 9: the tokenizer .* 10 ids"),
        ({"context_length": 4, "dtype": "uint8"}, r"dtype = 'uint8': did you mean uint"),
    ],
)
def test_dataset_refuses_what_does_not_fit(tmp_path, arguments, message):
    write(tmp_path, 10, vocab_size=10)
    with pytest.raises(ConfigError, match=message):
        Dataset(tmp_path, batch_size=1, **arguments)


def test_dataset_refuses_missing_broken_and_foreign_files(tmp_path):
    with pytest.raises(ConfigError, match=r"train.bin: no such file; make it with"):
        Dataset(tmp_path, 4, 1)
    write(tmp_path, 10)
    (tmp_path / "valid.bin").write_bytes(bytes(21))
    with pytest.raises(ConfigError, match="21 bytes is no whole number of uint16"):
        Dataset(tmp_path, 4, 1)
    for content, message in (("{", "not JSON"), ("[]", "JSON object")):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ConfigError, match=message):
            Dataset(tmp_path, 4, 1)


TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=400), min_size=1, max_size=4)


@settings(deadline=None, max_examples=20)
@given(texts=TEXTS, as_bytes=st.booleans())
def test_prepared_tokens_decode_to_the_text(tmp_path_factory, texts, as_bytes):
    folder = tmp_path_factory.mktemp("text")
    files = []
    for i, text in enumerate([*texts, "some words that are there always\n" * 60]):
        files.append(folder / f"{i}.txt")
        files[-1].write_bytes(text.encode())
    manifest = prepare(PrepareConfig(tuple(files), folder / "out", 300, as_bytes, 0.3))
    tokenizer = Tokenizer.from_file(str(folder / "out" / "tokenizer.json"))
    decoded = {}
    for name in ("train", "valid"):
        ids = np.fromfile(folder / "out" / f"{name}.bin", dtype="<u2")
        assert len(ids) == manifest[f"{name}_tokens"]
        assert ids.max() < manifest["vocab_size"] == tokenizer.get_vocab_size()
        decoded[name] = tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode()
        ends = decoded[name].count(END_OF_TEXT.encode())
        assert len(decoded[name]) - ends * len(END_OF_TEXT) == manifest[f"{name}_bytes"]
        if as_bytes:
            expected = b"".join(b"" if i == 256 else bytes([i]) for i in ids.tolist())
            assert expected == decoded[name].replace(END_OF_TEXT.encode(), b"")
    chunk = max(64, sum(f.stat().st_size for f in files) // 100)
    parts = {True: "", False: ""}
    for text, valid in split(files, chunk, 0.3):
        parts[valid] += text or END_OF_TEXT
    assert decoded == {"train": parts[False].encode(), "valid": parts[True].encode()}


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.integers(64, 1000))
@settings(max_examples=30, deadline=None)
def test_split_keeps_all_text_and_the_share(tmp_path_factory, lines, fraction, chunk):
    file = tmp_path_factory.mktemp("split") / "x.txt"
    file.write_text("".join(f"line {i}\r\n" for i in range(lines)), newline="")
    chunks = list(split([file], chunk, fraction))
    assert "".join(text for text, _ in chunks) == file.read_bytes().decode()
    assert chunks[-1][0] == ""
    assert sum(valid for text, valid in chunks if text) == int((len(chunks) - 1) * fraction)


def test_a_long_line_does_not_come_in_one_piece(tmp_path):
    (tmp_path / "x").write_text("a" * 10_000)
    assert max(len(text) for text, _ in split([tmp_path / "x"], 100, 0.5)) == 200


def test_vocabularies_beyond_16_bits_are_stored_in_32(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("text\n" * 1000)
    monkeypatch.setattr("trainer.files.prepare.smallest_dtype", lambda _: "uint32")
    assert prepare(PrepareConfig((tmp_path / "x",), tmp_path / "out", bytes=True))["dtype"] == "uint32"
    inputs, _ = Dataset(tmp_path / "out", 16, 2).get_batch("train", 0)
    assert bytes(inputs[0].tolist()).decode() in "text\n" * 10


def test_unigram_loss_is_the_entropy_where_both_splits_have_the_same_frequencies(tmp_path):
    (tmp_path / "x").write_text("ab\n" * 100_000)
    manifest = prepare(PrepareConfig((tmp_path / "x",), tmp_path / "out", bytes=True))
    assert manifest["unigram_loss"] == pytest.approx(np.log(3), abs=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 256}, "need at least 257"),
        ({"valid_fraction": 0.0}, "between 0 and 1"),
        ({"valid_fraction": 1.0}, "between 0 and 1"),
    ],
)
def test_prepare_refuses_bad_settings(fields, message):
    with pytest.raises(ConfigError, match=message):
        PrepareConfig(**fields)


def test_prepare_refuses_missing_and_empty_text(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        prepare(PrepareConfig((tmp_path / "missing",), tmp_path / "out"))
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="no text"):
        prepare(PrepareConfig((tmp_path / "empty",), tmp_path / "out"))
    (tmp_path / "short").write_text("a")
    with pytest.raises(ConfigError, match="too few"):
        prepare(PrepareConfig((tmp_path / "short",), tmp_path / "out", bytes=True))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_default_text_is_the_standard_library_without_installed_packages():
    files = text_files(())
    assert {"argparse.py", "heapq.py"} <= {file.name for file in files}
    assert not [file for file in files if "site-packages" in file.parts]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux says how much of a file is resident")
def test_a_large_corpus_does_not_become_resident(tmp_path):
    for name in ("train", "valid"):
        np.zeros(2**25, dtype="<u2").tofile(tmp_path / f"{name}.bin")  # 64 MiB
    data = Dataset(tmp_path, 512, 64)

    def resident():
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile")]
        return 1024 * int(line.split()[1])

    before = resident()
    for index in range(300):  # 300 x 64 windows lie in more pages than the file has
        data.get_batch("train", index)
    assert resident() - before < 4 * 2**20


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({"vocab_size": "many"}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"dtype": "float32"}, "dtype"),
        ({"dtype": ["uint16"]}, "dtype"),
        ({"unigram_loss": "low"}, "unigram_loss = 'low': must be a number"),
    ],
)
def test_a_manifest_that_cannot_be_is_one_sentence(tmp_path, manifest, said):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=said) as refused:
        Dataset(tmp_path, 4, 1)
    assert "manifest.json" in str(refused.value)
    assert "\n" not in str(refused.value)
