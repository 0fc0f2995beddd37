"""Whole runs from the command line: the main job, Fashion-MNIST, and where the time goes."""

from __future__ import annotations

import io
import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from parts import Context, MissingError, Tell

import ricciq.training.loop
import ricciq.training.step
from ricciq.cli import main
from ricciq.deploy.export import export_onnx
from ricciq.deploy.modules import deploy
from ricciq.evaluation import evaluate
from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.workflows.job import prepare
from ricciq.workflows.session import Session
from ricciq.workflows.train import train


def quantize(context: Context, *arguments: str | Path) -> dict[str, Any]:
    """`ricciq quantize ... --json`: what it printed, and the seconds that all of it took.

    Raises:
        RuntimeError: it did not end with 0; what it said is in the log.
    """
    given = ["quantize", *map(str, arguments), "--device", context.device, "--json"]
    started, printed = time.monotonic(), io.StringIO()
    try:
        with redirect_stdout(printed):
            main(given)
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"ricciq {' '.join(given)} ended with {end.code}") from None
    report: dict[str, Any] = json.loads(printed.getvalue())
    return report | {"wall_seconds": time.monotonic() - started}


def line(report: dict[str, Any], what: str) -> str:
    """A run in a line."""
    training = report["training"]
    return (
        f"{what}: float {report['float']['top1']:.2f} %, ONNX {report['onnx']['top1']:.2f} %, "
        f"agreement {report['onnx']['agreement_unoptimized']:.2f} %, {training['epochs']} epochs, "
        f"{training['images_per_second']:.0f} images/s, training {training['seconds']:.1f} s of "
        f"{report['wall_seconds']:.1f} s"
    )


def digits(context: Context, tell: Tell) -> None:
    """The command that the README begins with."""
    fewer = ["--epochs", "1"] if context.tiny else []
    job = ["digits_resnet8", "--data", "digits", "--bits", "2"]
    report = quantize(context, *job, "--output", context.folder / "run", *fewer)
    tell({"report": report, "lines": [line(report, "digits_resnet8, W2 A2")]})


def fashion(context: Context, tell: Tell) -> None:
    """fashion_resnet8 by its recipe, at two bits."""
    folder = _fashion(context)
    fewer = ["--epochs", "0"] if context.tiny else []
    job = ["fashion_resnet8", "--recipe", "fashion-low", "--data-dir", folder, "--bits", "2"]
    report = quantize(context, *job, "--output", context.folder / "run", *fewer)
    tell({"report": report, "lines": [line(report, "fashion_resnet8, W2 A2")]})


def _fashion(context: Context) -> Path:
    if context.fashion is None:
        raise MissingError("Fashion-MNIST: give --fashion what tests/support/fashion.py laid out")
    return context.fashion


class Phases:
    """Stands in the place of torch's `record_function`: seconds of each phase, device included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Take the time of a block."""
        self._wait()
        started = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] += time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def split(context: Context, tell: Tell) -> None:
    """Where the time of a short run of the main job goes.

    Every phase is waited for, so the sum is more than an undisturbed run takes.
    """
    flags = {"model.name": "digits_resnet8", "data.name": "digits", "compile": False}
    flags |= {"quantization": {"weight_bits": 2, "act_bits": 2}}
    flags |= (
        {"training.epochs": 1, "data.train_samples": 200, "data.calibration_batches": 1}
        if context.tiny
        else {}
    )
    recipe = Recipe().override({"training.epochs": 3, **flags})
    phases = Phases(torch.device(context.device))
    ricciq.training.step.record_function = ricciq.training.loop.record_function = phases  # type: ignore
    job, folder = prepare(recipe, Session(phases.device)), RunFolder(context.folder / "run")
    folder.path.mkdir()
    model = train(job, Session(phases.device, folder=folder)).model.eval()
    with phases("evaluation"):
        evaluate({"model": model}, job.loader("val"))
    with phases("export"):
        export_onnx(deploy(model), folder.onnx, job.preprocessing)
    shown = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.seconds.items())
    tell({"seconds": phases.seconds, "lines": [shown]})


def cifar(context: Context, tell: Tell) -> None:
    """cifar_resnet20 on Fashion-MNIST: the float start, W2 A2, W1 A2, as many epochs as fit."""
    folder, end = _fashion(context), time.monotonic() + context.seconds
    recipe = Path(__file__).resolve().parent.parent / "studies" / "resnet20.yaml"
    if context.tiny:
        few = Recipe.load(recipe).override({"data.train_samples": 256, "training.epochs": 1})
        recipe = context.folder / "recipe.yaml"
        recipe.write_text(few.to_yaml())
    job = ["cifar_resnet20", "--recipe", recipe, "--data-dir", folder]
    job += ["--workers", str(min(16, os.cpu_count() or 1))]
    epochs, found, lines = 1 if context.tiny else 3, {}, []
    checkpoint: list[str | Path] = []
    for number, bits in enumerate(("32", "2", "1")):
        run = context.folder / f"w{bits}"
        rate = ["--lr", "0.004"] if bits == "32" else []
        given = ["--bits", bits, "--epochs", str(epochs), "--output", run]
        report = quantize(context, *job, *checkpoint, *rate, *given)
        found[f"w{bits}"] = report
        lines.append(line(report, f"W{bits}"))
        tell({"reports": found, "lines": lines})
        checkpoint = checkpoint or ["--checkpoint", run / "best.safetensors"]
        if context.tiny:
            continue
        # Of what is left, each run still to come has the same; a quantized epoch takes about twice
        # a float one, as the teacher answers too.
        epoch = report["training"]["seconds"] / epochs * (2 if bits == "32" else 1)
        around = report["wall_seconds"] - report["training"]["seconds"]
        share = (end - time.monotonic()) / max(2 - number, 1) - around
        epochs = max(1, min(13, int(0.8 * share / epoch)))
