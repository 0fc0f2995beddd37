"""Train the float model before it is quantized: a new head alone first, then all of it.

Training everything at once would distort the features while the head is still random (Kumar et al.
2022, arXiv 2202.10054).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ricciq.recipe import Recipe
from ricciq.runs.folder import RunFolder
from ricciq.system.tensor_files import load_model_state, load_tensors
from ricciq.training.loop import finetune
from ricciq.training.pace import FirstSteps, Pace
from ricciq.training.state import TrainingState
from ricciq.workflows.job import Job
from ricciq.workflows.session import Session

FloatUnderWay = Callable[[Pace, bool], None]
"""Called with the pace of training, and whether the head alone is trained."""


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


def train_float(
    job: Job,
    session: Session,
    folder: Path | None = None,
    under_way: FloatUnderWay | None = None,
) -> FloatTraining | None:
    """Train the float model of a job in place, if the job says so.

    Args:
        job: from `prepare`, not converted yet.
        session: a session that has begun.
        folder: where states and the best weights are kept, from which an interrupted run resumes;
            by default ``float`` in the session's folder. What it has finished is not repeated.
        under_way: called in every process after the first steps of each of the two parts.

    Returns:
        What was done; None if the float model is taken as it is.

    Raises:
        RicciqError: as in `ricciq.training.loop.finetune`.
    """
    epochs = job.float_epochs
    if not epochs:
        return None
    folder = folder or session.folder.float_training
    head_epochs = job.head_epochs
    session.journal.say(
        "training the float model first: "
        f"{f'{head_epochs} epochs of its head, ' if head_epochs else ''}{epochs} epochs of all "
        "weights"
    )

    def first_steps(of_head: bool) -> FirstSteps | None:
        return under_way and FirstSteps(lambda pace: under_way(pace, of_head))

    if head_epochs:
        head, place = _head_parameters(job.model), RunFolder(folder / "head")
        _finetune(job, session, place, head_epochs, head, first_steps(True))
    everything, place = job.model.parameters(), RunFolder(folder / "all")
    done = _finetune(job, session, place, epochs, everything, first_steps(False))
    return FloatTraining(head_epochs, epochs, done.chosen_top1)


def _finetune(
    job: Job,
    session: Session,
    folder: RunFolder,
    epochs: int,
    trained: Iterable[nn.Parameter],
    first_steps: FirstSteps | None,
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
            first_steps=first_steps,
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
