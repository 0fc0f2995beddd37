"""The end of a run: export the trained model, evaluate the file, and report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from statistics import fmean

from ricciq._version import __version__
from ricciq.convert.rewrite import quantized_layers
from ricciq.deploy.export import add_metadata, export_onnx
from ricciq.deploy.inspection import Inspection, inspect_onnx
from ricciq.deploy.latency import Latency, measure_latency
from ricciq.deploy.links import link
from ricciq.deploy.modules import deploy
from ricciq.deploy.onnx_file import size_with_external_data
from ricciq.evaluation import Metrics, Predict, evaluate_with_predictions, in_float32
from ricciq.report.disagreements import find_disagreements
from ricciq.report.page import write_pages
from ricciq.report.schema import FloatTrainingReport, Report
from ricciq.runs.folder import RunFolder
from ricciq.runs.metadata import accuracy_for_onnx
from ricciq.system.tables import read_csv, write_csv
from ricciq.workflows.doctor import has_integer_instructions
from ricciq.workflows.job import Job
from ricciq.workflows.reference import Reference
from ricciq.workflows.saved import onnx_predictor
from ricciq.workflows.session import Session, in_first_process
from ricciq.workflows.train import Trained


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
    deployed = deploy(trained.model)
    stored = job.metadata.for_onnx()
    export_onnx(deployed, folder.onnx, job.preprocessing, stored)
    if not job.plan.layers:
        export_onnx(deployed, folder.float_onnx, job.preprocessing, stored)
    journal.say("evaluating the exported file")
    linked = link(deployed, job.preprocessing.input_size)
    predictors: dict[str, Predict] = {
        "quantized": linked.model,
        "onnx": onnx_predictor(folder.onnx),
        "unoptimized": onnx_predictor(folder.onnx, optimize=False),
    }
    with in_float32(), journal.over("evaluation", job.loader("val")) as batches:
        metrics, predictions = evaluate_with_predictions(predictors, batches)
    in_float = reference.metrics
    measured = accuracy_for_onnx(metrics["onnx"])
    add_metadata(folder.onnx, measured)
    if not job.plan.layers:
        in_float = metrics["quantized"]
        add_metadata(folder.float_onnx, measured)
    latency = measure_latency({"float": folder.float_onnx, "onnx": folder.onnx})
    inspection = inspect_onnx(folder.onnx, folder.path)
    report = _report(job, trained, folder, in_float, metrics, latency, inspection)
    report.onnx.float_from = linked.float_from
    if reference.doubt:
        report.messages.append(reference.doubt)
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
