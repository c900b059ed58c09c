"""PyTorch's memory snapshots, and pickles that are none."""

import pickle

import pytest

from estimator.answers.snapshots import read_snapshot
from estimator.describe.checks import ConfigError

pytestmark = pytest.mark.quick


def entry(action, addr, size, line):
    frames = [
        {"filename": "/site-packages/torch/nn/functional.py", "line": 1, "name": "linear"},
        {"filename": "train.py", "line": line, "name": "forward"},
    ]
    return {"action": action, "addr": addr, "size": size, "stream": 0, "time_us": addr, "frames": frames}


# The fields that torch/csrc/cuda/memory_snapshot.cpp writes.
SNAPSHOT = {
    "segments": [{"device": 0, "address": 0, "total_size": 2 << 20, "allocated_size": 3072, "stream": 0, "blocks": []}],
    "device_traces": [
        [
            entry("segment_alloc", 0, 2 << 20, 5),
            entry("alloc", 1, 1024, 10),
            entry("alloc", 2, 4096, 11),
            entry("free_requested", 2, 4096, 12),
            entry("free_completed", 2, 4096, 12),
        ]
    ],
    "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": ""},
}


def written(tmp_path, what):
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(what))
    return path


def test_a_timeline_from_the_allocators_history(tmp_path):
    found = read_snapshot(written(tmp_path, SNAPSHOT))
    assert found.start == 2048  # what is allocated at the end, less what was allocated on record
    assert found.live.tolist() == [3072, 7168, 3072]
    assert found.peak == 7168
    assert found.held_at_peak() == {"train.py:11": 4096, "before the recording": 2048, "train.py:10": 1024}
    assert found.reserved == 2 << 20


class Calls:
    def __reduce__(self):
        return print, ("called",)


def test_a_pickle_that_would_call_something_is_not_opened(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"names 'builtins\.print', and a snapshot is plain data"):
        read_snapshot(written(tmp_path, [Calls()]))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ([1, 2], "must have segments and device_traces"),
        ({"segments": [], "device_traces": [[]]}, "has no history of device 0"),
    ],
)
def test_what_is_no_snapshot_is_said_in_a_sentence(tmp_path, what, said):
    with pytest.raises(ConfigError, match=said):
        read_snapshot(written(tmp_path, what))


def test_what_is_no_pickle_is_said_in_a_sentence(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello")
    with pytest.raises(ConfigError, match="is no pickle"):
        read_snapshot(path)
