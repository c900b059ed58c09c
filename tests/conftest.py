"""What all tests share."""

import gc
from pathlib import Path

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
