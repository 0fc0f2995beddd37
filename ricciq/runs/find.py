"""Find a finished run: the newest one, or the one that a path names."""

from __future__ import annotations

import os
from pathlib import Path

from ricciq.errors import InputError, UsageError
from ricciq.runs.folder import RUNS, RunFolder


def newest_finished() -> RunFolder:
    """The run that finished last, of those in the folder `RUNS` of the working directory.

    Raises:
        UsageError: there is none.
    """
    folders = [RunFolder(path) for path in RUNS.glob("*")]
    finished = [folder for folder in folders if folder.is_ours and folder.is_finished]
    if not finished:
        raise UsageError(
            f"there is no finished run in {RUNS.resolve()}; name a run, or start one with "
            "`ricciq quantize`"
        )
    return max(finished, key=lambda folder: folder.report.stat().st_mtime_ns)


def run_of(path: Path) -> RunFolder:
    """The run that a path names: its folder, or a file in it.

    Args:
        path: of either.
    """
    return RunFolder(path.parent if os.path.isfile(path) else path)


def onnx_file_of(path: Path) -> Path:
    """The ONNX file that a path names: itself, or that of the run whose folder or weights it is.

    Args:
        path: of an ONNX file, a run's folder, or a checkpoint of a run.

    Raises:
        InputError: it is another folder, or the run has no ONNX file yet.
    """
    if os.path.isdir(path):
        folder = RunFolder(path)
    elif path.suffix.lower() == ".safetensors":
        folder = RunFolder(path.parent)
    else:
        return path
    if not folder.is_ours:
        raise InputError(f"{path} is not the folder of a run; give one, or an .onnx file")
    if not folder.onnx.is_file():
        raise InputError(
            f"the run in {folder.path} has no {folder.onnx.name} yet; finish it with --resume"
        )
    return folder.onnx
