"""What the process frees it keeps: the system is asked for a page once."""

from __future__ import annotations

import subprocess
import sys

import pytest

from trainer.system.heap import keep_freed_memory

FAULTS = """
import resource, sys, torch
from trainer.system.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    torch.ones(2**24).add_(1)
for _ in range(12):  # small blocks that land between large ones cost a step a new place, now and then at first
    step()
before = faults()
for _ in range(4):
    step()
print(faults() - before)
"""


def page_faults(what):
    command = [sys.executable, "-c", FAULTS, what]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_that_was_freed_is_used_again_without_a_page_fault():
    if not keep_freed_memory():
        pytest.skip("the C library is not glibc: nothing to ask of it")
    assert page_faults("keep") < 100
    assert page_faults("as it is") > 1000
