"""Commands that need neither torch nor matplotlib do not import them, which takes seconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
from ricciq.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = sorted({"torch", "timm", "matplotlib"} & sys.modules.keys())
sys.exit(code or (f"imported {heavy}" if heavy else 0))
"""


@pytest.fixture(scope="module")
def finished(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return shutil.copytree(finished_run, folder)


@pytest.mark.parametrize(
    "words",
    [
        ["report", "."],
        ["report", ".", "--dry-run", "--json"],
        ["inspect", "model.onnx"],
        ["bench", "model.onnx"],
        ["recipes", "ls"],
        ["recipes", "show", "digits-float"],
    ],
    ids=" ".join,
)
def test_a_command_imports_no_heavy_library(finished: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=finished,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
