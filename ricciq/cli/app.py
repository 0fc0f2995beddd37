"""The commands: parse, call, print, exit. Only commands that need torch import it."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.text import Text

from ricciq._version import __version__
from ricciq.cli import finished, options, recipes
from ricciq.cli.model_kwargs import ModelCommand, ModelKwargs, model_kwargs
from ricciq.cli.request import requested_recipe
from ricciq.cli.start import begin, importing, is_first
from ricciq.errors import (
    InterruptedRunError,
    RicciqError,
    UsageError,
    is_out_of_memory,
    on_one_line,
)
from ricciq.report.terminal import (
    comparison_table,
    doctor_tables,
    plan_table,
    printable,
    shortened,
    show,
)
from ricciq.system.offline import forbid_network, forbid_telemetry

app = typer.Typer(
    name="ricciq",
    help="Quantize pretrained vision models to 1-8 bits, and export fast ONNX files.\n\n"
    "Example: ricciq quantize digits_resnet8 --data digits --bits 2",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(finished.app)
app.add_typer(recipes.app, name="recipes")

# Newer versions of Typer include their own click; this is the base of its errors in all versions.
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


@app.command(cls=ModelCommand)
def quantize(
    model: options.Model,
    data: options.MaybeData = None,
    data_dir: options.DataDir = None,
    class_map: options.ClassMap = None,
    bits: options.Bits = None,
    weight_bits: options.WeightBits = None,
    act_bits: options.ActBits = None,
    max_bytes: options.MaxBytes = None,
    recipe: options.RecipeName = None,
    checkpoint: options.Checkpoint = None,
    model_kwargs_: ModelKwargs = None,
    input_size: options.InputSize = None,
    method: options.Method = None,
    aa: options.AutoAugment = None,
    mixup: options.Mixup = None,
    cutmix: options.CutMix = None,
    reprob: options.Reprob = None,
    epochs: options.Epochs = None,
    float_epochs: options.FloatEpochs = None,
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
    probe: options.Probe = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Quantize MODEL: load, convert, calibrate, fine-tune, export, evaluate, report.

    Example: ricciq quantize digits_resnet8 --data digits --bits 2

    Example: ricciq quantize resnet50 --recipe resnet50-w4a4 --data ./imagenet

    Example: ricciq quantize resnet18 --data ./images --bits auto:2.5 --dry-run --probe
    """
    if offline:
        forbid_network()
    if probe and not dry_run:
        raise UsageError("--probe needs --dry-run: a run itself says how long it takes; give both")
    merged, messages, data_set = requested_recipe(
        model,
        checkpoint,
        recipe,
        (bits, weight_bits, act_bits, max_bytes),
        {
            "data.name": data,
            "data.dir": data_dir,
            "data.class_map": class_map,
            "data.input_size": options.input_size_of(input_size),
            "model.kwargs": model_kwargs(model_kwargs_),
            "data.batch_size": options.training_batch_size(batch_size),
            "data.workers": workers,
            "data.augmentation.auto_augment": aa,
            "data.augmentation.mixup": mixup,
            "data.augmentation.cutmix": cutmix,
            "data.augmentation.reprob": reprob,
            "method.name": method,
            "training.epochs": epochs,
            "training.float_epochs": float_epochs,
            "training.grad_accum_steps": grad_accum_steps,
            "training.grad_checkpointing": grad_checkpointing,
            "training.lr": lr,
            "seed": seed,
            "device": device,
            "amp": amp,
            "compile": compile_,
        },
    )
    with importing():
        from ricciq.workflows.quantize import plan_run, run

    journal = begin(messages, quiet)
    if dry_run:
        plan = plan_run(merged, journal, data_set, probed=probe)
        if is_first():
            show({**plan, "dry_run": True}, as_json, plan_table, quiet)
        return
    with importing():  # what the export needs: where it is broken, nothing is trained
        import onnxscript  # noqa: F401

        import ricciq.deploy.session  # noqa: F401
    report, folder = run(
        merged, output, resume=resume, overwrite=overwrite, journal=journal, data=data_set
    )
    if is_first():
        written = f"{folder / 'report.html'} and {folder / 'model.onnx'} are written."
        shown = Group(report.to_table(), Text(written, overflow="fold"))
        values = {**report.to_dict(), "run_folder": str(folder)}
        show(values, as_json, lambda _: shown, quiet)


@app.command(cls=ModelCommand)
def compare(
    model: options.Model,
    methods: options.Methods,
    seeds: Annotated[int, typer.Option(help="Number of seeds, each a run of every method.")],
    data: options.MaybeData = None,
    data_dir: options.DataDir = None,
    class_map: options.ClassMap = None,
    bits: options.Bits = None,
    weight_bits: options.WeightBits = None,
    act_bits: options.ActBits = None,
    max_bytes: options.MaxBytes = None,
    recipe: options.RecipeName = None,
    checkpoint: options.Checkpoint = None,
    model_kwargs_: ModelKwargs = None,
    input_size: options.InputSize = None,
    lr_scales: Annotated[
        str, typer.Option(help="Factors of the learning rate, such as 0.3,1,3.")
    ] = "1",
    split: options.Split = "val",
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.LearningRate = None,
    seed: options.Seed = None,
    device: options.Device = None,
    workers: options.Workers = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a study; finished runs are kept.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a study.")] = False,
    offline: options.Offline = False,
    dry_run: options.DryRun = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Train MODEL with several methods and the same seeds, and compare them in pairs.

    Example: ricciq compare digits_resnet8 --data digits --methods ste,ricci --seeds 5

    Example: ricciq compare digits_resnet8 --data digits --methods ricci,ricci:trust=0.1 --seeds 3

    Example: ricciq compare resnet18 --data ./images --methods ste,lne --seeds 3 --dry-run
    """
    if offline:
        forbid_network()
    if split not in ("val", "holdout"):
        raise UsageError(f"--split {split} is unknown; give val or holdout")
    merged, messages, _ = requested_recipe(
        model,
        checkpoint,
        recipe,
        (bits, weight_bits, act_bits, max_bytes),
        {
            "data.name": data,
            "data.dir": data_dir,
            "data.class_map": class_map,
            "data.input_size": options.input_size_of(input_size),
            "model.kwargs": model_kwargs(model_kwargs_),
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
        raise UsageError(
            f"--lr-scales {lr_scales} are not numbers; give some, such as 0.3,1,3"
        ) from None

    with importing():
        from ricciq.workflows.compare import compare as compare_methods

    journal = begin(messages, quiet)
    verdict, folder = compare_methods(
        merged,
        re.split(r",(?![^\[]*\])", methods),  # not in a list: training.progressive=[8,4]
        seeds,
        output,
        lr_scales=scales,
        split="holdout" if split == "holdout" else "val",
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        journal=journal,
    )
    table = None if dry_run else comparison_table
    show({**verdict, "folder": str(folder)}, as_json, table, quiet)


@app.command()
def doctor(as_json: options.Json = False) -> None:
    """Show versions and devices, and problems with their remedies.

    Example: ricciq doctor --json
    """
    with importing():
        from ricciq.workflows.doctor import examine

    found = examine()
    show(found, as_json, doctor_tables)
    essential = [problem for problem in found["problems"] if problem["essential"]]
    if essential:
        raise RicciqError(" and ".join(f"{p['what']}; {p['remedy']}" for p in essential))


def main(arguments: list[str] | None = None) -> None:
    """Run a command line, and exit with a code that `ricciq.errors` lists."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments[:1]
    forbid_telemetry()  # `doctor` imports onnxruntime by itself
    try:
        sys.exit(app(arguments, standalone_mode=False))
    except RicciqError as error:
        _fail(error, "" if error.said else str(error), error.exit_code, debug)
    except CommandLineError as error:
        _fail(error, " ".join(error.format_message().split()), UsageError.exit_code, debug)
    except (KeyboardInterrupt, typer.Abort) as error:
        _fail(error, "stopped", InterruptedRunError.exit_code, debug)
    except Exception as error:
        what = on_one_line(f"{type(error).__name__}: {error}", 300)
        message = f"failed unexpectedly ({what}); `ricciq --debug` shows where"
        if is_out_of_memory(error):
            message = f"there is not enough memory ({what}); use smaller batches, images or models"
        _fail(error, message, RicciqError.exit_code, debug)


def _fail(error: BaseException, message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if message:  # without arguments, help was shown and there is no message
        print(f"ricciq: {printable(shortened(message))}", file=sys.stderr)
    cause: BaseException | None = error
    while cause is not None:  # frames may hold loaders, whose workers would end half a minute late
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__context__
    sys.exit(code)
