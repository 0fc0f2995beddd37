"""Write the ONNX file of a run again."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

from ricciq.data.preprocessing import InputType
from ricciq.deploy.export import export_onnx
from ricciq.deploy.formats.catalog import DEFAULT, find_format
from ricciq.deploy.inputs import check_input
from ricciq.deploy.modules import deploy
from ricciq.errors import UsageError
from ricciq.report.schema import load_report
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import accuracy_for_onnx
from ricciq.workflows.saved import rebuild


def export_run(
    path: Path,
    output: Path | None = None,
    *,
    format_: str = DEFAULT.name,
    input_type: InputType = "float",
    batch: int | None = None,
    dry_run: bool = False,
) -> Path:
    """Write the ONNX file of a run again; the default format also gets the reported accuracy.

    Args:
        path: a run folder, or a checkpoint that a run wrote.
        output: the file to write; by default one in the run's folder, named by the format, the
            input and the batch.
        format_: name of a format in `ricciq.deploy.formats.catalog`.
        input_type: what the file takes; with uint8 pixels, its logits are the same.
        batch: images in a call; None for any number.
        dry_run: open the run, but write nothing.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: the run has no usable best.safetensors.
        InputError: report.json is damaged.
        UsageError: the format is unknown, the file cannot take such a batch, the run's folder is in
            use, the folder of `output` does not exist, or `output` is None and the checkpoint is
            not in a run's folder.
    """
    chosen = find_format(format_)
    trained = rebuild(path)
    preprocessing = trained.metadata.preprocessing
    check_input(preprocessing, input_type, batch)
    model = chosen.apply(deploy(trained.model))
    folder = RunFolder(path if path.is_dir() else path.parent)
    stored = trained.metadata.for_onnx()
    if chosen is DEFAULT and folder.is_finished and path in (folder.path, folder.best):
        stored |= accuracy_for_onnx(load_report(folder.report).onnx)
    if output is None and not folder.is_ours:
        raise UsageError(
            f"{path} is not in the folder of a run; give --output and the file to write"
        )
    name = Path(chosen.file)
    marks = ("-uint8" if input_type == "uint8" else "") + (f"-batch{batch}" if batch else "")
    written = output or folder.path / f"{name.stem}{marks}{name.suffix}"
    if not os.path.isdir(written.parent):
        raise UsageError(
            f"there is no folder {written.parent}; create it, or give another --output"
        )
    if dry_run:
        return written
    with nullcontext() if output else folder.locked():
        return export_onnx(
            model, written, preprocessing, stored, input_type=input_type, batch=batch
        )
