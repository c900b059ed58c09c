"""The page as a wheel has it: beside its pages, started by `estimate app` from anywhere."""

import os
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

from page_server import Session, wait_for

ROOT = Path(__file__).parents[2]


def laid_out(folder):
    """The files of the wheel, as pyproject.toml lists them."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        (folder / target).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / source, folder / target)


def test_estimate_app_starts_the_page_from_anywhere(tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    site.mkdir()
    elsewhere.mkdir()
    laid_out(site)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "estimator", "app", "--no-browser", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": str(site)}
    server = subprocess.Popen(
        command, cwd=elsewhere, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}", 60)
        session = Session(f"http://127.0.0.1:{port}")
        assert session.exceptions == []
        assert session.inputs
    finally:
        os.killpg(server.pid, 15)  # streamlit is a child
        server.wait(timeout=20)
    assert list(elsewhere.iterdir()) == []
