"""The main workflow: from a float model and images to an evaluated low-bit ONNX file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch

from ricciq._version import __version__
from ricciq.convert.rewrite import quantized_layers
from ricciq.data.dataset import ImageData
from ricciq.deploy.export import add_metadata, export_onnx, is_exported
from ricciq.deploy.inspection import Inspection, inspect_onnx
from ricciq.deploy.latency import Latency, measure_latency
from ricciq.deploy.modules import deploy
from ricciq.deploy.onnx_file import size_with_external_data
from ricciq.errors import CheckpointError, DivergedError
from ricciq.evaluation import Metrics, Predict, Predictions, evaluate_with_predictions
from ricciq.recipe import Recipe
from ricciq.report.disagreements import find_disagreements
from ricciq.report.page import write_pages
from ricciq.report.schema import FloatTrainingReport, Report
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import accuracy_for_onnx
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv, write_csv
from ricciq.workflows.doctor import has_integer_instructions
from ricciq.workflows.find_bits import choose_bits, find_budget
from ricciq.workflows.job import Job, prepare
from ricciq.workflows.saved import onnx_predictor
from ricciq.workflows.session import Session, choose_device, in_first_process
from ricciq.workflows.sizing import describe
from ricciq.workflows.train import Trained, train
from ricciq.workflows.train_float import FloatTraining, train_float


def run(
    recipe: Recipe,
    output: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    journal: Journal | None = None,
    data: ImageData | None = None,
) -> tuple[Report, Path]:
    """Load, convert, calibrate, fine-tune, export, evaluate the ONNX file, and report.

    Args:
        recipe: what to do.
        output: the run's folder; by default a new one under ``runs``.
        resume: continue an unfinished run of the same recipe.
        overwrite: replace the run in the folder.
        journal: shows progress.
        data: the recipe's data, if they are open already.

    Returns:
        The report, and the run's folder.

    Raises:
        RicciqError: any error that `ricciq.errors` lists. Nothing is written before the data and
            the model are known to be usable.
        InterruptedRunError: the user stopped it.
    """
    with Session.open(
        recipe, output, resume=resume, overwrite=overwrite, journal=journal
    ) as session:
        job = prepare(recipe, session, data=data)
        reference = evaluate_float(job, session)
        budget = find_budget(job, session)
        session.begin(recipe, f"run folder: {session.folder.path}")
        if float_training := train_float(job, session):
            reference = evaluate_float(job, session)._replace(training=float_training)
        job = choose_bits(job, budget, session)
        export_float(job, session)
        trained = train(job, session)
        report = export_and_report(job, trained, reference, session)
    return report, session.folder.path


def plan_run(
    recipe: Recipe, journal: Journal | None = None, data: ImageData | None = None
) -> dict[str, Any]:
    """Describe what `run` would do. Nothing is written.

    Args:
        recipe: what to do.
        journal: shows progress; by default nothing is shown.
        data: the recipe's data, if they are open already.

    Returns:
        Plain values, as from `ricciq.workflows.sizing.describe`.

    Raises:
        RicciqError: the recipe, the data or the model cannot be used.
    """
    session = Session(choose_device(recipe.device), journal=journal)
    measured = recipe.quantization.weight_bits == "auto"  # the widths depend on the weights
    job = prepare(recipe, session, weights=measured, pseudo_labels=False, data=data)
    return describe(choose_bits(job, find_budget(job, session), session))


class Reference(NamedTuple):
    """Results of the float model on the validation images.

    Attributes:
        metrics: accuracy and loss.
        predictions: the most likely class of each image, and its probability.
        training: how the float model was trained in this run, if it was.
    """

    metrics: Metrics
    predictions: Predictions
    training: FloatTraining | None = None


@in_first_process
def evaluate_float(job: Job, session: Session) -> Reference:
    """Evaluate the float model. This also reads every validation image before training starts.

    Args:
        job: from `prepare`.
        session: shows the result.

    Raises:
        CheckpointError: the model's output is not finite.
        DataError: an image cannot be read.
    """
    model = job.model.eval()
    try:
        metrics, predictions = evaluate_with_predictions({"float": model}, job.loader("val"))
    except DivergedError:  # before any training
        raise CheckpointError(
            f"the float weights of {job.recipe.model.checkpoint or job.recipe.model.name} give NaN "
            "or infinite logits; give weights of a trained model"
        ) from None
    found = metrics["float"]
    if job.data.labelled:
        said = f"top-1 {found.top1:.2f} % on {found.samples} validation samples"
    else:
        said = f"its predictions replace labels, also of {found.samples} validation samples"
    session.journal.say(f"float model: {said}")
    return Reference(found, predictions["float"])


@in_first_process
def export_float(job: Job, session: Session) -> None:
    """Write float.onnx, unless a resumed run has written it before it was stopped.

    A float run writes it at its end: the trained model is its float model.

    Args:
        job: from `prepare`, not converted yet.
        session: of the run.
    """
    if not job.plan.layers:
        return
    stored = job.metadata.for_onnx(is_float=True)
    if session.resume and is_exported(session.folder.float_onnx, stored):
        return
    model = copy.deepcopy(job.model).cpu()
    export_onnx(model, session.folder.float_onnx, job.preprocessing, stored)


@in_first_process
def export_and_report(job: Job, trained: Trained, reference: Reference, session: Session) -> Report:
    """Export, evaluate the written file, store its accuracy in it, and report.

    Args:
        job: the job of the trained model.
        trained: from `train`.
        reference: from `evaluate_float`.
        session: of the run.
    """
    folder, journal = session.folder, session.journal
    journal.say("exporting")
    deployed = deploy(trained.model).cpu()
    stored = job.metadata.for_onnx()
    export_onnx(deployed, folder.onnx, job.preprocessing, stored)
    if not job.plan.layers:
        export_onnx(deployed, folder.float_onnx, job.preprocessing, stored)
    journal.say("evaluating the exported file")
    predictors: dict[str, Predict] = {
        "quantized": deployed,
        "onnx": onnx_predictor(folder.onnx),
        "unoptimized": onnx_predictor(folder.onnx, optimize=False),
    }
    on_cpu = job.loader("val", device=torch.device("cpu"))
    metrics, predictions = evaluate_with_predictions(predictors, on_cpu)
    in_float = reference.metrics
    measured = accuracy_for_onnx(metrics["onnx"])
    add_metadata(folder.onnx, measured)
    if not job.plan.layers:
        in_float = metrics["quantized"]
        add_metadata(folder.float_onnx, measured)
    latency = measure_latency({"float": folder.float_onnx, "onnx": folder.onnx})
    inspection = inspect_onnx(folder.onnx)
    report = _report(job, trained, folder, in_float, metrics, latency, inspection)
    if reference.training:
        report.float_training = FloatTrainingReport(**reference.training._asdict())
    if job.plan.layers:
        image_at = partial(job.data.image, "val", mode=job.preprocessing.mode)
        labels, names = job.data.labels("val"), job.data.class_names
        different = find_disagreements(
            reference.predictions, predictions["onnx"], labels, names, image_at
        )
        different.save(folder.disagreements)
        report.onnx.float_agreement = 100 * (1 - different.count / in_float.samples)
    write_csv(folder.layers, [layer.model_dump() for layer in report.layers])
    write_pages(folder, report)
    report.save(folder.report)
    return report


def _report(
    job: Job,
    trained: Trained,
    folder: RunFolder,
    reference: Metrics,
    metrics: Mapping[str, Metrics],
    latency: Mapping[str, Latency],
    inspection: Inspection,
) -> Report:
    recipe, done = job.recipe, trained.progress
    onnx, unoptimized = metrics["onnx"], metrics["unoptimized"]
    float_bytes = size_with_external_data(folder.float_onnx)
    onnx_bytes = size_with_external_data(folder.onnx)
    in_file = {layer.name: layer for layer in inspection.layers}
    modules = quantized_layers(trained.model)
    layers = []
    for layer in job.plan.layers:
        module = modules[layer.name]
        written = in_file[layer.name]
        layers.append(
            {
                "name": layer.name,
                "kind": type(module).__name__,
                "weight_bits": layer.weight_bits,
                "act_bits": layer.act_bits,
                "parameters": sum(p.numel() for p in module.parameters(recurse=False)),
                "bytes": written.bytes,
                "fused": written.fused,
                "channels": len(module.latent),
                "depthwise": getattr(module, "groups", 1) > 1 and module.latent.shape[1] == 1,
            }
        )
    return Report.model_validate(
        {
            "ricciq": __version__,
            "model": recipe.model.name,
            "data": recipe.data.name,
            "method": recipe.method.name,
            "weight_bits": recipe.quantization.weight_bits,
            "act_bits": recipe.quantization.act_bits,
            "seed": recipe.seed,
            "float": asdict(reference),
            "quantized": asdict(metrics["quantized"]),
            "onnx": {
                **asdict(onnx),
                "agreement_unoptimized": unoptimized.agreement,
                "top1_unoptimized": unoptimized.top1,
                "path": folder.onnx.name,
            },
            "size": {
                "float_bytes": float_bytes,
                "onnx_bytes": onnx_bytes,
                "ratio": onnx_bytes / float_bytes,
            },
            "latency": {
                "float_ms": latency["float"].median,
                "onnx_ms": latency["onnx"].median,
                "speedup": latency["float"].median / latency["onnx"].median,
                "threads": 1,
                "batch": 1,
                "integer_instructions": has_integer_instructions(),
            },
            "layers": layers,
            "kept": [asdict(kept) for kept in job.plan.kept],
            "geometry": _geometry(folder, done.epoch, job.correction.applies_flow),
            "training": {
                "epochs": done.epoch,
                "steps": done.steps,
                "seconds": done.seconds,
                "device": str(job.device),
                "images_per_second": done.images / done.seconds if done.seconds else 0.0,
                "skipped_steps": done.skipped,
                "holdout_top1": done.chosen_top1 if done.epoch else None,
                "chosen_epoch": done.chosen_epoch,
            },
            "labelled": job.data.labelled,
            "messages": job.messages,
            "operators": inspection.runtime_operators,
        }
    )


def _geometry(folder: RunFolder, epoch: int, applied: bool) -> dict[str, float | bool]:
    """Means over the layers at the last epoch of geometry.csv, and whether the flow was applied."""
    rows = [row for row in read_csv(folder.geometry, {"epoch": int}) if row["epoch"] == epoch]
    names = ("perturbation_start", "perturbation_end", "decay", "mismatch_cosine")
    if not rows:
        return {}
    return {name: fmean(float(row[name]) for row in rows) for name in names} | {"applied": applied}
