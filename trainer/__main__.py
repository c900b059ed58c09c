"""`python -m trainer COMMAND`: prepare, train, curve, generate, export, lr-experiment."""

import sys
from importlib.util import find_spec

NEEDED = ("torch", "tokenizers", "safetensors", "tyro")

if __name__ == "__main__":
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.stderr.write(f"error: {missing[0]} is missing: pip install 'transformer-estimator[trainer]'\n")
        sys.exit(2)
    from trainer.parallel.distributed import end_process
    from trainer.run.commands import main

    end_process(main())
