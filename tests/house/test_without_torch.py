"""Verbs that compute nothing with torch do not wait the seconds that importing it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from command import ricciq

RUN = """
import sys
from ricciq.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
heavy = sorted({"torch", "timm"} & sys.modules.keys())
sys.exit(code or (f"imported {heavy}" if heavy else 0))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    job = ("quantize", "digits_resnet8", "--data", "digits", "--bits", "8", "--epochs", "0")
    assert ricciq(*job, "--quiet", "--output", folder).code == 0
    return folder


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
def test_a_verb_does_not_import_torch(finished: Path, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *words],
        cwd=finished,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
