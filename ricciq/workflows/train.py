"""Convert, calibrate and fine-tune the model of a job."""

from __future__ import annotations

import copy
from functools import partial
from typing import NamedTuple

from torch import nn

from ricciq.convert.rewrite import convert
from ricciq.errors import RicciqError
from ricciq.quant.calibration import calibrate
from ricciq.quant.grid import FLOAT_BITS
from ricciq.report.plots import draw_geometry, write_png
from ricciq.system.tables import read_csv, write_csv
from ricciq.system.tensor_files import load_model_state, load_tensors, save_tensors
from ricciq.training.adaround import PICTURES, reconstruct
from ricciq.training.loop import finetune
from ricciq.training.memory import LARGEST_BATCH
from ricciq.training.state import Progressed, last_state
from ricciq.training.step import discrete_weights
from ricciq.workflows.job import (
    Job,
    is_distilled,
)
from ricciq.workflows.session import Session, in_first_process
from ricciq.workflows.sizing import find_batch_size

FLOW_TIMES = [n / 50 for n in range(16)]
"""At which the decay of the perturbation is drawn."""


class Trained(NamedTuple):
    """What training made of a job.

    Attributes:
        model: converted, with the chosen epoch's weights in the first process.
        progress: how far the run came.
    """

    model: nn.Module
    progress: Progressed


def train(job: Job, session: Session) -> Trained:
    """Convert, calibrate and fine-tune a job's model in place, taught by a copy of it.

    Args:
        job: from `prepare`.
        session: begun; its folder receives the states and the rows of every epoch.

    Returns:
        The trained model, and how far the run came.

    Raises:
        RicciqError: as `ricciq.training.loop.finetune`.
    """
    recipe, world, journal, folder = job.recipe, session.world, session.journal, session.folder
    # Every process sees all pictures that are calibrated on: those of so many whole steps.
    images = partial(job.calibration_images, world.size * recipe.training.grad_accum_steps)
    batch_size = _batch_size(job, session)
    # A copy of convolution weights may differ in strides, and so in the last bit of what it learns.
    teacher = copy.deepcopy(job.model).eval().requires_grad_(False)
    model = convert(job.model, job.plan, recipe.quantization.config)
    journal.say(
        f"converted {len(job.plan.layers)} layers, placed {len(job.plan.points)} 8-bit points, "
        f"kept {len(job.plan.kept)} parts float"
    )
    if job.plan.layers and recipe.quantization.act_bits != FLOAT_BITS:
        calibrate(model, images(), recipe.quantization.scale_search)
    if recipe.training.epochs == 0 and recipe.quantization.reconstruction:
        reconstruct(
            model,
            teacher,
            [layer.name for layer in job.plan.layers],
            images(PICTURES),
            recipe.quantization.reconstruction,
            journal,
        )
    done = finetune(
        model,
        job.loader("fit", training=True, batch_size=batch_size, world=world),
        job.loader("holdout", world=world),
        recipe,
        job.correction,
        device=job.device,
        folder=folder,
        teacher=teacher if is_distilled(job) else None,
        metadata=job.metadata,
        journal=journal,
        pictures=images,
        resume=session.resume,
        world=world,
    )
    if not world.is_first:
        return Trained(model, done)
    if not folder.best.is_file():  # no epoch was asked for: what calibration gave is the best
        save_tensors(folder.best, model.state_dict(), job.metadata.to_dict())
    tensors, _ = load_tensors(folder.best)
    load_model_state(model, tensors, folder.best)
    if done.epoch and job.plan.layers:
        decay = job.correction.decay(discrete_weights(model), FLOW_TIMES)
        rows = [
            {"layer": name, "time": time, "norm": norm}
            for name, norms in decay.items()
            for time, norm in zip(FLOW_TIMES, norms, strict=True)
        ]
        write_csv(folder.decay, rows)
        write_png(draw_geometry(rows, read_csv(folder.geometry)), folder.geometry_plot)
    return Trained(model, done)


def _batch_size(job: Job, session: Session) -> int:
    """The recipe's; where it says "auto" that of the run so far, or what is found to fit."""
    if job.recipe.data.batch_size != "auto":
        return job.recipe.data.batch_size
    if so_far := _batch_size_so_far(session):
        return so_far
    size = min(session.world.gather(find_batch_size(job)))
    if not size:
        raise RicciqError(
            f"the memory of {job.device} is not enough for one picture of {job.recipe.model.name}; "
            "choose a smaller model or input size"
        )
    session.journal.say(f"batch size {size}: the largest of 1, 2, 4 … {LARGEST_BATCH} that fits")
    return size


@in_first_process
def _batch_size_so_far(session: Session) -> int:
    """That of the run that goes on; 0 if there is none."""
    state = last_state(session.folder, session.journal) if session.resume else None
    return Progressed.of(state).batch_size if state else 0
