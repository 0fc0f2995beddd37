"""Freed memory is used again: pages that the kernel has to provide are counted."""

from __future__ import annotations

import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource
from ricciq.system.allocator import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():  # 64 MiB, each page of it
    block = bytearray(2**26)
    before = faults()
    del block
    return before

if {kept}:
    keep_freed_memory()
use()
before = faults()
for _ in range(4):
    use()
print(faults() - before)
"""


def pages(kept: bool) -> int:
    code = COUNT.format(kept=kept)
    command = [sys.executable, "-c", code]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_the_kernel_provides_large_memory_once() -> None:
    assert pages(kept=True) < 100
    assert pages(kept=False) > 1000
