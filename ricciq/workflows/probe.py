"""Measure what a run will take without starting it: real steps, and what the float model takes.

Only temporary files are written.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from itertools import islice

import torch
from torch import nn

from ricciq.convert.rewrite import convert
from ricciq.data.loader import Batch, close, set_epoch
from ricciq.deploy.export import export_onnx
from ricciq.quant.calibration import calibrate
from ricciq.quant.grid import FLOAT_BITS
from ricciq.system.files import scratch_folder
from ricciq.training.metrics import Tally
from ricciq.training.pace import FirstSteps, Pace
from ricciq.training.step import Trainer
from ricciq.workflows.forecast import (
    DISCRETE_STEP,
    WHOLE_STEP,
    Costs,
    Forecast,
    float_seconds,
    forecast,
    time_file,
)
from ricciq.workflows.job import Job, is_distilled
from ricciq.workflows.session import Session, random_state

STEPS = 20
"""Optimizer steps that are timed."""
BATCHES = 3
"""Batches that the float model is timed on."""


def probe(job: Job, session: Session, batch_size: int, steps: int) -> Forecast:
    """Forecast a whole run, from the evaluation of the float model to that of the file.

    Args:
        job: from `prepare`; its model is converted.
        session: shows progress.
        batch_size: of training.
        steps: of all training.

    Raises:
        RicciqError: the memory is not enough for a step, an image cannot be read, or the float
            model cannot be exported.
    """
    with random_state(job.device, job.recipe.seed):
        return _measured(job, session, batch_size, steps)


def _measured(job: Job, session: Session, batch_size: int, steps: int) -> Forecast:
    float_model = copy.deepcopy(job.model).eval().requires_grad_(False)
    image = _time_images(job, float_model)
    with scratch_folder() as place:
        path = place / "float.onnx"
        began = time.perf_counter()
        export_onnx(copy.deepcopy(float_model).cpu(), path, job.preprocessing)
        export = time.perf_counter() - began
        file = time_file(path, job.preprocessing.input_size)
    began = time.perf_counter()
    model = convert(job.model, job.plan, job.recipe.quantization.config)
    calibration = _time_calibration(job, model)
    start = time.perf_counter() - began + calibration + job.count("val") * image + export
    start += sum(session.seconds.values())  # automatic bits
    teacher = float_model if is_distilled(job) else None
    pace = _time_steps(job, model, teacher, session, batch_size, steps)
    found = forecast(job, pace, Costs(image, file, export), session.world.size)
    step = pace.step_seconds / DISCRETE_STEP
    parts = [
        Pace.of_epochs(step / WHOLE_STEP, job.head_epochs, pace.of_epoch),
        Pace.of_epochs(step, job.float_epochs, pace.of_epoch),
    ]
    float_training = float_seconds(job, parts, image, session.world.size)
    return found._replace(start=start, float_training=float_training)


@torch.inference_mode()
def _time_images(job: Job, model: nn.Module) -> float:
    """Seconds to load and evaluate an image."""
    batches = iter(job.loader("val"))
    images, _ = next(batches)
    model(images).cpu()  # the first call is slower, as are the first images
    began, done = time.perf_counter(), 0
    for images, _ in islice(batches, BATCHES):
        model(images).cpu()
        done += len(images)
    if not done:  # there is one batch only
        model(images).cpu()
        done = len(images)
    return (time.perf_counter() - began) / done


def _time_calibration(job: Job, model: nn.Module) -> float:
    """Calibrate on one batch; returns the seconds that the others will take."""
    settings = job.recipe.quantization
    if not job.plan.layers or settings.act_bits == FLOAT_BITS:
        return 0.0
    images = list(islice(job.calibration_images(most=job.recipe.data.known_batch_size), 1))
    began = time.perf_counter()
    calibrate(model, images, settings.scale_search)
    wanted = job.recipe.data.calibration_batches * job.recipe.data.known_batch_size
    others = min(wanted, job.count("fit")) / len(images[0]) - 1
    return others * (time.perf_counter() - began)


def _time_steps(
    job: Job,
    model: nn.Module,
    teacher: nn.Module | None,
    session: Session,
    batch_size: int,
    steps: int,
) -> Pace:
    """Train for some steps, and forget what was learned."""
    recipe = job.recipe
    loader = job.loader("fit", training=True, batch_size=batch_size)

    def batches() -> Iterator[Batch]:
        for epoch in range(STEPS * recipe.training.grad_accum_steps):
            set_epoch(loader, epoch)
            yield from loader

    found: list[Pace] = []
    first_steps, rest = FirstSteps(found.append, STEPS), batches()
    try:
        with (
            Trainer(model, recipe, job.correction, job.device, len(loader), teacher) as trainer,
            session.journal.bar("probe", STEPS) as advance,
        ):
            trainer.begin_epoch()
            tally = Tally()
            for number in range(STEPS):
                began = time.perf_counter()
                group = list(islice(rest, recipe.training.grad_accum_steps))
                trainer.step(group, tally, number, measure=False)
                seconds = time.perf_counter() - began
                tally.seconds += seconds
                epochs = recipe.training.epochs
                first_steps.add(seconds, steps, epochs, trainer.updates_per_epoch)
                advance(tally.describe)
    finally:
        close(loader)
    return found[0]
