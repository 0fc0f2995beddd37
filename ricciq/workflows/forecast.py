"""How long a run will take: the rest of its training, and what follows.

What follows is estimated from what the float model took. The ratios below are about those of
``python tests/benchmarks/forecast.py``; they differ from network to network by up to a half.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch

from ricciq.training.pace import Pace
from ricciq.workflows.job import Job
from ricciq.workflows.session import Session, in_first_process

HOLDOUT = 1.5
"""Time to evaluate the model in training / the float model, on the same device."""
DEPLOYED = 2.2
"""Time to evaluate the deployed model in torch / the float model, on the same device."""
FILE = 2.2
"""Time to evaluate the file, with onnxruntime's optimizations and without / that of float.onnx."""
EXPORT = 1.5
"""Time to export the trained model / the float model."""
DISCRETE_STEP = 1.6
"""Time of a step of the discrete model with its teacher / of the float model."""
WHOLE_STEP = 3.5
"""Time of a step of all weights / of the head alone."""
LEAST_SAID = 60.0
"""Seconds that must be left for a run to say how long it will take."""
TRIED = 8
"""Images to time float.onnx with."""


PARTS = ("start", "float_training", "training", "export", "evaluation")
"""Parts of a run, in their order."""


class Costs(NamedTuple):
    """What the float model took, in seconds.

    Attributes:
        image: to load an image and evaluate it, on the run's device.
        file: to evaluate an image with float.onnx, on all cores.
        export: to write float.onnx.
    """

    image: float
    file: float
    export: float


class Forecast(NamedTuple):
    """How long a run will take, in seconds.

    Attributes:
        step: an optimizer step of the discrete model.
        training: the steps, and the evaluations of the hold-out.
        export: of the trained model.
        evaluation: of the exported model in torch, and of the file in onnxruntime.
        start: what comes before training, as far as it is not over.
        float_training: training of the float model, as far as it is not over.
    """

    step: float
    training: float
    export: float
    evaluation: float
    start: float = 0.0
    float_training: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return float(sum(getattr(self, part) for part in PARTS))

    def to_dict(self) -> dict[str, float]:
        """JSON values, in seconds: a step, the parts in their order, and the whole."""
        parts = {part: getattr(self, part) for part in PARTS}
        return {"step": self.step, **parts, "whole": self.seconds}


def forecast(job: Job, pace: Pace, costs: Costs, processes: int = 1) -> Forecast:
    """How long training and what follows will take.

    Args:
        job: whose images are counted.
        pace: of training.
        costs: of the float model.
        processes: that share the hold-out.
    """
    held_out = pace.epochs * job.count("holdout") / processes * HOLDOUT * costs.image
    return Forecast(
        pace.step_seconds,
        pace.steps * pace.step_seconds + held_out,
        EXPORT * costs.export,
        job.count("val") * (DEPLOYED * costs.image + FILE * costs.file),
    )


@in_first_process
def forecast_rest(job: Job, session: Session, pace: Pace) -> Forecast:
    """How long the rest of a run will take, once it is under way.

    Args:
        job: in training.
        session: of the run; it remembers what `evaluate_float` and `export_float` took. Where
            float.onnx was written before (a resumed run) or will be (a float run), the export is
            left out.
        pace: of training.
    """
    image = file = session.seconds["evaluate_float"] / job.count("val")
    if job.plan.layers:
        file = time_file(session.folder.float_onnx, job.preprocessing.input_size)
    costs = Costs(image, file, session.seconds["export_float"])
    return forecast(job, pace, costs, session.world.size)


@in_first_process
def forecast_from_float(job: Job, session: Session, pace: Pace, of_head: bool) -> Forecast:
    """How long the rest of a run will take, while its float model is trained.

    Nothing was exported yet: evaluating the file is taken to cost as much as evaluating the model,
    and exports are left out.

    Args:
        job: whose float model is trained.
        session: of the run; it remembers what `evaluate_float` took.
        pace: of this training.
        of_head: whether the head alone is trained, and all weights after it.
    """
    image = session.seconds["evaluate_float"] / job.count("val")
    step, of_epoch, processes = pace.step_seconds, pace.of_epoch, session.world.size
    parts = [pace]
    if of_head:
        step *= WHOLE_STEP
        parts.append(Pace.of_epochs(step, job.float_epochs, of_epoch))
    discrete = Pace.of_epochs(DISCRETE_STEP * step, job.recipe.training.epochs, of_epoch)
    rest = forecast(job, discrete, Costs(image, image, 0.0), processes)
    return rest._replace(float_training=float_seconds(job, parts, image, processes))


def float_seconds(job: Job, parts: list[Pace], image: float, processes: int = 1) -> float:
    """How long the training of a job's float model takes.

    Args:
        job: from `prepare`.
        parts: what is left of them: of the head alone, and of all weights.
        image: seconds to evaluate one.
        processes: that share the hold-out.
    """
    steps = sum(part.steps * part.step_seconds for part in parts)
    return steps + sum(part.epochs for part in parts) * job.count("holdout") / processes * image


def time_file(path: Path, size: tuple[int, int, int]) -> float:
    """Seconds that onnxruntime takes for an image, on all cores.

    Args:
        path: an ONNX file.
        size: (channels, height, width).
    """
    from ricciq.workflows.saved import onnx_predictor  # here, as what it imports takes a second

    predict, images = onnx_predictor(path), torch.zeros(TRIED, *size)
    predict(images)  # the first call is slower
    began = time.perf_counter()
    predict(images)
    return (time.perf_counter() - began) / TRIED
