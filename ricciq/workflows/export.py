"""The ONNX file of a run, written again."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from ricciq.deploy.export import export_onnx
from ricciq.deploy.modules import deploy, in_float_operators
from ricciq.errors import (
    UsageError,
)
from ricciq.report.schema import load_report
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import accuracy_for_onnx
from ricciq.workflows.saved import rebuild


def export_run(
    path: Path, output: Path | None = None, *, as_float: bool = False, dry_run: bool = False
) -> Path:
    """Write the ONNX file of a run again, with the accuracy its report tells of it.

    Args:
        path: a run folder or a checkpoint file a run wrote.
        output: the file to write; by default model.onnx (or model-float.onnx) beside the weights.
        as_float: write float operators and float weights that hold the discrete values.
        dry_run: open the run, and write nothing.

    Returns:
        The file.

    Raises:
        CheckpointError: the run has no usable best.safetensors.
        InputError: its report.json is damaged.
        UsageError: the run's folder is in use, the checkpoint is in none and `output` is None, or
            the folder of `output` does not exist.
    """
    trained = rebuild(path)
    model = deploy(trained.model)
    folder = RunFolder(path if path.is_dir() else path.parent)
    stored = trained.metadata.for_onnx()
    if as_float:
        in_float_operators(model)
    elif folder.is_finished and path in (folder.path, folder.best):
        stored |= accuracy_for_onnx(load_report(folder.report).onnx)
    if output is None and not folder.is_ours:
        raise UsageError(f"{path} lies in no folder of a run; give --output and the file to write")
    written = output or (folder.onnx_in_float if as_float else folder.onnx)
    if not os.path.isdir(written.parent):
        raise UsageError(f"there is no folder {written.parent}; make it or give another --output")
    if dry_run:
        return written
    with nullcontext() if output else folder.locked():
        return export_onnx(model, written, trained.metadata.preprocessing, stored)
