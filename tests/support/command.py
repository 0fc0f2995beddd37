"""The command line, run in this process, also where a module makes its runs once."""

import io
import json
import os
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import typer

from ricciq.cli.app import app, main
from ricciq.recipe import shipped_recipes

ROOT = Path(__file__).parent.parent.parent
MAIN_JOB = ["quantize", "digits_resnet8", "--data", "digits", "--bits", "2"]
"""What the README begins with."""


class Answer(NamedTuple):
    code: int
    out: str
    err: str


def ricciq(*arguments: str | Path) -> Answer:
    """Run a command line."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ),  # --offline sets variables, which other tests must not see
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        main([str(a) for a in arguments])
    return Answer(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def json_of(*arguments: str | Path, expect: int = 0) -> dict[str, Any]:
    """Run a command line with --json; its stdout must be one JSON object and nothing else."""
    answer = ricciq(*arguments, "--json")
    assert answer.code == expect, answer.err
    assert "Traceback" not in answer.err
    values: dict[str, Any] = json.loads(answer.out) if answer.out else {}
    return values


def verbs() -> Iterator[Any]:
    """Every verb, those of groups included, and every group."""
    waiting = [typer.main.get_command(app)]
    while waiting:
        command: Any = waiting.pop()
        yield command
        waiting += getattr(command, "commands", {}).values()


def check_command(words: list[str]) -> None:
    """Parse a command line that a page shows, and look for the recipes it names."""
    command: Any = typer.main.get_command(app)
    at = 1
    while hasattr(command, "commands"):
        command, at = command.commands[words[at]], at + 1
    values = command.make_context(words[at - 1], words[at:]).params
    named = [values.get("recipe")]
    if words[1] == "recipes":
        named += [values.get("name"), *values.get("names", ())]
    for recipe in filter(None, named):
        assert recipe in shipped_recipes() or (ROOT / recipe).is_file()
