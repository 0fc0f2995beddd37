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
from ricciq.autobits import find_budget, with_chosen_bits
from ricciq.convert.rewrite import convert
from ricciq.deploy.export import accuracy_in_onnx, add_metadata, export_onnx, stored_in_onnx
from ricciq.deploy.inspection import Inspection, inspect_onnx
from ricciq.deploy.latency import Latency, measure_latency
from ricciq.deploy.modules import deploy
from ricciq.deploy.onnx_file import size_with_external_data
from ricciq.deploy.session import open_session, session_predictor
from ricciq.errors import CheckpointError, DivergedError, InterruptedRunError, RicciqError
from ricciq.evaluation import Guesses, Metrics, Predict, evaluate
from ricciq.preparation import (
    Job,
    choose_device,
    correction_of,
    find_batch_size,
    is_distilled,
    prepare,
    take_answers,
)
from ricciq.quant.calibration import calibrate
from ricciq.quant.quantizer import FLOAT_BITS
from ricciq.recipe import Recipe
from ricciq.report.disagreements import find_disagreements
from ricciq.report.page import write_pages
from ricciq.report.plots import draw_geometry, write_png
from ricciq.report.schema import Report
from ricciq.runs.folder import RunFolder, choose_run_folder
from ricciq.system.distributed import World, joined
from ricciq.system.journal import Journal
from ricciq.system.tables import read_csv, write_csv
from ricciq.system.tensor_files import load_model_state, load_tensors, save_tensors
from ricciq.training.adaround import PICTURES, reconstruct
from ricciq.training.loop import finetune
from ricciq.training.memory import LARGEST_BATCH
from ricciq.training.state import Progressed, last_state
from ricciq.training.step import discrete_weights

FLOW_TIMES = [n / 50 for n in range(16)]
"""At which the decay of the perturbation is drawn."""


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
    in_float = {"bits": {"weights": FLOAT_BITS, "activations": FLOAT_BITS}}
    stored = stored_in_onnx(job.about) | in_float
    export_onnx(copy.deepcopy(job.model).cpu(), folder.float_onnx, job.preprocessing, stored)


def train(
    job: Job,
    folder: RunFolder,
    *,
    resume: bool,
    journal: Journal,
    world: World | None = None,
) -> Progressed:
    """Convert, calibrate and fine-tune a job's model; leave the chosen epoch's weights in it.

    Args:
        job: from `prepare`, its model still float.
        folder: begun and locked; receives the states and the rows of every epoch.
        resume: go on from the folder's last state.
        journal: where progress is shown.
        world: the processes that train together.

    Raises:
        RicciqError: as `ricciq.training.loop.finetune`.
    """
    recipe, world = job.recipe, world or World()
    # Every process sees all pictures that are calibrated on: those of so many whole steps.
    images = partial(job.calibration_images, world.size * recipe.training.grad_accum_steps)
    batch_size = _batch_size(job, folder, resume, journal, world)
    teacher = copy.deepcopy(job.model).eval().requires_grad_(False)
    convert(job.model, job.plan, recipe.quantization.kinds)
    journal.say(
        f"converted {len(job.plan.layers)} layers, placed {len(job.plan.points)} 8-bit points, "
        f"kept {len(job.plan.kept)} parts float"
    )
    if job.plan.layers and recipe.quantization.act_bits != FLOAT_BITS:
        calibrate(job.model, images(), recipe.quantization.scale_search)
    if recipe.training.epochs == 0 and recipe.quantization.reconstruction:
        reconstruct(
            job.model,
            teacher,
            [layer.name for layer in job.plan.layers],
            images(PICTURES),
            recipe.quantization.reconstruction,
            journal,
        )
    correction = correction_of(recipe)
    done = finetune(
        job.model,
        job.loader("fit", training=True, batch_size=batch_size, world=world),
        job.loader("holdout", world=world),
        recipe,
        correction,
        device=job.device,
        folder=folder,
        teacher=teacher if is_distilled(job) else None,
        about=job.about,
        journal=journal,
        pictures=images,
        resume=resume,
        world=world,
    )
    if not world.is_first:
        return done
    if not folder.best.is_file():  # no epoch was asked for: what calibration gave is the best
        save_tensors(folder.best, job.model.state_dict(), job.about)
    tensors, _ = load_tensors(folder.best)
    load_model_state(job.model, tensors, folder.best)
    if done.epoch and job.plan.layers:
        decay = correction.decay(discrete_weights(job.model), FLOW_TIMES)
        rows = [
            {"layer": name, "time": time, "norm": norm}
            for name, norms in decay.items()
            for time, norm in zip(FLOW_TIMES, norms, strict=True)
        ]
        write_csv(folder.decay, rows)
        write_png(draw_geometry(rows, read_csv(folder.geometry)), folder.geometry_plot)
    return done


def _batch_size(job: Job, folder: RunFolder, resume: bool, journal: Journal, world: World) -> int:
    """The recipe's; where it says "auto" that of the run so far, or what is found to fit."""
    if job.recipe.data.batch_size != "auto":
        return job.recipe.data.batch_size

    def known() -> int:
        state = last_state(folder, journal) if resume else None
        return Progressed.of(state).batch_size if state else 0

    if so_far := world.from_first(known):
        return so_far
    size = min(world.gather(find_batch_size(job)))
    if not size:
        raise RicciqError(
            f"the memory of {job.device} is not enough for one picture of {job.recipe.model.name}; "
            "choose a smaller model or input size"
        )
    journal.say(f"batch size {size}: the largest of 1, 2, 4 … {LARGEST_BATCH} that fits")
    return size


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
    stored = stored_in_onnx(job.about)
    export_onnx(deployed, folder.onnx, job.preprocessing, stored)
    if not job.plan.layers:  # a float run: what it trained is the float model
        export_onnx(deployed, folder.float_onnx, job.preprocessing, stored)
    journal.say("evaluating the exported file")
    in_onnx = Guesses(_onnx_predictor(folder.onnx))
    predictors: dict[str, Predict] = {
        "quantized": deployed,
        "onnx": in_onnx,
        "unoptimized": _onnx_predictor(folder.onnx, optimize=False),
    }
    metrics = evaluate(predictors, job.loader("val"))
    measured = accuracy_in_onnx(asdict(metrics["onnx"]))
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


def _onnx_predictor(path: Path, *, optimize: bool = True) -> Predict:
    return session_predictor(open_session(path, optimize=optimize), path)


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
            "geometry": _geometry(folder, done.epoch),
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


def _geometry(folder: RunFolder, epoch: int) -> dict[str, float]:
    """Means over the layers at the last epoch, from geometry.csv."""
    rows = [row for row in read_csv(folder.geometry, {"epoch": int}) if row["epoch"] == epoch]
    names = ("perturbation_start", "perturbation_end", "decay", "mismatch_cosine")
    return {name: fmean(float(row[name]) for row in rows) for name in names} if rows else {}
