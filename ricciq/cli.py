"""The verbs: parse, call, print, exit code. torch is imported only by the verb that needs it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ricciq import __version__, options
from ricciq.errors import GateError, InterruptedRunError, RicciqError, UsageError
from ricciq.network import forbid_network
from ricciq.tables import (
    comparison_table,
    inspection_tables,
    plan_table,
    printable,
    shortened,
    value_table,
)

if TYPE_CHECKING:
    from ricciq.journal import Journal
    from ricciq.recipe import Recipe

app = typer.Typer(
    name="ricciq",
    help="Quantize pretrained vision models to 1-8 bits and export ONNX that runs fast.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Newer versions of Typer carry a click of their own; this is the base of its errors in any of them.
CommandLineError: Any = typer.BadParameter.__mro__[2]


def _version(asked: bool) -> None:
    if asked:
        print(f"ricciq {__version__}")
        raise typer.Exit


@app.callback()
def _ricciq(
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def quantize(
    model: options.Model,
    data: options.MaybeData = None,
    data_dir: options.DataDir = None,
    bits: options.Bits = None,
    weight_bits: options.WeightBits = None,
    act_bits: options.ActBits = None,
    max_bytes: options.MaxBytes = None,
    recipe: options.RecipeName = None,
    checkpoint: options.Checkpoint = None,
    method: Annotated[str | None, typer.Option(help=f"{options.METHODS}.")] = None,
    aa: options.AutoAugment = None,
    mixup: options.Mixup = None,
    cutmix: options.CutMix = None,
    reprob: options.Reprob = None,
    epochs: options.Epochs = None,
    batch_size: options.TrainingBatchSize = None,
    grad_accum_steps: options.AccumulatedBatches = None,
    grad_checkpointing: options.GradCheckpointing = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    device: options.Device = None,
    amp: options.Amp = None,
    compile_: options.Compile = None,
    workers: options.Workers = None,
    output: options.Output = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    offline: options.Offline = False,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Quantize MODEL: load, convert, calibrate, fine-tune, export, evaluate, report.

    Example: ricciq quantize digits_resnet8 --data digits --bits 2
    """
    if offline:
        forbid_network()
    merged, messages = _recipe(
        model,
        checkpoint,
        recipe,
        (bits, weight_bits, act_bits, max_bytes),
        {
            "data.name": data,
            "data.dir": data_dir,
            "data.batch_size": options.training_batch_size(batch_size),
            "data.workers": workers,
            "data.augmentation.auto_augment": aa,
            "data.augmentation.mixup": mixup,
            "data.augmentation.cutmix": cutmix,
            "data.augmentation.reprob": reprob,
            "method.name": method,
            "training.epochs": epochs,
            "training.grad_accum_steps": grad_accum_steps,
            "training.grad_checkpointing": grad_checkpointing,
            "training.lr": lr,
            "seed": seed,
            "device": device,
            "amp": amp,
            "compile": compile_,
        },
    )
    from ricciq import autobits, pipeline, preparation

    journal = _begin(messages)
    if dry_run:
        on = preparation.choose_device(merged.device)
        found = merged.quantization.weight_bits == "auto"  # by what the weights are like
        job = preparation.prepare(merged, on, journal, weights=found)
        job = autobits.with_chosen_bits(job, journal)
        if _is_first():
            _print(preparation.describe(job), as_json, plan_table)
        return
    report, folder = pipeline.run(
        merged, output, resume=resume, overwrite=overwrite, journal=journal
    )
    if not _is_first():
        return
    if as_json:
        print(json.dumps({**report.to_dict(), "run_folder": str(folder)}))
    else:
        Console().print(report.to_table())
        Console().print(
            f"{folder / 'report.md'} and {folder / 'model.onnx'} are written.", markup=False
        )


@app.command("eval")
def evaluate(
    target: Annotated[Path, typer.Argument(help=".onnx file, run folder or checkpoint.")],
    data: options.Data,
    data_dir: options.DataDir = None,
    reference: Annotated[
        Path | None, typer.Option(help="Count agreement with this .onnx, run or checkpoint.")
    ] = None,
    min_top1: Annotated[float | None, typer.Option(help="Exit 4 below this, percent.")] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Exit 4 below this agreement, percent.")
    ] = None,
    batch_size: options.BatchSize = None,
    workers: options.Workers = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Measure TARGET on the validation data: top-1, top-5, loss, latency, agreement.

    Example: ricciq eval model.onnx --data digits --min-top1 95
    """
    if offline:
        forbid_network()
    for flag, gate in (("--min-top1", min_top1), ("--min-agreement", min_agreement)):
        if gate is not None and not math.isfinite(gate):  # nothing is below NaN
            raise UsageError(f"{flag} {gate} is no gate; give a percentage")
    if min_agreement is not None and reference is None:
        raise UsageError(
            f"--min-agreement {min_agreement} needs something to agree with; give --reference"
        )
    from ricciq.trained import evaluate_target

    result = evaluate_target(
        target, data, data_dir, reference, batch_size=batch_size or 64, workers=workers or 0
    )
    _print(result, as_json)
    for name, value, least in (
        ("top-1", result["top1"], min_top1),
        ("agreement", result.get("agreement"), min_agreement),
    ):
        if least is not None and value is not None and value < least:
            flag = name.replace("top-1", "top1")
            raise GateError(
                f"{name} of {target} is {value:.3f} %, below --min-{flag} {least:g}; "
                "train longer or lower the gate"
            )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or a run's best.safetensors.")],
    output: Annotated[Path | None, typer.Option(help="File to write.")] = None,
    format_: Annotated[str, typer.Option("--format", help="qdq or float.")] = "qdq",
    as_json: options.Json = False,
) -> None:
    """Write the ONNX file of RUN again.

    Example: ricciq export runs/my-run --output model.onnx
    """
    if format_ not in ("qdq", "float"):
        raise UsageError(f"--format {format_} is not known; give qdq or float")
    from ricciq.trained import export_run

    path = export_run(run, output, as_float=format_ == "float")
    _print({"path": str(path), "bytes": path.stat().st_size, "format": format_}, as_json)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="ONNX file.")],
    as_json: options.Json = False,
) -> None:
    """Show the layers of an ONNX FILE, what onnxruntime fused, bytes, accuracy, preprocessing.

    Example: ricciq inspect model.onnx
    """
    from ricciq.inspection import inspect_onnx

    _print(inspect_onnx(file).to_dict(), as_json, inspection_tables)


@app.command()
def bench(
    file: Annotated[Path, typer.Argument(help="ONNX file.")],
    against: Annotated[Path | None, typer.Option(help="Compare with this file.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in a call.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of onnxruntime.")] = 1,
    as_json: options.Json = False,
) -> None:
    """Time an ONNX FILE, and another by turns with it.

    Example: ricciq bench model.onnx --against float.onnx
    """
    from ricciq.bench import bench_files

    _print(bench_files(file, against, batch=batch, threads=threads), as_json)


@app.command()
def compare(
    model: options.Model,
    methods: Annotated[
        str,
        typer.Option(
            help=f"Two or more of {options.METHODS}; changed as in ricci:block=9:time=0.05."
        ),
    ],
    seeds: Annotated[int, typer.Option(help="Runs of each method.")],
    data: options.MaybeData = None,
    data_dir: options.DataDir = None,
    bits: options.Bits = None,
    weight_bits: options.WeightBits = None,
    act_bits: options.ActBits = None,
    max_bytes: options.MaxBytes = None,
    recipe: options.RecipeName = None,
    checkpoint: options.Checkpoint = None,
    lr_scales: Annotated[str, typer.Option(help="Factors of the learning rate.")] = "1",
    split: Annotated[
        str, typer.Option(help="Judge by val, or by holdout to choose a method.")
    ] = "val",
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    device: options.Device = None,
    workers: options.Workers = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; done runs stay.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a study.")] = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Train MODEL under several methods with the same seeds, and compare them pair by pair.

    Example: ricciq compare digits_resnet8 --data digits --methods ste,ricci --seeds 5 --bits 2
    """
    if offline:
        forbid_network()
    if split not in ("val", "holdout"):
        raise UsageError(f"--split {split} is no part to judge by; give val or holdout")
    merged, messages = _recipe(
        model,
        checkpoint,
        recipe,
        (bits, weight_bits, act_bits, max_bytes),
        {
            "data.name": data,
            "data.dir": data_dir,
            "data.batch_size": batch_size,
            "data.workers": workers,
            "training.epochs": epochs,
            "training.lr": lr,
            "seed": seed,
            "device": device,
        },
    )
    try:
        scales = [float(scale) for scale in lr_scales.split(",")]
    except ValueError:
        raise UsageError(f"--lr-scales {lr_scales} are no numbers; give some as 0.3,1,3") from None

    from ricciq import compare as study

    journal = _begin(messages)
    verdict, folder = study.compare(
        merged,
        re.split(r",(?![^\[]*\])", methods),  # not within a list, as in training.progressive=[8,4]
        seeds,
        output,
        lr_scales=scales,
        split="holdout" if split == "holdout" else "val",
        resume=resume,
        overwrite=overwrite,
        journal=journal,
    )
    _print({**verdict, "folder": str(folder)}, as_json, comparison_table)


def _recipe(
    model: str,
    checkpoint: Path | None,
    name: str | None,
    widths: tuple[str | None, str | None, str | None, str | None],
    flags: dict[str, Any],
) -> tuple[Recipe, list[str]]:
    """Defaults, then the recipe of that name or file, then flags; and what there is to say."""
    from ricciq.recipe import Recipe

    messages: list[str] = []
    source = _model_and_weights(model, checkpoint)
    loaded = Recipe.load(name) if name else Recipe()
    asked = options.widths(*widths, messages)
    bits = {"quantization": loaded.quantization.model_dump() | asked} if asked else {}
    method = flags.pop("method.name", None)
    if method not in (None, loaded.method.name):  # a method's values are not another's
        flags["method"] = {"name": method}
    merged = loaded.override({**source, **bits, **flags})
    if not merged.data.name:
        raise UsageError("no data was named; give --data a folder, torch/NAME or digits")
    return merged, messages


def _is_first() -> bool:
    """Whether this is the process that speaks, of those that torchrun started."""
    from ricciq.distributed import process_number

    return process_number()[0] == 0


def _begin(messages: list[str]) -> Journal:
    """A journal on stderr that starts with these messages; SIGTERM stops as Ctrl-C does."""
    from ricciq.journal import Journal

    journal = Journal(Console(stderr=True) if _is_first() else None)
    for message in messages:
        journal.say(message)
    signal.signal(signal.SIGTERM, _interrupt)
    return journal


def _model_and_weights(model: str, checkpoint: Path | None) -> dict[str, Any]:
    """What MODEL and --checkpoint put into the recipe."""
    path = Path(model)
    if not os.path.exists(path):  # Path.exists raises where a name is too long
        return {"model.name": model, "model.checkpoint": checkpoint}
    if checkpoint is not None:
        raise UsageError(f"{model} has weights of its own; give either it or --checkpoint")
    from ricciq.trained import float_source

    return float_source(path)


def _print(values: dict[str, Any], as_json: bool, table: Any = None) -> None:
    if as_json:
        print(json.dumps(values))
    else:
        Console().print((table or value_table)(values))


def _interrupt(signum: int, frame: Any) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit with the code `ricciq.errors` lists."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments[:1]
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except RicciqError as error:
        _fail("" if error.said else str(error), error.exit_code, debug)
    except CommandLineError as error:
        _fail(" ".join(error.format_message().split()), UsageError.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", InterruptedRunError.exit_code, debug)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        message = f"failed unexpectedly ({what}); `ricciq --debug` shows where"
        _fail(message, RicciqError.exit_code, debug)


def _fail(message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if message:  # a bare `ricciq` has shown its help and has nothing to add
        print(f"ricciq: {printable(shortened(message))}", file=sys.stderr)
    sys.exit(code)
