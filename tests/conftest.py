"""What all tests share."""

import gc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Accounts are thousands of small objects that live on; walking them again and again took a tenth of the suite's time.
gc.set_threshold(50_000, 20, 50)

# How long an example takes says how busy the machine is, not whether the code is right.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


FULL = 400  # tests after which what was set aside is looked at again
_tests = 0


def pytest_runtest_setup():
    """Set what lives on aside: each measurement of memory lets the collector run first, which would walk it all."""
    global _tests  # noqa: PLW0603 - the one thing that is counted
    _tests += 1
    if _tests % FULL == 0:
        gc.unfreeze()
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path, config):
    """With `-m quick` only files that have quick tests are imported: others want torch, or take seconds to import."""
    path = Path(collection_path)
    if config.option.markexpr != "quick" or path.suffix != ".py":
        return None
    return "mark.quick" not in path.read_text(encoding="utf-8") or None


@pytest.fixture
def no_onednn():
    """Its products in bf16 take scratch that depends on the machine; without it, what is left is PyTorch's own."""
    import torch

    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    yield
    torch.backends.mkldnn.enabled = enabled


@pytest.fixture(scope="module")
def one_thread():
    """Tensors of some bytes are handed to a second thread in vain, and slowly on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
