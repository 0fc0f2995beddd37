"""The command line, run in this process, also where a module makes its runs once."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from ricciq import cli


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def ricciq(*arguments: str | Path) -> Answer:
    """Run a command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in arguments])
    return Answer(int(stop.value.code or 0), out.getvalue(), err.getvalue())
