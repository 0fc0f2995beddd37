"""The whole story on one page: from a float model and pictures to a checked low-bit ONNX file."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from ricciq._version import __version__
from ricciq.deploy.export import add_metadata, export_onnx
from ricciq.deploy.inspection import Inspection, inspect_onnx
from ricciq.deploy.latency import Latency, measure_latency
from ricciq.deploy.modules import deploy
from ricciq.deploy.onnx_file import size_with_external_data
from ricciq.errors import CheckpointError, DivergedError, InterruptedRunError
from ricciq.evaluation import Guesses, Metrics, Predict, evaluate
from ricciq.recipe import Recipe
from ricciq.report.disagreements import find_disagreements
from ricciq.report.page import write_pages
from ricciq.report.schema import Report
from ricciq.runs.folder import RunFolder, choose_run_folder
from ricciq.runs.metadata import accuracy_for_onnx
from ricciq.system.distributed import joined
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv, write_csv
from ricciq.training.loop import correction_of
from ricciq.training.state import Progressed
from ricciq.workflows.find_bits import find_budget, with_chosen_bits
from ricciq.workflows.job import (
    Job,
    choose_device,
    prepare,
    take_answers,
)
from ricciq.workflows.saved import onnx_predictor
from ricciq.workflows.train import train


def run(
    recipe: Recipe,
    output: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    journal: Journal | None = None,
) -> tuple[Report, Path]:
    """Load, convert, calibrate, fine-tune, export, evaluate the export, report.

    Args:
        recipe: what to do.
        output: the run's folder; by default a new one under ``runs``.
        resume: go on with an unfinished run of the same recipe.
        overwrite: replace a run that the folder holds.
        journal: where progress is shown.

    Returns:
        The report, and the run's folder.

    Raises:
        RicciqError: whatever `ricciq.errors` lists; nothing is written before data and model are
            known to be usable.
        InterruptedRunError: the user stopped it.
    """
    journal = journal or Journal()
    device = choose_device(recipe.device)
    cuda = [device] if device.type == "cuda" else []
    with joined(device) as world, torch.random.fork_rng(cuda):
        if not world.is_first:
            journal = Journal()

        def choose(path: Path | None) -> Path:
            return choose_run_folder(recipe, path, resume=resume, overwrite=overwrite).path

        folder = RunFolder(world.from_first(lambda: choose(output)))
        torch.manual_seed(recipe.seed)
        job = prepare(recipe, device, journal)
        take_answers(job)
        float_model = job.model.eval()
        in_float = Guesses(lambda images: float_model(images.to(device)))
        reference = world.from_first(lambda: _check_validation(job, in_float, journal))
        budget = world.from_first(lambda: find_budget(job, folder if resume else None))
        with ExitStack() as held:

            def begin() -> None:
                held.enter_context(folder.locked())
                choose(folder.path)  # minutes have passed since the first look, without the lock
                if not resume:
                    folder.begin(recipe)
                journal.log_to(folder.log)
                journal.say(f"run folder: {folder.path}")

            world.from_first(begin)
            try:
                chosen = world.from_first(
                    lambda: with_chosen_bits(job, budget, journal, folder).plan
                )
                job = job._replace(plan=chosen)
                world.from_first(lambda: _export_float(job, folder))
                done = train(job, folder, resume=resume, journal=journal, world=world)
                report = world.from_first(
                    lambda: _finish(job, folder, in_float, reference, done, journal)
                )
            except KeyboardInterrupt:
                stopped = InterruptedRunError(
                    f"stopped; `--output {folder.path} --resume` goes on from the last saved state"
                )
                stopped.said = not world.is_first
                raise stopped from None
    return report, folder.path


def _check_validation(job: Job, in_float: Guesses, journal: Journal) -> Metrics:
    """The float accuracy; and every validation picture is read before hours are spent."""
    try:
        metrics = evaluate({"float": in_float}, job.loader("val"))["float"]
    except DivergedError:  # before any training
        raise CheckpointError(
            f"the float weights of {job.recipe.model.checkpoint or job.recipe.model.name} give NaN "
            "or infinite answers; give some that trained well"
        ) from None
    if job.data.labelled:
        found = f"top-1 {metrics.top1:.2f} % on {metrics.samples} validation samples"
    else:
        found = f"its answers stand for labels, on {metrics.samples} validation samples too"
    journal.say(f"float model: {found}")
    return metrics


def _export_float(job: Job, folder: RunFolder) -> None:
    stored = job.metadata.for_onnx(is_float=True)
    export_onnx(copy.deepcopy(job.model).cpu(), folder.float_onnx, job.preprocessing, stored)


def _finish(
    job: Job,
    folder: RunFolder,
    in_float: Guesses,
    reference: Metrics,
    done: Progressed,
    journal: Journal,
) -> Report:
    """Export, evaluate what was written, store the outcome in it, and report."""
    journal.say("exporting")
    deployed = deploy(job.model).cpu()
    stored = job.metadata.for_onnx()
    export_onnx(deployed, folder.onnx, job.preprocessing, stored)
    if not job.plan.layers:  # a float run: what it trained is the float model
        export_onnx(deployed, folder.float_onnx, job.preprocessing, stored)
    journal.say("evaluating the exported file")
    in_onnx = Guesses(onnx_predictor(folder.onnx))
    predictors: dict[str, Predict] = {
        "quantized": deployed,
        "onnx": in_onnx,
        "unoptimized": onnx_predictor(folder.onnx, optimize=False),
    }
    metrics = evaluate(predictors, job.loader("val"))
    measured = accuracy_for_onnx(metrics["onnx"])
    add_metadata(folder.onnx, measured)
    if not job.plan.layers:
        reference = metrics["quantized"]
        add_metadata(folder.float_onnx, measured)
    latency = measure_latency({"float": folder.float_onnx, "onnx": folder.onnx})
    inspection = inspect_onnx(folder.onnx)
    report = _report(job, folder, reference, metrics, latency, inspection, done)
    if job.plan.layers:
        picture = partial(job.data.picture, "val", mode=job.preprocessing.mode)
        labels, names = job.data.labels("val"), job.data.class_names
        different = find_disagreements(in_float, in_onnx, labels, names, picture)
        different.save(folder.disagreements)
        report.onnx.float_agreement = 100 * (1 - different.count / reference.samples)
    write_csv(folder.layers, [layer.model_dump() for layer in report.layers])
    write_pages(folder, report)
    report.save(folder.report)
    return report


def _report(
    job: Job,
    folder: RunFolder,
    reference: Metrics,
    metrics: Mapping[str, Metrics],
    latency: Mapping[str, Latency],
    inspection: Inspection,
    done: Progressed,
) -> Report:
    recipe = job.recipe
    onnx, unoptimized = metrics["onnx"], metrics["unoptimized"]
    float_bytes = size_with_external_data(folder.float_onnx)
    onnx_bytes = size_with_external_data(folder.onnx)
    in_file = {layer.name: layer for layer in inspection.layers}
    layers = []
    for layer in job.plan.layers:
        module = job.model.get_submodule(layer.name)
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
            },
            "layers": layers,
            "kept": [asdict(kept) for kept in job.plan.kept],
            "geometry": _geometry(folder, done.epoch, correction_of(recipe).applies_flow),
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
        }
    )


def _geometry(folder: RunFolder, epoch: int, applied: bool) -> dict[str, float | bool]:
    """Means over the layers at the last epoch, from geometry.csv, and whether the flow acted."""
    rows = [row for row in read_csv(folder.geometry, {"epoch": int}) if row["epoch"] == epoch]
    names = ("perturbation_start", "perturbation_end", "decay", "mismatch_cosine")
    if not rows:
        return {}
    return {name: fmean(float(row[name]) for row in rows) for name in names} | {"applied": applied}
