"""Commands in processes of their own, forked from one that has done what is slow the first time.

An import of torch takes longer than most of what tests want of a process. What concerns imports or
environment variables that are read by them needs `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest

forking = multiprocessing.get_context("forkserver")
forking.set_forkserver_preload(["warm"])


def start(
    arguments: Sequence[str | Path],
    *,
    code: str = "",
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Run a command line of ricciq, with one thread as the tests do: sums depend on the threads.

    Args:
        arguments: what would follow `ricciq`.
        code: is executed first.
        cwd: its working directory.
        environment: variables to set.
    """
    return Process([str(a) for a in arguments], code, str(cwd or Path.cwd()), environment or {})


class Process:
    """As `subprocess.Popen`, with text streams; it leads a session, as from a terminal."""

    def __init__(
        self, arguments: list[str], code: str, cwd: str, environment: Mapping[str, str]
    ) -> None:
        self._streams = tempfile.TemporaryDirectory()
        streams = [str(Path(self._streams.name, name)) for name in ("out", "err")]
        job = (arguments, code, cwd, dict(environment), streams)
        _start_server()
        self._process = forking.Process(target=_run, args=job)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for the end, and return what was printed to stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s")
        out, err = (Path(self._streams.name, name).read_text() for name in ("out", "err"))
        return out, err


@cache
def _start_server() -> None:
    """Start the process that is forked; it finds `warm` by the environment variable only."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def _run(
    arguments: list[str],
    code: str,
    cwd: str,
    environment: dict[str, str],
    streams: list[str],
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= {"OMP_NUM_THREADS": "1", **environment}
    os.chdir(cwd)
    from ricciq.cli import main

    sys.argv = ["ricciq", *arguments]
    exec(code, {})
    main(arguments)
