"""The ONNX file of a run, written again."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from ricciq.deploy.export import export_onnx
from ricciq.deploy.formats.catalog import DEFAULT, find_format
from ricciq.deploy.modules import deploy
from ricciq.errors import UsageError
from ricciq.report.schema import load_report
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import accuracy_for_onnx
from ricciq.workflows.saved import rebuild


def export_run(
    path: Path, output: Path | None = None, *, format_: str = DEFAULT.name, dry_run: bool = False
) -> Path:
    """Write the ONNX file of a run again, with the accuracy its report tells of it.

    Args:
        path: a run folder or a checkpoint file a run wrote.
        output: the file to write; by default the file of the format, beside the weights.
        format_: what the file is made of, by a name of `ricciq.deploy.formats.catalog`.
        dry_run: open the run, and write nothing.

    Returns:
        The file.

    Raises:
        CheckpointError: the run has no usable best.safetensors.
        InputError: its report.json is damaged.
        UsageError: there is no such format, the run's folder is in use, the checkpoint is in none
            and `output` is None, or the folder of `output` does not exist.
    """
    chosen = find_format(format_)
    trained = rebuild(path)
    model = chosen.apply(deploy(trained.model))
    folder = RunFolder(path if path.is_dir() else path.parent)
    stored = trained.metadata.for_onnx()
    if chosen is DEFAULT and folder.is_finished and path in (folder.path, folder.best):
        stored |= accuracy_for_onnx(load_report(folder.report).onnx)
    if output is None and not folder.is_ours:
        raise UsageError(f"{path} lies in no folder of a run; give --output and the file to write")
    written = output or folder.path / chosen.file
    if not os.path.isdir(written.parent):
        raise UsageError(f"there is no folder {written.parent}; make it or give another --output")
    if dry_run:
        return written
    with nullcontext() if output else folder.locked():
        return export_onnx(model, written, trained.metadata.preprocessing, stored)
