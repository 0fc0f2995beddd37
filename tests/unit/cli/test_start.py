"""How a command starts: what it imports is left out of garbage collection."""

from __future__ import annotations

import gc
import subprocess
import sys

from ricciq.cli.start import importing

FIRST = """
import gc
from ricciq.cli.start import importing
with importing():
    assert not gc.isenabled()
    import torch
assert gc.isenabled()
print(gc.get_freeze_count() > 10_000, gc.isenabled())
"""


def test_what_is_imported_first_is_never_looked_at_again():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_what_another_program_imported_is_left_alone():
    before, enabled = gc.get_freeze_count(), gc.isenabled()
    with importing():
        assert gc.isenabled() == enabled
    assert (gc.get_freeze_count(), gc.isenabled()) == (before, enabled)
