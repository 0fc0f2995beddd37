"""A command line run under guard: in time, in little memory, writing only where it may.

And what modules of hostile files have in common; they load this one as a plugin.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from command import Answer, ricciq
from mutations import NOTHING_OF_THE_KIND, Mutations, truncations

SECONDS = 10
MEMORY = 3 << 29
"""1.5 GiB above what the process held before: the tests before this one leave theirs behind."""
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
    """Fail where this process came to hold much more than before, wherever the system tells."""
    if not os.access(_CLEAR, os.W_OK):
        yield
        return
    _CLEAR.write_text("5")  # the peak starts anew
    before = _peak()
    yield
    grown = _peak() - before
    assert grown < MEMORY, f"{grown >> 20} MiB more than before"


def _peak() -> int:
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) << 10


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


QUICK = """
quantization: {reconstruction: 0, scale_search: 2}
data: {train_samples: 64, calibration_batches: 1, input_size: 8}
training: {epochs: 1}
seed: 0
device: cpu
"""
SURE = NOTHING_OF_THE_KIND | truncations(0.001, 0.1, 0.5, 0.9, 0.999)
"""What is wrong with a file of any kind."""
Call = Callable[..., Answer]


def each(mutations: Mutations) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("mutation", mutations.values(), ids=mutations)


def refused(answer: Answer, *words: str) -> None:
    assert answer.code in (2, 3), answer.err
    for word in words:
        assert word in answer.err


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that is done in a second."""
    path = tmp_path_factory.mktemp("quick") / "quick.yaml"
    path.write_text(QUICK)
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, quick: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    line = f"quantize digits_resnet8 --data digits --recipe {quick} --output {folder}"
    answer = ricciq(*line.split())
    assert answer.code == 0, answer.err
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder a command is run in, so deep that few names lead out of what is watched."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(place: Path, tmp_path: Path, quick: Path) -> Call:
    """Run a command line under guard; it may write to its output only."""

    def run(line: str, file: Path | None = None) -> Answer:
        output = place / "out"
        words = [word.format(file=file, output=output, quick=quick) for word in line.split()]
        return guarded(list(words), tmp_path, output)

    return run
