"""The part of the recorder that is written in C++: compiled at its first use, once for each version of torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from estimator.describe.checks import ConfigError

SOURCE = Path(__file__).with_name("recorder.cpp")


class NoCompilerError(ConfigError):
    """The extension is not built yet, and cannot be built here."""


@cache
def extension() -> Any:
    """The module that recorder.cpp defines (about half a minute where it has to be compiled).

    It is kept where torch keeps extensions: `TORCH_EXTENSIONS_DIR`, or the user's cache.

    Raises:
        NoCompilerError: it is not there, and cannot be compiled.
    """
    version = f"{torch.__version__}-{sys.implementation.cache_tag}".replace(".", "_").replace("+", "_")
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    name = f"step_recorder_{version.replace('-', '_')}_{digest}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    built = root / name / f"{name}.so"
    return _imported(name, built) if built.exists() else _built(name, built)


def _built(name: str, to: Path) -> Any:
    """Compile in a folder of our own and move the result: two processes may do it at once, and one may be killed."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            module = cpp_extension.load(name, [str(SOURCE)], extra_cflags=["-O1", "-DNDEBUG"], build_directory=folder)
        except (RuntimeError, OSError) as error:
            wanted = "a C++ compiler (g++ or clang++), Python's headers and ninja (pip install ninja)"
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise NoCompilerError(
                f"recording a step compiles one file of C++ at its first use, which needs {wanted}: {first}"
            ) from error
        to.parent.mkdir(parents=True, exist_ok=True)
        beside = to.with_suffix(f".{os.getpid()}")
        shutil.copy(Path(folder) / to.name, beside)
        beside.replace(to)
    return module


def _imported(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
