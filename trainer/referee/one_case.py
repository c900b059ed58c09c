"""Estimate and measure one model and plan for another program, such as the page, that does without torch itself.

Reads {"model": {...}, "plan": {...}} from stdin. Writes JSON lines: {"done": fraction, "doing": text} on the way, then
{"rows": [...]}, or {"error": text} where the case cannot be measured on this machine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from estimator.describe.checks import ConfigError
from estimator.describe.model import ModelConfig
from estimator.describe.plan import Plan


def main() -> int:
    """The program; 0 if there are rows, 2 if there is an error."""
    given = json.load(sys.stdin)
    _say(done=0.1, doing="loading PyTorch")
    from trainer.referee.validate import compare  # noqa: PLC0415 - torch takes seconds, and the line above comes first

    _say(done=0.6, doing="running real steps")
    try:
        rows = compare(ModelConfig(**given["model"]), Plan(**given["plan"]))
    except (ConfigError, RuntimeError, NotImplementedError) as error:  # the CPU has no kernel for every recipe
        _say(error=str(error))
        return 2
    _say(rows=[asdict(row) | {"difference": row.difference} for row in rows])
    return 0


def _say(**line: object) -> None:
    sys.stdout.write(json.dumps(line, allow_nan=False) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
