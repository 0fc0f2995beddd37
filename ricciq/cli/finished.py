"""Commands on what a run left: its ONNX file, its weights and its report."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ricciq.cli import options
from ricciq.cli.start import importing
from ricciq.deploy.formats.catalog import DEFAULT, find_format
from ricciq.errors import DataError, UsageError
from ricciq.report.terminal import inspection_tables, prediction_table, printable, show
from ricciq.runs.find import newest_finished, onnx_file_of, run_of
from ricciq.runs.folder import RunFolder
from ricciq.system.offline import forbid_network
from ricciq.system.tables import write_csv

app = typer.Typer()

OnnxFile = Annotated[
    Path | None,
    typer.Argument(
        metavar="[FILE]",
        help="ONNX file, or a run; by default that of the newest finished run.",
    ),
]
Run = Annotated[
    Path | None,
    typer.Argument(help="Run folder or a file in it; by default the newest finished run."),
]


def _newest() -> RunFolder:
    folder = newest_finished()
    print(f"{folder.path} is taken: the newest finished run", file=sys.stderr)
    return folder


def _onnx_file(path: Path | None) -> Path:
    return onnx_file_of(_newest().path if path is None else path)


@app.command("eval", cls=options.NumbersCommand)
def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(
            help=".onnx file, run folder or checkpoint; by default the .onnx file of the newest "
            "finished run."
        ),
    ] = None,
    data: options.MaybeData = None,
    data_dir: options.DataDir = None,
    split: options.EvaluatedSplit = "val",
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.ResizeMethod = None,
    class_map: options.ClassMap = None,
    like: options.Like = None,
    reference: Annotated[
        Path | None, typer.Option(help="Measure agreement with this .onnx file, run or checkpoint.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(help="Exit with 4 below this top-1, percent.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Exit with 4 below this agreement, percent.")
    ] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Measure TARGET on the validation data: top-1, top-5, loss, latency, agreement.

    Without --data, it is measured on the data that it was made with.

    Example: ricciq eval model.onnx

    Example: ricciq eval model.onnx --data digits --min-top1 95

    Example: ricciq eval model.onnx --data digits --reference float.onnx --min-agreement 97

    Example: ricciq eval other.onnx --data ./imagenet --mean 0.5,0.5,0.5 --std 0.5,0.5,0.5
    """
    if offline:
        forbid_network()
    for flag, gate in (("--min-top1", min_top1), ("--min-agreement", min_agreement)):
        if gate is not None and not math.isfinite(gate):  # no accuracy is below NaN
            raise UsageError(f"{flag} {gate} is not a percentage; give one, such as 70")
    if min_agreement is not None and reference is None:
        raise UsageError(
            f"--min-agreement {min_agreement} needs a file or run to compare with; give --reference"
        )
    evaluated = options.evaluated_split(split)
    preprocessing = options.preprocessing(input_size, mean, std, crop_pct, interpolation)
    target = target or _onnx_file(None)
    with importing():
        from ricciq.system.journal import Journal
        from ricciq.workflows.evaluate import check_gates, evaluate_target
        from ricciq.workflows.saved import Given

    result = evaluate_target(
        target,
        data,
        data_dir,
        reference,
        given=Given(preprocessing, class_map, like),
        split=evaluated,
        batch_size=batch_size or 64,
        workers=workers,
        journal=Journal(Console(stderr=True)),
    )
    show(result, as_json)
    check_gates(target, result, min_top1, min_agreement)


@app.command(cls=options.NumbersCommand)
def predict(
    target: Annotated[
        str, typer.Argument(help=".onnx file, run folder, checkpoint, or timm model name.")
    ],
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Files, folders, or patterns of files.")
    ],
    top: Annotated[int, typer.Option(min=1, help="Number of classes for each image.")] = 5,
    input_size: options.InputSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    crop_pct: options.CropPct = None,
    interpolation: options.ResizeMethod = None,
    class_map: options.ClassMap = None,
    like: options.Like = None,
    csv: Annotated[Path | None, typer.Option(help="Write a table of the classes here.")] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show the most likely classes of images, with their probabilities.

    Example: ricciq predict model.onnx cat.jpg

    Example: ricciq predict runs/my-run ./photos --top 1 --csv classes.csv

    Example: ricciq predict resnet50 '*.jpg' --json
    """
    if offline:
        forbid_network()
    if csv is not None and not csv.parent.is_dir():
        raise UsageError(f"there is no folder {csv.parent}; create it, or give another --csv")
    if csv is not None and csv.exists() and csv.suffix.lower() != ".csv":  # it may be an image
        raise UsageError(f"--csv {csv} exists and is no .csv file; give another name")
    preprocessing = options.preprocessing(input_size, mean, std, crop_pct, interpolation)
    with importing():
        from ricciq.workflows.predict import as_rows
        from ricciq.workflows.predict import predict as predict_images
        from ricciq.workflows.saved import Given

    found = predict_images(target, images, top, Given(preprocessing, class_map, like))
    if csv is not None and found["images"]:
        write_csv(csv, as_rows(found["images"]))
    if as_json or found["images"]:
        show(found, as_json, prediction_table)
    for message in found["messages"]:
        print(printable(message), file=sys.stderr)
    failed = found["failed"]
    for entry in failed[:-1]:
        print(f"ricciq: {printable(entry['why'])}", file=sys.stderr)
    if failed:
        raise DataError(failed[-1]["why"])


@app.command()
def export(
    run: Run = None,
    output: Annotated[Path | None, typer.Option(help="File to write.")] = None,
    format_: options.Format = DEFAULT.name,
    input_: options.Input = "float",
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images in a call; by default any number.")
    ] = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Write the ONNX file of RUN again.

    Example: ricciq export

    Example: ricciq export runs/my-run --output model.onnx

    Example: ricciq export runs/my-run --format float --dry-run

    Example: ricciq export --input uint8 --batch 1
    """
    find_format(format_)
    input_type = options.input_type(input_)
    source = _newest().path if run is None else run
    if source.suffix.lower() == ".onnx":  # the file that a run wrote stands for the run
        source = run_of(source).path
    with importing():
        from ricciq.workflows.export import export_run

    path = export_run(
        source, output, format_=format_, input_type=input_type, batch=batch, dry_run=dry_run
    )
    file: dict[str, Any] = {"path": str(path), "format": format_, "input": input_type}
    if batch is not None:
        file["batch"] = batch
    if dry_run:
        show({**file, "dry_run": True, "replaces": path.exists()}, as_json)
    else:
        show({**file, "bytes": path.stat().st_size}, as_json)


@app.command()
def report(
    run: Run = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Write report.md and report.html of RUN again.

    Example: ricciq report

    Example: ricciq report runs/my-run --dry-run
    """
    with importing():
        from ricciq.report.page import render_run

    folder = _newest() if run is None else run_of(run)
    pages = {"pages": [str(path) for path in render_run(folder.path, dry_run=dry_run)]}
    show({**pages, "dry_run": True} if dry_run else pages, as_json)


@app.command()
def inspect(
    file: OnnxFile = None,
    as_json: options.Json = False,
) -> None:
    """Show layers, bytes, fused operators, accuracy and preprocessing of an ONNX FILE.

    Example: ricciq inspect model.onnx --json
    """
    with importing():
        from ricciq.deploy.inspection import inspect_onnx

    show(inspect_onnx(_onnx_file(file)).to_dict(), as_json, inspection_tables)


@app.command()
def bench(
    file: OnnxFile = None,
    against: Annotated[Path | None, typer.Option(help="Compare with this ONNX file.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images in a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    as_json: options.Json = False,
) -> None:
    """Measure the latency of an ONNX FILE, alone or interleaved with another one.

    Example: ricciq bench model.onnx --against float.onnx

    Example: ricciq bench model.onnx --batch 8 --threads 4
    """
    with importing():
        from ricciq.deploy.latency import bench_files

    other = None if against is None else onnx_file_of(against)
    show(bench_files(_onnx_file(file), other, batch=batch, threads=threads), as_json)
