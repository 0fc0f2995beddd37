"""Convert, calibrate and fine-tune the model of a job."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from ricciq.convert.rewrite import convert
from ricciq.errors import RicciqError
from ricciq.quant.calibration import calibrate
from ricciq.quant.grid import FLOAT_BITS
from ricciq.system.tables import read_csv, write_csv
from ricciq.system.tensor_files import load_model_state, load_tensors, save_tensors
from ricciq.training.loop import finetune
from ricciq.training.memory import LARGEST_BATCH
from ricciq.training.pace import FirstSteps, Pace
from ricciq.training.reconstruction import reconstruct
from ricciq.training.state import TrainingState, last_state
from ricciq.training.step import discrete_weights
from ricciq.workflows.job import Job, is_distilled
from ricciq.workflows.session import Session, in_first_process
from ricciq.workflows.sizing import find_batch_size

FLOW_TIMES = [n / 50 for n in range(16)]
"""Times of the flow at which the decay of the perturbation is plotted."""


UnderWay = Callable[[nn.Module, Pace | None], None]
"""Called with the float model, and with the pace of training if it is known."""


class Trained(NamedTuple):
    """The result of training.

    Attributes:
        model: the converted model; in the first process, with the weights of the chosen epoch.
        progress: epochs and steps that were done.
    """

    model: nn.Module
    progress: TrainingState


def train(job: Job, session: Session, under_way: UnderWay | None = None) -> Trained:
    """Convert, calibrate and fine-tune a job's model in place, with its float copy as the teacher.

    Args:
        job: from `prepare`.
        session: a session that has begun; states and rows are written to its folder.
        under_way: called once in every process: after the first steps, or if there are fewer,
            before or after all training.

    Raises:
        RicciqError: as in `ricciq.training.loop.finetune`.
    """
    recipe, world, journal, folder = job.recipe, session.world, session.journal, session.folder
    # Every process calibrates on the same images: those of whole optimizer steps.
    parts = world.size * recipe.training.grad_accum_steps
    batch_size = _batch_size(job, session)
    # The copy is the teacher: weights of a copy may have other strides, which changes last bits.
    teacher = copy.deepcopy(job.model).eval().requires_grad_(False)
    waiting = [under_way] if under_way else []

    def is_under_way(pace: Pace | None = None) -> None:
        while waiting:
            waiting.pop()(teacher, pace)

    model = convert(job.model, job.plan, recipe.quantization.config)
    journal.say(
        f"converted {len(job.plan.layers)} layers, added {len(job.plan.points)} 8-bit output "
        f"quantizers, kept {len(job.plan.kept)} parts float"
    )
    quantization = recipe.quantization
    if recipe.training.epochs == 0:
        is_under_way()  # before what takes long
    if job.plan.layers and recipe.training.epochs == 0 and quantization.reconstruction:
        most = quantization.reconstruction_images
        with journal.over("images", job.calibration_batches(parts, most)) as batches:
            images = [some for some, _ in batches]
        steps, candidates = quantization.reconstruction, quantization.scale_search
        reconstruct(model, images, steps, journal, candidates)
    elif job.plan.layers and quantization.act_bits != FLOAT_BITS:
        with journal.over("calibration", job.calibration_batches(parts)) as batches:
            calibrate(model, (some for some, _ in batches), quantization.scale_search)
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
        calibration_images=partial(job.calibration_images, parts),
        resume=session.resume,
        world=world,
        first_steps=FirstSteps(is_under_way),
    )
    is_under_way()
    if not world.is_first:
        return Trained(model, done)
    if not folder.best.is_file():  # without training, the calibrated weights are the best
        save_tensors(folder.best, model.state_dict(), job.metadata.to_dict())
    tensors, _ = load_tensors(folder.best)
    load_model_state(model, tensors, folder.best)
    if done.epoch and job.plan.layers:
        from ricciq.report.plots import draw_geometry, write_png  # here: it takes a second

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
    """The recipe's batch size; for "auto", that of the resumed run, or the largest that fits."""
    if job.recipe.data.batch_size != "auto":
        return job.recipe.data.batch_size
    if so_far := _batch_size_so_far(session):
        return so_far
    size = min(session.world.gather(find_batch_size(job)))
    if not size:
        raise RicciqError(
            f"the memory of {job.device} is not enough for one image of {job.recipe.model.name}; "
            "give a smaller model or input size"
        )
    session.journal.say(f"batch size {size}: the largest of 1, 2, 4 … {LARGEST_BATCH} that fits")
    return size


@in_first_process
def _batch_size_so_far(session: Session) -> int:
    """The batch size of the run to resume; 0 if there is none."""
    state = last_state(session.folder, session.journal) if session.resume else None
    return TrainingState.of(state).batch_size if state else 0
