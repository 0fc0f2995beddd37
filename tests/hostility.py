"""A command line run under guard: in time, in little memory, writing only where it may."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from command import Answer, ricciq

SECONDS = 10
MEMORY = 2 << 30
_CLEAR = Path("/proc/self/clear_refs")


@contextmanager
def in_time() -> Iterator[None]:
    """Fail after ten seconds; end the process where not even a signal gets through."""

    def late(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        pytest.fail(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(6 * SECONDS, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def in_little_memory() -> Iterator[None]:
    """Fail where this process came to hold 2 GB, wherever the system tells."""
    if not os.access(_CLEAR, os.W_OK):
        yield
        return
    _CLEAR.write_text("5")  # the peak starts anew
    yield
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert int(kilobytes) << 10 < MEMORY, f"{int(kilobytes) >> 10} MB"


def _tree(folder: Path, but: Path) -> dict[Path, tuple[int, int]]:
    paths = [path for path in folder.rglob("*") if not path.is_relative_to(but)]
    return {path: (0, 0) if path.is_dir() else _state(path) for path in paths}


def _state(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_size, found.st_mtime_ns


def guarded(line: list[str | Path], folder: Path, output: Path) -> Answer:
    """What a command line answers.

    Args:
        line: its words.
        folder: that nothing may be written into.
        output: except here.
    """
    before = _tree(folder, output)
    with in_time(), in_little_memory():
        answer = ricciq(*line)
    assert _tree(folder, output) == before
    assert answer.code in (0, 2, 3), answer.err
    if answer.code:
        *progress, sentence = answer.err.splitlines()
        assert sentence.startswith("ricciq: ")
        assert len(sentence) < 1000
        assert "\x1b" not in sentence
        assert answer.out == ""
        assert not [said for said in progress if "ricciq:" in said or "Error" in said]
    return answer
