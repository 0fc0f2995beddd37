"""Commands do not import what they do not need, such as torch or matplotlib: it takes seconds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import MAIN_JOB

RUN = """
import sys
from ricciq.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = sorted(set({heavy}) & sys.modules.keys())
sys.exit(code or (f"imported {{heavy}}" if heavy else 0))
"""


@pytest.fixture(scope="module")
def finished(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return shutil.copytree(finished_run, folder)


def run(words: list[str], folder: Path, heavy: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that fails with a message if it imports one of these modules."""
    line = [sys.executable, "-c", RUN.format(heavy=heavy), *words]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)


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
    done = run(words, finished, ["torch", "timm", "matplotlib"])
    assert (done.returncode, done.stderr) == (0, "")


def test_a_plan_needs_no_exporter_and_no_plots(tmp_path: Path) -> None:
    words = [*MAIN_JOB, "--dry-run", "--quiet"]
    done = run(words, tmp_path, ["onnx_ir", "onnxscript", "onnxruntime", "matplotlib", "jinja2"])
    assert (done.returncode, done.stderr) == (0, "")
