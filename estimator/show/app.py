"""`estimate app`: the page, in a browser, from wherever the package is installed."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from estimator.describe.checks import ConfigError
from estimator.show.commands import Parser

if TYPE_CHECKING:
    from collections.abc import Sequence


def script() -> Path:
    """The page's script: in a wheel it lies in the package of its pages, in a checkout beside it.

    Raises:
        ConfigError: this installation has no page.
    """
    spec = find_spec("app_pages")
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent
        for found in (folder / "app.py", folder.parent / "app.py"):
            if found.is_file():
                return found
    raise ConfigError("the page is not part of this installation: install the wheel, or run `streamlit run app.py`")


def run(argv: Sequence[str]) -> int:
    """The sub-command; it returns when the server is stopped.

    Raises:
        ModuleNotFoundError: streamlit is missing.
    """
    parser = Parser(prog="estimate app", description="Open the page in a browser; Ctrl-C stops it.")
    parser.add_argument("--port", type=int, default=8501, help="port of the server (8501)")
    parser.add_argument("--no-browser", action="store_true", help="start the server only")
    arguments = parser.parse_args(argv)
    if find_spec("streamlit") is None:
        raise ModuleNotFoundError("No module named 'streamlit'", name="streamlit")
    command = [sys.executable, "-m", "streamlit", "run", str(script()), "--server.port", str(arguments.port)]
    command += ["--server.headless", str(arguments.no_browser).lower()]
    with suppress(KeyboardInterrupt):
        return subprocess.run(command, check=False).returncode  # noqa: S603 - this Python, and streamlit
    return 0
