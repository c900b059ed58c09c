"""What all tests share."""

import gc
from pathlib import Path

# Accounts are thousands of small objects that live on; walking them again and again took a tenth of the suite's time.
gc.set_threshold(50_000, 20, 50)


def pytest_ignore_collect(collection_path, config):
    """With `-m quick` only files that have quick tests are imported: others want torch, or take seconds to import."""
    path = Path(collection_path)
    if config.option.markexpr != "quick" or path.suffix != ".py":
        return None
    return "mark.quick" not in path.read_text(encoding="utf-8") or None
