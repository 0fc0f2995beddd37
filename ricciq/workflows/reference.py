"""The float model, which the quantized one is compared with: its results and its file."""

from __future__ import annotations

import copy
from typing import NamedTuple

from torch import nn

from ricciq.errors import CheckpointError, DivergedError
from ricciq.evaluation import Metrics, Predictions, evaluate_with_predictions
from ricciq.workflows.doubt import doubt
from ricciq.workflows.job import Job
from ricciq.workflows.session import Session, in_first_process
from ricciq.workflows.train_float import FloatTraining


class Reference(NamedTuple):
    """Results of the float model on the validation images.

    Attributes:
        metrics: accuracy and loss.
        predictions: the most likely class of each image, and its probability.
        training: how the float model was trained in this run, if it was.
        doubt: a sentence, where the accuracy shows that classes or images are taken wrongly.
    """

    metrics: Metrics
    predictions: Predictions
    training: FloatTraining | None = None
    doubt: str | None = None


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
        with session.journal.over("float model", job.loader("val")) as batches:
            metrics, predictions = evaluate_with_predictions({"float": model}, batches)
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
    guessed = predictions["float"]
    reason = None
    if job.knows_classes:
        targets, name = job.data.targets("val"), "the float model"
        reason = doubt(guessed.classes.numpy(), targets, job.data.num_classes, name)
    if reason:
        session.journal.say(reason)
    return Reference(found, guessed, doubt=reason)


@in_first_process
def export_float(job: Job, model: nn.Module, session: Session) -> None:
    """Write float.onnx, unless a resumed run has written it before it was stopped.

    A float run writes it at its end: the trained model is its float model.

    Args:
        job: from `prepare`.
        model: the float model.
        session: of the run.
    """
    if not job.plan.layers:
        return
    from ricciq.deploy.export import export_onnx, is_exported  # here: it takes a second

    stored = job.metadata.for_onnx(is_float=True)
    if session.resume and is_exported(session.folder.float_onnx, stored):
        return
    export_onnx(copy.deepcopy(model).cpu(), session.folder.float_onnx, job.preprocessing, stored)
