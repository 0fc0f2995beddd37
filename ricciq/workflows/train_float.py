"""Train the float model before it is quantized: a new head alone first, then all of it.

Training everything at once would distort the features while the head is still random (Kumar et al.
2022, arXiv 2202.10054).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.tensor_files import load_model_state, load_tensors
from ricciq.training.loop import finetune
from ricciq.training.state import TrainingState
from ricciq.workflows.job import Job
from ricciq.workflows.session import Session


class FloatTraining(NamedTuple):
    """What the float model was trained for.

    Attributes:
        head_epochs: epochs of the head alone.
        epochs: epochs of all weights.
        holdout_top1: accuracy on the hold-out, percent.
    """

    head_epochs: int
    epochs: int
    holdout_top1: float


def train_float(job: Job, session: Session, folder: Path | None = None) -> FloatTraining | None:
    """Train the float model of a job in place, if the job says so.

    Args:
        job: from `prepare`, not converted yet.
        session: a session that has begun.
        folder: where states and the best weights are kept, from which an interrupted run resumes;
            by default ``float`` in the session's folder. What it has finished is not repeated.

    Returns:
        What was done; None if the float model is taken as it is.

    Raises:
        RicciqError: as in `ricciq.training.loop.finetune`.
    """
    epochs = job.float_epochs
    if not epochs:
        return None
    folder = folder or session.folder.float_training
    head = _head_parameters(job.model) if job.has_new_head else []
    head_epochs = math.ceil(epochs / 4) if head else 0
    session.journal.say(
        f"training the float model first: {f'{head_epochs} epochs of its head, ' if head else ''}"
        f"{epochs} epochs of all weights"
    )
    if head:
        _finetune(job, session, RunFolder(folder / "head"), head_epochs, head)
    done = _finetune(job, session, RunFolder(folder / "all"), epochs, job.model.parameters())
    return FloatTraining(head_epochs, epochs, done.chosen_top1)


def _finetune(
    job: Job, session: Session, folder: RunFolder, epochs: int, trained: Iterable[nn.Parameter]
) -> TrainingState:
    """Train some of the parameters, and load the best epoch's weights."""
    model, world = job.model, session.world
    parameters = list(model.parameters())
    wanted = list(trained)
    chosen = {id(parameter) for parameter in wanted}
    for parameter in parameters:
        parameter.requires_grad_(id(parameter) in chosen)
    everything = len(wanted) == len(parameters)
    if world.is_first:
        folder.path.mkdir(parents=True, exist_ok=True)
    try:
        done = finetune(
            model,
            job.loader("fit", training=True, world=world),
            job.loader("holdout", world=world),
            _recipe(job.recipe, epochs, freeze_bn=not everything),
            job.correction,
            device=job.device,
            folder=folder,
            journal=session.journal,
            calibration_images=partial(job.calibration_images, world.size),
            resume=world.from_first(folder.last.is_file),
            world=world,
        )
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
    tensors, _ = world.from_first(lambda: load_tensors(folder.best))
    load_model_state(model, tensors, folder.best)
    model.eval()
    return done


def _head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a timm model's classifier."""
    head = model.get_classifier()  # type: ignore[operator]
    heads = head if isinstance(head, tuple | list) else (head,)
    return [p for part in heads for p in part.parameters()]


def _recipe(recipe: Recipe, epochs: int, freeze_bn: bool) -> Recipe:
    """The recipe without all that concerns discrete weights or a teacher."""
    settings = recipe.training
    return recipe.replace(
        {
            "training.epochs": epochs,
            "training.warmup_epochs": min(settings.warmup_epochs, epochs - 1),
            "training.distill": 0.0,
            "training.distill_features": 0.0,
            "training.progressive": (),
            "training.damping": 0.0,
            "training.freezing": None,
            "training.freeze_bn": freeze_bn or settings.freeze_bn,
            "training.reestimate_bn": settings.reestimate_bn and not freeze_bn,
        },
        "the recipe of the float model",
    )
